"""Optimizers of a Cell: who provides them, what they keep, that paging changes no bit, and LoRA+."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from torch import nn

from harness.cell.measure.memory import optimizer_tensors, tensor_bytes
from harness.cell.training import loop, optimizers
from harness.conformance.comparison.tolerance_policies import exact
from harness.conformance.subject import configure
from harness.errors import UsageError
from harness.methods.registry import discover
from harness.methods.spec import methods
from harness.records.record import Optimizer, Training
from reference.operations.adamw8bit import state_bytes
from support.small_encoder import Encoder, batches, nothing, setting

ELEMENTS = 16 * 8192


class Wide(Encoder):
    """An encoder whose embedding is large enough for 8-bit moments (4096 elements) and to be paged (100,000)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(16, ELEMENTS // 16), nn.Linear(ELEMENTS // 16, 2)
        nn.init.normal_(self.head.weight, std=0.01)


def trained(model: nn.Module, name: Optimizer, implementation: str = "fused", **recipe: Any) -> tuple[Any, list[float]]:
    """Train all of `model` for four steps by an optimizer; return it, and the losses."""
    s = setting(model, "full")
    how = Training(**{"steps": 4, "lr": 1e-3, **recipe})
    s["optimizer"], s["schedule"] = optimizers.make(s["adapted"], [], how, name, implementation)
    losses = loop.train(batches=batches(4), seed=0, report=nothing, **s).losses
    return s["optimizer"], losses


@pytest.mark.parametrize(
    ("name", "implementation", "kind", "pages"),
    [
        ("adamw", "reference", "torch.optim.adamw.AdamW", None),
        ("adamw", "fused", "torch.optim.adamw.AdamW", None),
        ("adamw-8bit", "reference", "reference.operations.adamw8bit.AdamW8bit", None),
        ("adamw-8bit", "fused", "harness.kernels.torch.optimizers.adamw8bit.AdamW8bit", None),
        ("adamw-8bit", "hf-peft", "harness.kernels.torch.optimizers.adamw8bit.AdamW8bit", None),
        ("paged-adamw", "reference", "torch.optim.adamw.AdamW", "reference.operations.paged.Paged"),
        ("paged-adamw", "fused", "torch.optim.adamw.AdamW", "harness.kernels.torch.optimizers.paged.Paged"),
        (
            "paged-adamw-8bit",
            "reference",
            "reference.operations.adamw8bit.AdamW8bit",
            "reference.operations.paged.Paged",
        ),
        (
            "paged-adamw-8bit",
            "fused",
            "harness.kernels.torch.optimizers.adamw8bit.AdamW8bit",
            "harness.kernels.torch.optimizers.paged.Paged",
        ),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_class_that_steps_is_recorded(
    name: Any, implementation: str, kind: str, pages: str | None, dtype: torch.dtype
) -> None:
    facts = optimizers.facts(trained(Encoder().to(dtype), name, implementation)[0])
    assert (facts["class"], facts.get("paged_by"), facts["name"]) == (kind, pages, kind.rpartition(".")[2])
    assert facts.get("master_weights") == (None if dtype is torch.float32 else "float32")
    (group,) = facts["groups"]  # type: ignore[misc]
    assert (group["lr"], group["betas"], group["eps"]) == (1e-3, list(optimizers.BETAS), optimizers.EPS)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["reference", "fused"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["adamw", "adamw-8bit"])
def test_paging_changes_no_bit(name: Any, dtype: torch.dtype, implementation: str) -> None:
    models = [Wide().to(dtype) for _ in range(2)]
    _, plain = trained(models[0], name, implementation)
    optimizer, paged = trained(models[1], f"paged-{name}", implementation)  # type: ignore[arg-type]
    assert paged == plain
    assert exact(models[1].state_dict(), models[0].state_dict()).passed
    assert "states of 1 of 3 tensors that train were paged" in optimizers.notes(optimizer)[-1]
    assert "saves nothing" in optimizers.notes(optimizer)[-1]


@pytest.mark.parametrize("implementation", ["reference", "fused"])
def test_moments_of_eight_bits_take_a_quarter_where_a_tensor_is_large(implementation: str) -> None:
    taken = {}
    for name in ("adamw", "adamw-8bit"):
        optimizer, _ = trained(Wide(), name, implementation)  # type: ignore[arg-type]
        steps = [state["step"] for state in optimizer.state.values() if isinstance(state["step"], torch.Tensor)]
        taken[name] = tensor_bytes(optimizer_tensors(optimizer)) - tensor_bytes(steps)
    sizes = [ELEMENTS, ELEMENTS // 8, 2]
    assert taken == {"adamw": sum(8 * n for n in sizes), "adamw-8bit": sum(map(state_bytes, sizes))}
    assert optimizers.notes(optimizer)[0].startswith("2 of 3 tensors that train have moments in 8 bits")


def test_small_tensors_keep_their_moments_and_the_record_says_so() -> None:
    (_, plain), (optimizer, narrow) = trained(Encoder(), "adamw"), trained(Encoder(), "adamw-8bit")
    assert [len(losses) for losses in (plain, narrow)] == [4, 4]
    (note,) = optimizers.notes(optimizer)
    assert note.startswith("0 of 3 tensors that train have moments in 8 bits; those of fewer than 4096 elements")


def test_masters_hold_what_is_stepped_by_any_optimizer() -> None:
    """In bfloat16 a step of 1e-6 cannot be seen in most weights, but their masters move."""
    for name in get_args(Optimizer):
        model = Wide().bfloat16()
        before = model.head.weight.detach().clone()
        optimizer, _ = trained(model, name, lr=1e-6)
        moved = optimizers.stored_value(model.head.weight, optimizer) != before.float()
        assert int((model.head.weight != before).sum()) < int(moved.sum()), name


# LoRA+


def test_factor_b_alone_has_the_larger_learning_rate() -> None:
    s = setting(Encoder(), "lora", lr=1e-3, lr_ratio=16.0)
    rates = {id(p): group["initial_lr"] for group in s["optimizer"].param_groups for p in group["params"]}
    assert {name: rates[id(t)] for name, t in s["adapted"].tensors().items()} == {"head.A": 1e-3, "head.B": 16 * 1e-3}


def test_the_bias_of_b_learns_at_the_rate_of_b_as_in_peft() -> None:
    adapted = discover().find("method", "lora", "reference")(
        Encoder(), configure("lora", {"rank": 2, "targets": ["head"], "lora_bias": True}), torch.Generator()
    )
    optimizer, _ = optimizers.make(adapted, [], Training(steps=1, lr=1e-3, lr_ratio=4.0))
    slow, fast = ([id(p) for p in group["params"]] for group in optimizer.param_groups)
    tensors = adapted.tensors()
    assert (slow, fast) == ([id(tensors["head.A"])], [id(tensors["head.B"]), id(tensors["head.c"])])


def test_the_head_keeps_its_own_learning_rate_beside_lora_plus() -> None:
    model = Encoder()
    attach = discover().find("method", "lora", "fused")
    adapted = attach(model, configure("lora", {"rank": 2, "targets": ["head"]}), torch.Generator())
    recipe = Training(steps=2, lr=1e-3, head_lr=1e-2, lr_ratio=4.0)
    optimizer, _ = optimizers.make(adapted, [model.embed.weight], recipe, "adamw-8bit", "fused")
    assert [group["initial_lr"] for group in optimizer.param_groups] == [1e-3, 4 * 1e-3, 1e-2]


def test_what_a_method_has_no_place_for_is_refused_with_a_hint() -> None:
    with pytest.raises(UsageError, match="trains no factor B"):
        setting(Encoder(), "full", lr_ratio=16.0)
    galore = setting(Encoder(), "galore")["adapted"]
    for how, name in (({}, "paged-adamw-8bit"), ({"lr_ratio": 2.0}, "adamw")):
        with pytest.raises(UsageError, match="GaLore, the method's own"):
            optimizers.make(galore, [], Training(steps=1, **how), name)


@pytest.mark.parametrize("method", sorted(methods()))
def test_what_a_method_says_of_its_optimizer_and_factors_is_so(method: str) -> None:
    """A suite is checked by what the file says, without torch."""
    model = nn.ModuleDict({name: nn.Linear(32, 32) for name in ("q_proj", "v_proj")})
    wanted = {"rank": 12, "targets": ["q_proj", "v_proj"]}
    config = configure(method, {key: value for key, value in wanted.items() if key in methods()[method].fields})
    adapted = discover().find("method", method, "reference")(model, config, torch.Generator())
    own = adapted.optimizer(1e-3, 0.0)
    assert methods()[method].spec.optimizer == ("" if own is None else type(own).__name__)
    letters = {name.rpartition(".")[2] for name in adapted.tensors()}
    assert set(methods()[method].spec.factors) == letters & {"A", "B"}
