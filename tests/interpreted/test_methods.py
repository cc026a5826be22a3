"""Methods of `fused` where no Operation stands for what they do: over our own NF4, and with q, k and v in one call."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from harness.conformance.comparison.tolerance_policies import noise_floor
from harness.conformance.subject import DTYPES, configure
from harness.kernels.torch import nf4
from harness.kernels.torch.lora_experts import grouped_lora_linear
from harness.kernels.torch.nf4_linear import Nf4Linear
from harness.kernels.torch.support.packed_weight import PackedStack, PackedWeight
from harness.kernels.triton import lora_linears
from harness.methods.registry import discover

D, E, T = 64, 48, 7


def attached(method: str, name: str, dtype: torch.dtype, dropout: float) -> Any:
    """Return one adapted layer with random factors; over packed weights for `fused`, over the decoded ones else."""
    torch.manual_seed(0)
    dense = nn.Linear(D, E)
    packed = Nf4Linear(dense, torch.float32)
    if name == "fused":
        model = nn.ModuleDict({"q_proj": packed})
    else:
        dense.weight.data = packed.packed_weight.decoded(torch.float32)
        model = nn.ModuleDict({"q_proj": dense}).to(dtype)
    config = configure(method, {"rank": 4, "alpha": 8.0, "targets": ["q_proj"], "dropout": dropout})
    adapted = discover([name]).find("method", method, name)(model, config, torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    for tensor in adapted.tensors().values():
        tensor.data.copy_(torch.randn(tensor.shape, generator=generator, dtype=torch.float64) / 4)
    return adapted


def seen(adapted: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    x = torch.randn(T, D, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(dtype).requires_grad_()
    layer = adapted.model["q_proj"]
    y = layer(x)
    (y * torch.linspace(-1, 1, E, dtype=dtype)).sum().backward()
    assert x.grad is not None
    return {"y": y.detach(), "x": x.grad} | {name: t.grad for name, t in adapted.tensors().items()}


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_the_layer_equals_one_over_the_decoded_weight(method: str) -> None:
    mine = seen(attached(method, "fused", torch.float32, 0.0), torch.float32)
    truth, rounded = (seen(attached(method, "reference", dt, 0.0), dt) for dt in (torch.float64, torch.float32))
    assert noise_floor(mine, truth, rounded, "float32").passed


def test_dropout_of_0_drops_nothing() -> None:
    adapted = attached("dora", "fused", torch.float32, 0.5)
    adapted.model.eval()
    mine = seen(adapted, torch.float32)
    found = []
    for dtype in (torch.float64, torch.float32):
        reference = attached("dora", "reference", dtype, 0.5)
        reference.model.eval()
        found.append(seen(reference, dtype))
    assert noise_floor(mine, *found, "float32").passed


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", ["lora", "pissa", "adalora"])
def test_q_k_and_v_are_computed_by_one_call(method: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[int] = []
    right = lora_linears.shrink

    def counted(left: Tensor, *rest: Any, **options: Any) -> Tensor:
        passes.append(left.shape[1])
        return right(left, *rest, **options)

    monkeypatch.setattr(lora_linears, "shrink", counted)
    mine = of_three(method, "fused", DTYPES[dtype], dtype)
    assert passes == [D, E, E, E]  # forward x once; backward every dy
    truth, rounded = (of_three(method, "reference", DTYPES[one], dtype) for one in ("float64", dtype))
    assert noise_floor(mine, truth, rounded, dtype).passed


def of_three(method: str, name: str, dtype: torch.dtype, given: str) -> dict[str, Tensor]:
    """Return outputs and gradients of q, k and v, adapted, of one input; all numbers are first rounded to `given`."""
    torch.manual_seed(0)
    names = ("q_proj", "k_proj", "v_proj")
    model = nn.ModuleDict({one: nn.Linear(D, E, bias=one == "k_proj") for one in names}).to(DTYPES[given]).to(dtype)
    options = {"target_rank": 2} if method == "adalora" else {}
    config = configure(method, {"rank": 4, "alpha": 8.0, "targets": list(names), **options})
    adapted = discover([name]).find("method", method, name)(model, config, torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    for tensor in adapted.tensors().values():
        drawn = torch.randn(tensor.shape, generator=generator, dtype=torch.float64) / 4
        tensor.data.copy_(drawn.to(DTYPES[given]))
    x = torch.randn(T, D, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    x = x.to(DTYPES[given]).to(dtype).requires_grad_()
    found = {one: model[one](x) for one in names}
    sum((y * torch.linspace(-1, 1, E).to(DTYPES[given]).to(dtype)).sum() for y in found.values()).backward()
    assert x.grad is not None
    grads = {one: t.grad for one, t in adapted.tensors().items()}
    return {"x": x.grad, **{one: y.detach() for one, y in found.items()}, **grads}


def test_unused_outputs_get_no_gradient() -> None:
    layers = [
        (torch.randn(E, D), None, torch.randn(4, D).requires_grad_(), torch.randn(E, 4).requires_grad_(), 2.0)
    ] * 2
    first, second = (
        (W, bias, A.detach().requires_grad_(), B.detach().requires_grad_(), s) for W, bias, A, B, s in layers
    )
    x = torch.randn(T, D)
    lora_linears.lora_linears(x, [first, second], {})[0].sum().backward()
    assert first[2].grad is not None
    assert first[3].grad is not None
    assert second[2].grad is None
    assert second[3].grad is None


def test_packed_experts_equal_decoded_ones_bit_by_bit() -> None:
    generator, counts = torch.Generator().manual_seed(0), torch.tensor([3, 0, 4])
    weight, x, A, B = (
        torch.randn(shape, generator=generator) for shape in ((3, 16, 20), (7, 20), (3, 2, 20), (3, 16, 2))
    )
    stack = PackedStack(PackedWeight(*nf4.quantize(weight, 64), 64, (3, 16, 20)))
    found = []
    for W in (stack, stack.dense(torch.float32)):
        tensors = [t.clone().requires_grad_() for t in (x, A, B)]
        y = grouped_lora_linear(tensors[0], W, *tensors[1:], 2.0, counts)
        y.square().sum().backward()
        found.append([y.detach(), *(t.grad for t in tensors)])
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(*found, strict=True))
