"""Several adapters in one batch: against a loop by hand, lora.py's layer, and HF peft's mixed-adapter batch."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from harness.conformance.comparison.tolerance_policies import noise_floor
from harness.conformance.subject import DTYPES
from reference.lora import LoraLinear
from reference.operations.multi_lora import multi_lora_linear
from support.two_layer_model import assert_same, draw

D, E = 12, 10
RANKS, SCALINGS = (3, 1, 5), (8 / 3, 0.5, 2.0)
IDS = [2, -1, 0, 0, -1, 2]


def adapters(dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], list[Tensor]]:
    As = [draw(r, D, seed=10 + i, dtype=dtype).requires_grad_(True) for i, r in enumerate(RANKS)]
    Bs = [draw(E, r, seed=20 + i, dtype=dtype).requires_grad_(True) for i, r in enumerate(RANKS)]
    return As, Bs


@pytest.mark.parametrize("middle", [(), (4,), (2, 3)], ids=str)
def test_every_sequence_gets_its_own_update(middle: tuple[int, ...]) -> None:
    x, base_out, (As, Bs) = draw(6, *middle, D), draw(6, *middle, E, seed=2), adapters()
    y = multi_lora_linear(x, base_out, As, Bs, SCALINGS, IDS)
    want = base_out.clone()
    for n, i in enumerate(IDS):
        if i >= 0:
            want[n] += SCALINGS[i] * torch.einsum("...d,kd,ek->...e", x[n], As[i].detach(), Bs[i].detach())
    assert_same({"y": y}, {"y": want})


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_an_adapter_the_base_output_stays_to_the_last_bit(dtype: str) -> None:
    x, base_out = draw(6, 4, D, dtype=DTYPES[dtype]), draw(6, 4, E, seed=2, dtype=DTYPES[dtype])
    kept = base_out.clone()
    As, Bs = adapters(DTYPES[dtype])
    y = multi_lora_linear(x, base_out, As, Bs, SCALINGS, IDS)
    assert y.dtype == DTYPES[dtype]
    none = torch.tensor(IDS) == -1
    assert torch.equal(y[none], base_out[none])
    assert not bool((y == base_out).flatten(1).all(1)[~none].any())
    assert torch.equal(base_out, kept)  # nothing is written into
    assert torch.equal(multi_lora_linear(x, base_out, [], [], [], [-1] * 6), base_out)


@pytest.mark.parametrize("adapter", range(3))
def test_one_adapter_for_all_is_lora(adapter: int) -> None:
    x, (As, Bs) = draw(6, 4, D), adapters()
    base = nn.Linear(D, E, dtype=torch.float64)
    layer = LoraLinear(base, As[adapter].detach(), Bs[adapter].detach(), SCALINGS[adapter], 0.0)
    y = multi_lora_linear(x, base(x), As, Bs, SCALINGS, [adapter] * 6)
    assert_same({"y": y}, {"y": layer(x)})


def test_the_order_of_sequences_does_not_matter() -> None:
    x, base_out, (As, Bs) = draw(6, 4, D), draw(6, 4, E, seed=2), adapters()
    order = torch.tensor([3, 5, 1, 0, 4, 2])
    ids = torch.tensor(IDS)
    y = multi_lora_linear(x, base_out, As, Bs, SCALINGS, ids)
    assert_same({"y": multi_lora_linear(x[order], base_out[order], As, Bs, SCALINGS, ids[order])}, {"y": y[order]})


@pytest.mark.slow
def test_autograd_agrees_with_finite_differences() -> None:
    As, Bs = adapters()
    inputs = (draw(6, 2, D).requires_grad_(True), draw(6, 2, E, seed=2).requires_grad_(True), *As, *Bs)

    def function(x: Tensor, base_out: Tensor, *AB: Tensor) -> Tensor:
        return multi_lora_linear(x, base_out, AB[:3], AB[3:], SCALINGS, [2, -1, 0, 1, -1, 2])

    assert torch.autograd.gradcheck(function, inputs)


def test_an_adapter_learns_from_its_own_sequences_only() -> None:
    x, base_out, (As, Bs) = draw(6, 4, D), draw(6, 4, E, seed=2), adapters()
    multi_lora_linear(x, base_out, As, Bs, SCALINGS, IDS).sum().backward()
    assert As[1].grad is None  # nobody asked for it
    assert Bs[1].grad is None
    for i in (0, 2):
        rows = x[torch.tensor(IDS) == i]
        dy = torch.ones(*rows.shape[:-1], E, dtype=torch.float64)
        want = {
            "A": SCALINGS[i] * torch.einsum("nte,ek,ntd->kd", dy, Bs[i].detach(), rows),
            "B": SCALINGS[i] * torch.einsum("nte,kd,ntd->ek", dy, As[i].detach(), rows),
        }
        assert_same({"A": As[i].grad, "B": Bs[i].grad}, want)


def test_invalid_input_is_reported() -> None:
    x, base_out, (As, Bs) = draw(6, 4, D), draw(6, 4, E, seed=2), adapters()
    for wrong in (3, -2):
        with pytest.raises(ValueError, match=f"id {wrong}: must be an adapter, 0 to 2"):
            multi_lora_linear(x, base_out, As, Bs, SCALINGS, [0, 0, wrong, 0, 0, 0])
    with pytest.raises(ValueError, match=r"ids must have shape \(6,\)"):
        multi_lora_linear(x, base_out, As, Bs, SCALINGS, [0, 1])
    with pytest.raises(ValueError, match="got 3, 2 and 3"):
        multi_lora_linear(x, base_out, As, Bs[:2], SCALINGS, IDS)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_hf_pefts_mixed_batch_computes_the_same(dtype: str) -> None:
    model: Any = nn.Sequential(nn.Linear(D, E, dtype=DTYPES[dtype]))
    configs = [
        peft.LoraConfig(r=r, lora_alpha=r * s, target_modules=["0"]) for r, s in zip(RANKS, SCALINGS, strict=True)
    ]
    model = peft.get_peft_model(model, configs[0], adapter_name="0")
    for i in (1, 2):
        model.add_adapter(str(i), configs[i])
    layer, (As, Bs) = model.base_model.model[0], adapters(DTYPES[dtype])
    with torch.no_grad():
        for i in range(3):
            layer.lora_A[str(i)].weight.copy_(As[i])
            layer.lora_B[str(i)].weight.copy_(Bs[i])
    layer.requires_grad_(True)
    x, dy = draw(6, 4, D, dtype=DTYPES[dtype]).requires_grad_(True), draw(6, 4, E, seed=3, dtype=DTYPES[dtype])
    ids = [2, -1, 0, 1, -1, 2]
    names = ["__base__" if i < 0 else str(i) for i in ids]
    y = layer(x, adapter_names=names)
    theirs = [layer.lora_A[str(i)].weight for i in range(3)] + [layer.lora_B[str(i)].weight for i in range(3)]
    labels = ["y", "x", "A0", "A1", "A2", "B0", "B1", "B2"]
    have = dict(zip(labels, [y, *torch.autograd.grad(y, [x, *theirs], dy)], strict=True))

    def ours(to: torch.dtype) -> dict[str, Tensor]:
        leaves = [t.detach().to(to).requires_grad_(True) for t in (x, *As, *Bs)]
        base = nn.functional.linear(leaves[0], layer.base_layer.weight.to(to), layer.base_layer.bias.to(to))
        out = multi_lora_linear(leaves[0], base, leaves[1:4], leaves[4:], SCALINGS, ids)
        return dict(zip(labels, [out, *torch.autograd.grad(out, leaves, dy.to(to))], strict=True))

    judged = noise_floor(have, ours(torch.float64), ours(DTYPES[dtype]), dtype)
    assert judged.passed, judged
