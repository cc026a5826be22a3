"""Measures: properties that LoRA has by construction (arXiv:2106.09685, section 4.1), checked on its reference.

The tensors are small and hold integers in float64. Their products and sums are exact, so that equality is checked to
the bit. Imports torch only when a measure is computed.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import Any, Literal

from harness.claims import attached_model
from harness.claims.measure import Config, MeasureResult, Method, Model, Positive, measure
from harness.claims.measures.parameters import Split

_INPUTS, _OUTPUTS, _TOKENS = 12, 20, 7


@measure("property")
def rank_times_sides(model: Model, method: Method, config: Config = {}, split: Split = {}) -> MeasureResult:
    """Check whether a Method trains r (in + out) numbers per adapted layer, and no bias.

    r is the rank, and the layer's weight has the sides in and out. For a square layer of side d, these are 2 d r
    numbers.
    """
    from harness.conformance.subject import configure

    layers = dict(attached_model.model(model, json.dumps(split)).named_modules())
    counts: Counter[str] = Counter()
    for name, shape in attached_model.trained(model, method, config, split).items():
        counts[name.rpartition(".")[0]] += math.prod(shape)
    rank = configure(method, config).rank
    for path, count in counts.items():
        expected = rank * sum(attached_model.sides(layers[path]))
        if count != expected:
            return MeasureResult(False, f"{path} trains {count:,}, but r (in + out) is {expected:,}")
    sides = sorted({attached_model.sides(layers[path]) for path in counts})
    of_each = ", ".join(f"{rank} x ({a:,} + {b:,})" for a, b in sides)
    return MeasureResult(bool(counts), f"{len(counts)} layers, each with {of_each}")


@measure("property")
def only_b_learns_at_first() -> MeasureResult:
    """Check whether, while LoRA's B is still zero, the gradient of A is zero and the gradient of B is not."""
    import torch

    adapted = _attach(_plain(), rank=4, alpha=8)
    layer = adapted.layers["layer"]
    x, y = _whole((_TOKENS, _INPUTS), 1), _whole((_TOKENS, _OUTPUTS), 2)
    (adapted.model(x) * y).sum().backward()
    a, b = (int(torch.count_nonzero(t.grad)) for t in (layer.A, layer.B))
    how = f"nonzero gradients: {a} of {layer.A.numel()} in A, {b} of {layer.B.numel()} in B"
    return MeasureResult(a == 0 < b, how)


@measure("property")
def update_is_scaled_by(
    factor: Literal["alpha/r", "alpha/sqrt(r)"], alpha: Positive, ranks: list[Positive]
) -> MeasureResult:
    """Check whether LoRA adds `factor` times B A x to the output of a layer, at every one of these ranks.

    x is the layer's input. `alpha/sqrt(r)` is checked with LoRA's option `rslora`, and `alpha/r` without it.
    """
    import torch

    for rank in ranks:
        adapted = _attach(_plain(), rank=rank, alpha=alpha, rslora=factor == "alpha/sqrt(r)")
        layer = adapted.layers["layer"]
        with torch.no_grad():
            layer.base.weight.zero_()  # adding its product would round the update
            layer.A.copy_(_whole(layer.A.shape, 3))
            layer.B.copy_(_whole(layer.B.shape, 4))
            x = _whole((_TOKENS, _INPUTS), 5)
            scale = alpha / (rank if factor == "alpha/r" else math.sqrt(rank))
            if not torch.equal(adapted.model(x), scale * (x @ layer.A.T @ layer.B.T)):
                return MeasureResult(False, f"at rank {rank} the update is not {scale:g} B A x")
    return MeasureResult(bool(ranks), f"equal bit by bit at ranks {', '.join(map(str, ranks))}, alpha {alpha}")


@measure("property")
def subtracting_restores_the_base() -> MeasureResult:
    """Check whether subtracting alpha/r B A from LoRA's merged weight restores the original weight."""
    import torch

    layer = _attach(_plain(), rank=4, alpha=8).layers["layer"]
    with torch.no_grad():
        layer.A.copy_(_whole(layer.A.shape, 3))
        layer.B.copy_(_whole(layer.B.shape, 4))
        merged: Any = layer.merged()
        moved = int(torch.count_nonzero(merged.weight - layer.base.weight))
        left = int(torch.count_nonzero(merged.weight - layer.delta() - layer.base.weight))
    how = f"merging changed {moved} of {layer.base.weight.numel()} weights; subtracting restored all but {left}"
    return MeasureResult(left == 0 < moved, how)


@measure("property")
def merged_has_the_bases_layers() -> MeasureResult:
    """Check whether a model with merged LoRA has the modules and shapes of its base model, and so adds no computation."""
    model = _plain()
    before = _architecture(model)
    adapted = _attach(model, rank=4, alpha=8)
    between = _architecture(model)
    adapted.merge()
    after = _architecture(model)
    how = f"{len(before)} modules and tensors before, {len(between)} with the adapter, {len(after)} merged"
    return MeasureResult(before == after != between, how)


@measure("property")
def b_learns_faster(ratio: Positive) -> MeasureResult:
    """Check whether LoRA+ trains every factor B with `ratio` times the learning rate of A (arXiv:2402.12354)."""
    from harness.cell.training import optimizers
    from harness.records.record import Training

    adapted = _attach(_plain(), rank=4, alpha=8)
    layer = adapted.layers["layer"]
    optimizer, _ = optimizers.make(adapted, [], Training(steps=1, lr=2.0**-10, lr_ratio=float(ratio)))
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    a, b = rates[id(layer.A)], rates[id(layer.B)]
    return MeasureResult(b == ratio * a, f"learning rate of A {a:g}, of B {b:g}")


def _plain() -> Any:
    """Return a model with one linear layer, whose weight holds integers in float64."""
    from collections import OrderedDict

    import torch
    from torch import nn

    layer = nn.Linear(_INPUTS, _OUTPUTS, bias=False, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(_whole((_OUTPUTS, _INPUTS), 0))
    return nn.Sequential(OrderedDict(layer=layer))


def _attach(model: Any, **config: Any) -> Any:
    import torch

    from harness.conformance.subject import attach_reference, configure

    return attach_reference("lora", model, configure("lora", config), ["layer"], torch.Generator().manual_seed(0))


def _whole(shape: Any, seed: int) -> Any:
    import torch

    return torch.randint(1, 5, tuple(shape), generator=torch.Generator().manual_seed(seed)).double()


def _architecture(model: Any) -> list[tuple[str, str]]:
    modules = [(path, type(module).__name__) for path, module in model.named_modules()]
    return modules + [(name, str(tuple(tensor.shape))) for name, tensor in model.state_dict().items()]
