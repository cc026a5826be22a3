"""LoRA-FA, Riemannian preconditioned LoRA and LoRA+ against what their papers derive, and AdamW against torch's."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from harness.conformance.comparison.tolerance_policies import exact
from reference.lora_experts import packed
from reference.operations import lorafa, loraplus, riemannian
from reference.operations.adamw import adamw_step
from support.two_layer_model import assert_same, draw

E, D, R = 12, 20, 3
KNOBS: dict[str, Any] = {"step": 4, "lr": 0.1, "betas": (0.7, 0.9), "eps": 1e-3, "weight_decay": 0.3}


def assert_agree(have: Tensor, want: Tensor) -> None:
    assert_same({"it": have}, {"it": want})


def test_adamw_in_its_first_form_is_that_of_torch() -> None:
    p, g, m, v = (draw(E, R, seed=seed) for seed in range(4))
    parameter = nn.Parameter(p.clone())
    parameter.grad = g
    optimizer = torch.optim.AdamW([parameter], **{name: KNOBS[name] for name in KNOBS if name != "step"})
    optimizer.state[parameter] = {"step": torch.tensor(3.0), "exp_avg": m.clone(), "exp_avg_sq": v.square()}
    optimizer.step()
    mine = adamw_step(p, g, m, v.square(), **KNOBS)
    assert_agree(mine[0], parameter.detach())
    assert_agree(mine[1], optimizer.state[parameter]["exp_avg"])
    assert_agree(mine[2], optimizer.state[parameter]["exp_avg_sq"])


@pytest.mark.parametrize("bias_correction", [True, False])
def test_adamw_in_its_second_form_adds_eps_before_the_bias_correction_and_decays_last(bias_correction: bool) -> None:
    p, g, m, v = 2.0, 0.5, 0.25, 0.04
    (b1, b2), lr, eps, decay = KNOBS["betas"], KNOBS["lr"], KNOBS["eps"], KNOBS["weight_decay"]
    first, second = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
    rate = lr * (math.sqrt(1 - b2**4) / (1 - b1**4) if bias_correction else 1.0)
    moved = p - rate * first / (math.sqrt(second) + eps)
    given = (torch.tensor([x], dtype=torch.float64) for x in (p, g, m, v))
    mine = adamw_step(*given, **KNOBS, form="transformers", bias_correction=bias_correction)
    for have, want in zip(mine, (moved - lr * decay * moved, first, second), strict=True):
        assert_agree(have, torch.tensor([want], dtype=torch.float64))


def test_the_corrected_gradient_of_lora_fa_changes_the_weight_as_nearly_as_it_can_along_its_full_gradient() -> None:
    A, G, s = draw(R, D, seed=1), draw(E, D, seed=2), 1.75
    ridge = torch.cat([s * A, s * math.sqrt(lorafa.DELTA) * torch.eye(R, dtype=torch.float64)], dim=1)
    target = torch.cat([G, torch.zeros(E, R, dtype=torch.float64)], dim=1)
    nearest = torch.linalg.lstsq(ridge.T, target.T).solution.T
    assert_agree(lorafa.corrected(s * G @ A.T, A, s), nearest)


def test_dependent_rows_of_a_share_the_corrected_gradient_of_lora_fa_also_in_float32() -> None:
    A, G = draw(2, D, seed=1).float(), draw(E, D, seed=2).float()
    A = torch.cat([A, A[:1]])  # as with more ranks than inputs, A A^T has no inverse
    found = lorafa.corrected(G @ A.T, A, 1.0)
    alone = lorafa.corrected(G @ A[:2].T, A[:2], 1.0)
    halves = {"first": found[:, 0], "second": found[:, 2]}
    assert_same(halves, dict.fromkeys(halves, alone[:, 0].double() / 2), "float32")


def test_a_layer_of_which_one_factor_alone_has_a_gradient_is_refused() -> None:
    A, B = draw(R, D, seed=1), draw(E, R, seed=2)
    options = {"delta": 0.1, "lr": 0.1, "weight_decay": 0.0}
    with pytest.raises(ValueError, match="A has no gradient, but its partner has one"):
        riemannian.riemannian_step("gd", A, B, (None, B), (A, A), (B, B), **options)


def test_lora_fa_gives_each_layer_its_own_scaling_and_leaves_a_layer_without_gradient_alone() -> None:
    A, B, g, m, v = (draw(*shape, seed=seed) for seed, shape in enumerate([(R, D), *[(E, R)] * 4]))
    options = {"correction": "least-squares", "form": "transformers", **KNOBS}
    layers = ([A, A, A], [B, B, B], [g, g, None], [m, m, m], [v.square()] * 3, [2.0, 0.5, 1.0])
    doubled, halved, frozen = lorafa.lorafa_steps(*layers, **options)
    beta = KNOBS["betas"][0]
    assert_agree(16 * (doubled[1] - beta * m), halved[1] - beta * m)
    named = dict(zip("Bmv", frozen, strict=True))
    assert exact(named, {"B": B, "m": m, "v": v.square()}).passed


def test_a_riemannian_step_of_the_update_does_not_depend_on_how_the_update_is_factored() -> None:
    A, B, G, mix = draw(R, D, seed=1), draw(E, R, seed=2), draw(E, D, seed=3), draw(R, R, seed=4)
    none = (torch.empty(0), torch.empty(0))

    def update_after(A: Tensor, B: Tensor) -> Tensor:
        options = {"lr": 0.01, "weight_decay": 0.0, "delta": 0.0}
        after = riemannian.riemannian_step("gd", A, B, (B.T @ G, G @ A.T), none, none, **options)
        return after[1][0] @ after[0][0]

    plain, mixed = update_after(A, B), update_after(mix @ A, B @ torch.linalg.inv(mix))
    assert_agree(mixed, plain)
    assert not exact({"it": plain}, {"it": B @ A}).passed


def test_the_damping_of_a_riemannian_step_keeps_lora_at_its_start_from_moving_a() -> None:
    A, G, B = draw(R, D, seed=1), draw(E, D, seed=2), torch.zeros(E, R, dtype=torch.float64)
    gA, gB = riemannian.preconditioned(B.T @ G, G @ A.T, A, B, 1e-6)
    assert exact({"gA": gA}, {"gA": torch.zeros_like(A)}).passed
    assert_agree(gB @ (A @ A.T + 1e-6 * torch.eye(R, dtype=torch.float64)), G @ A.T)


GIVEN = {"lr": 0.5, "ratio": 8.0, "lr_embedding": 0.25, "weight_decay": 0.125}


@pytest.mark.parametrize(
    ("name", "dimensions", "rates"),
    [
        ("q_proj.lora_A", 2, (0.5, 0.125)),
        ("q_proj.lora_B", 2, (4.0, 0.125)),
        ("q_proj.lora_B.bias", 1, (4.0, 0.0)),
        ("q_proj.lora_magnitude_vector", 1, (4.0, 0.125)),
        ("embed.lora_embedding_A", 2, (0.25, 0.125)),
        ("embed.lora_embedding_B", 2, (0.25, 0.125)),
        ("input_layernorm.weight", 1, (4.0, 0.0)),
        ("rms_norm.weight", 1, (4.0, 0.0)),
        ("head.weight", 2, (0.5, 0.125)),
        ("head.bias", 1, (4.0, 0.0)),
    ],
)
def test_lora_plus_gives_each_tensor_its_rate_and_decay(name: str, dimensions: int, rates: tuple[float, float]) -> None:
    assert loraplus.group_of(name, dimensions, **GIVEN) == rates


def test_lora_plus_steps_each_tensor_by_its_own_rate_and_leaves_frozen_ones_alone() -> None:
    tensors = {name: draw(3, 4, seed=seed) for seed, name in enumerate(("l.lora_A", "l.lora_B", "l.weight"))}
    ones = {name: torch.ones(3, 4, dtype=torch.float64) for name in ("l.lora_A", "l.lora_B")}
    after = loraplus.loraplus_step(tensors, ones, ["l.weight"], betas=(0.9, 0.999), eps=0.0, **GIVEN)
    assert after["l.weight"][:2] == (0.0, 0.0)
    assert_agree(after["l.weight"][2], tensors["l.weight"])
    for name, lr in (("l.lora_A", 0.5), ("l.lora_B", 4.0)):  # the first step of Adam is lr long in every element
        assert_agree(after[name][2], (1 - lr * 0.125) * tensors[name] - lr)


def test_each_of_several_stacked_experts_steps_as_a_layer_of_its_own() -> None:
    A, B, G = draw(2, R, D, seed=1), draw(2, E, R, seed=2), draw(2, E, D, seed=3)
    pairs = packed(A, B), packed(B.mT @ G, G @ A.mT)
    of_stack = [lorafa.corrected(pairs[1][1], pairs[0][0], 2.0, 2)]
    of_stack += riemannian.preconditioned(*pairs[1], *pairs[0], 1e-2, 2)
    alone = [riemannian.preconditioned(b.T @ g, g @ a.T, a, b, 1e-2) for a, b, g in zip(A, B, G, strict=True)]
    corrected = torch.stack([lorafa.corrected(g @ a.T, a, 2.0) for a, g in zip(A, G, strict=True)])
    new_A, new_B = packed(torch.stack([one[0] for one in alone]), torch.stack([one[1] for one in alone]))
    for have, want in zip(of_stack, (packed(A, corrected)[1], new_A, new_B), strict=True):
        assert_agree(have, want)
