"""Measures: properties of LoRA's training from "LoRA Without Regret" (Schulman et al. 2025), checked on its reference.

The model is one linear layer in float64, and the loss is half of the squared distance to random targets. Imports torch only
when a measure is computed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from harness.claims.measure import MeasureResult, Positive, measure

if TYPE_CHECKING:
    from torch import Tensor

_INPUTS, _OUTPUTS, _TOKENS = 12, 20, 7
_LR, _BETA1, _BETA2 = 2.0**-8, 0.9, 0.999


@measure("property")
def operations_are_2nn_6nr(widths: list[Positive], ranks: list[Positive]) -> MeasureResult:
    """Check whether LoRA takes 2 N^2 + 6 N R multiply-adds per token, and full fine-tuning 3 N^2.

    The multiply-adds are counted in a forward and a backward pass of one square layer with N inputs, at every width N
    and rank R. The gradient of the layer's input is included, because the layers below need it.
    """
    found = []
    for width in widths:
        full = _multiply_adds("full", width, {})
        for rank in ranks:
            lora = _multiply_adds("lora", width, {"rank": rank})
            if (full, lora) != (3 * width**2, 2 * width**2 + 6 * width * rank):
                return MeasureResult(False, f"N = {width:,}, R = {rank}: LoRA {lora:,}, full fine-tuning {full:,}")
            found.append(f"N = {width:,}, R = {rank}: {lora:,} / {full:,} = {lora / full:.4f}")
    return MeasureResult(bool(found), "; ".join(found))


@measure("property")
def adam_ignores(p: Positive, q: Positive, steps: Positive) -> MeasureResult:
    """Check whether scaling alpha, the initial A and both learning rates together leaves LoRA's training unchanged.

    alpha is divided by p q. The initial A and the learning rate of A are multiplied by p, and the learning rate of B by
    q. The optimizer is Adam without eps. If p and q are powers of two, the weights are equal to the last bit after
    every step.
    """
    import torch

    plain, scaled = _trained(1, 1, steps), _trained(p, q, steps)
    for step, (one, other) in enumerate(zip(plain, scaled, strict=True)):
        if not torch.equal(one, other):
            return MeasureResult(
                False, f"after step {step} the update B A differs by up to {(one - other).abs().max():.3g}"
            )
    moved = (plain[-1] - plain[0]).abs().max()
    return MeasureResult(
        bool(moved), f"p = {p}, q = {q}: equal to the last bit in {steps} steps, which move W by {moved:.3g}"
    )


@measure("property")
def first_step_averages(rank: Positive) -> MeasureResult:
    """Check whether LoRA's first update of W is the mean of `rank` updates, each by a LoRA of rank 1 with one row of A.

    LoRA's factor is 1/r. If the rows of A have the same distribution at all ranks, the expected first update then does
    not depend on the rank. The rank must be a power of two, so that the mean is exact up to the order of the sum.
    """
    import torch

    whole = _layer(rank=rank, alpha=1)
    update = _step(whole)
    alone = torch.zeros_like(update)
    for row in range(rank):
        one = _layer(rank=1, alpha=1)
        with torch.no_grad():
            one.layers["layer"].A.copy_(whole.layers["layer"].A[row : row + 1])
        alone += _step(one) / rank
    difference, largest = (float(t.abs().max()) for t in (update - alone, update))
    # Sums of `rank` terms in another order differ by fewer than `rank` roundings of the largest number.
    equal = difference <= rank * torch.finfo(torch.float64).eps * largest
    how = f"rank {rank}: the largest element is {largest:.3g}, the largest difference {difference:.1g}"
    return MeasureResult(equal and largest > 0, how)


def _multiply_adds(method: str, width: int, config: dict[str, Any]) -> int:
    """Return the multiply-adds per token of a forward and a backward pass of one square layer, counted by torch."""
    import torch
    from torch import nn
    from torch.utils.flop_counter import FlopCounterMode

    layer = nn.Linear(width, width, bias=False, device="meta")
    model = _attached(method, nn.ModuleDict({"layer": layer}), config).model
    x = torch.ones(_TOKENS, width, device="meta", requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        model["layer"](x).sum().backward()
    return int(counter.get_total_flops()) // (2 * _TOKENS)


def _layer(**config: Any) -> Any:
    """Return a model of one linear layer, whose weight is zero in float64, with LoRA attached.

    config: fields of LoRA's config.
    """
    import torch
    from torch import nn

    layer = nn.Linear(_INPUTS, _OUTPUTS, bias=False, dtype=torch.float64)
    nn.init.zeros_(layer.weight)
    return _attached("lora", nn.ModuleDict({"layer": layer}), config)


def _attached(method: str, model: Any, config: dict[str, Any]) -> Any:
    import torch

    from harness.conformance.subject import attach_reference, configure

    return attach_reference(method, model, configure(method, config), ["layer"], torch.Generator().manual_seed(0))


def _loss(adapted: Any) -> Tensor:
    import torch

    generator = torch.Generator().manual_seed(1)
    x, target = (torch.randn(_TOKENS, size, dtype=torch.float64, generator=generator) for size in (_INPUTS, _OUTPUTS))
    loss: Tensor = (adapted.model["layer"](x) - target).square().sum() / 2
    return loss


def _step(adapted: Any) -> Tensor:
    """Take the first step of Adam without eps: each element of B moves by the learning rate. Return the update of W."""
    import torch

    layer = adapted.layers["layer"]
    _loss(adapted).backward()
    with torch.no_grad():
        layer.B -= _LR * layer.B.grad.sign()
        update: Tensor = layer.delta()
    return update


def _trained(p: int, q: int, steps: int) -> list[Tensor]:
    """Return the update of W at the start and after each step of Adam without eps.

    p multiplies the initial A and the learning rate of A. q multiplies the learning rate of B. alpha is divided by p q.
    """
    import torch

    adapted = _layer(rank=4, alpha=8 / (p * q))
    layer = adapted.layers["layer"]
    rates = ((layer.A, p * _LR), (layer.B, q * _LR))
    moments = [(torch.zeros_like(t), torch.zeros_like(t)) for t, _ in rates]
    with torch.no_grad():
        layer.A *= p
    found: list[Tensor] = [layer.delta().detach()]
    for step in range(1, steps + 1):
        adapted.model.zero_grad()
        _loss(adapted).backward()
        with torch.no_grad():
            for (factor, rate), (first, second) in zip(rates, moments, strict=True):
                first.mul_(_BETA1).add_(factor.grad, alpha=1 - _BETA1)
                second.mul_(_BETA2).addcmul_(factor.grad, factor.grad, value=1 - _BETA2)
                mean, scale = first / (1 - _BETA1**step), (second / (1 - _BETA2**step)).sqrt()
                # A has no gradient while B is zero, and 0 / 0 is no step.
                factor -= rate * torch.where(scale > 0, mean / scale, 0.0)
            found.append(layer.delta())
    return found
