"""Measures: numbers of parameters, by formula, of baselines that no Method implements. Imports no torch.

The baselines are adapters, prefixes and projectors.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Annotated, Any, Literal

from pydantic import Field

from harness.claims import attached_model
from harness.claims.measure import MeasureResult, Model, Positive, Quantity, measure
from harness.claims.measures.arithmetic import written
from harness.claims.sums import summed

Sides = Annotated[list[Positive], Field(min_length=2, max_length=2)]
"""The number of inputs and the number of outputs of a layer, e.g. `[1024, 4096]`."""
_MIN_STEP = 5
"""If `fitted` is set, raising the rank by one must change the number by at least this many units of the figure's last
digit. With smaller steps, nearly any figure would fit some rank."""


@measure("share")
def added_share(of: Quantity, model: Model, whole: Literal["base", "base+adapter"] = "base+adapter") -> MeasureResult:
    """Parameters that are added to a model, as a share of the model's parameters.

    of: number of added parameters. whole: if it is `base+adapter`, the model's parameters include the added parameters;
    if it is `base`, they do not.
    """
    base = attached_model.parameter_count(model)
    if whole == "base":
        return MeasureResult(of / base, f"{written(of)} / {base:,}")
    return MeasureResult(of / (base + of), f"{written(of)} / ({base:,} + {written(of)})")


@measure("count")
def prefixes(model: Model, tokens: Positive, before: list[str] = ["k_proj", "v_proj"]) -> MeasureResult:
    """Number of parameters of prefix tuning: `tokens` vectors before the keys and before the values of every layer.

    before: names of the layers that compute keys and values (the last part of a path, e.g. `k_proj`). The vectors of a
    layer have the length of the layer's output.
    """
    return summed((tokens, layer.out_features) for layer in _layers(model, before))


@measure("count")
def bottlenecks(
    model: Model, size: Positive, after: list[str] | None = None, beside: list[str] | None = None, bias: bool = False
) -> MeasureResult:
    """Number of parameters of adapters: two linear layers with `size` features between them.

    after: layers with an adapter on their output. The adapter has the width of this output. beside: layers with an
    adapter in parallel, from the layer's inputs to the layer's outputs. A layer is named by its path, or by the last
    part of its path. bias: whether the two layers of an adapter have biases.
    """
    if not after and not beside:
        raise ValueError("`bottlenecks` needs `after` or `beside`")
    ends = [(layer.out_features, layer.out_features) for layer in _layers(model, after)]
    ends += [(layer.in_features, layer.out_features) for layer in _layers(model, beside)]
    biases = [width for _, last in ends for width in (size, last)] if bias else []
    return summed([*((size, first) for first, _ in ends), *((last, size) for _, last in ends), *((b,) for b in biases)])


@measure("count")
def linear_layers(sides: list[Sides], bias: bool = True) -> MeasureResult:
    """Number of parameters of linear layers with these numbers of inputs and outputs, with or without biases."""
    weights = [(inputs, outputs) for inputs, outputs in sides]
    return summed([*weights, *((outputs,) for _, outputs in weights if bias)])


@measure("count")
def vision_transformer(
    width: Positive, mlp: Positive, layers: Positive, patch: Positive, image: Positive
) -> MeasureResult:
    """Number of parameters of CLIP's vision tower: patches, positions, blocks and norms, without the text projection.

    width, mlp: numbers of features of a token, and inside an MLP. layers: number of blocks. patch, image: side of a
    patch, and of the image, in pixels.
    """
    tokens = (image // patch) ** 2 + 1
    block = 4 * (width**2 + width) + 2 * width * mlp + mlp + width + 4 * width
    ends = 3 * patch**2 * width + width + tokens * width + 4 * width
    return MeasureResult(layers * block + ends, f"{layers} x {block:,} + {ends:,} (patches, positions, norms)")


@measure("count")
def at_some_rank(of_rank_1: Quantity, to: Quantity, last: Quantity, fitted: bool = False) -> MeasureResult:
    """Number of parameters that is proportional to a rank, if the paper prints the number but not the rank.

    If no rank gives the printed number, the result is the number at the nearest rank. If some rank gives it, the result
    is a range over ranks, because a rank that is chosen to fit cannot confirm the figure. of_rank_1: the number at rank
    1. to: the printed number. last: one unit of the last digit of `to`. fitted: return the number at the nearest rank
    in both cases. With `fitted`, raises ValueError if one more rank adds less than 5 units of the last digit, because
    nearly any figure would then fit.
    """
    return of_some(Fraction(0), of_rank_1, to, last, fitted, "rank")


@measure("share")
def share_at_some_rank(of_rank_1: Quantity, to: Quantity, last: Quantity, fitted: bool = False) -> MeasureResult:
    """A share that is proportional to a rank, e.g. of a model's parameters, if the paper prints the share but not the rank.

    of_rank_1: the share at rank 1. to: the printed share. The result, `last` and `fitted` are as in `at_some_rank`.
    """
    return of_some(Fraction(0), of_rank_1, to, last, fitted, "rank")


def of_some(start: Fraction, step: Fraction, to: Fraction, last: Fraction, fitted: bool, what: str) -> MeasureResult:
    """Find the n among 1, 2, ... for which `start + n * step` is nearest to the figure `to`. Return a result for this n.

    If this nearest value does not round to the figure, the result is the nearest value. Otherwise the result is a range
    of values, because an n that is chosen to fit cannot confirm the figure. fitted: return the nearest value in both
    cases; raises ValueError if `step` is less than 5 times `last`. last: one unit of the figure's last digit. what: the
    word for n, e.g. `rank`.
    """
    nearest = max(1, round((to - start) / step))
    value = start + nearest * step
    before = f"{written(start)} + " if start else ""
    if fitted and step < _MIN_STEP * last:
        why = f"one more {what} adds {written(step)}, less than {_MIN_STEP} x {written(last)}: nearly any figure would fit"
        raise ValueError(why)
    gives = abs(value - to) * 2 <= last or 0 <= value - to < last  # rounded, or its digits cut
    if fitted or not gives:
        return MeasureResult(value, f"{what} {nearest}: {before}{nearest} x {written(step)}")
    how = f"{what} 1 to {nearest + 1}; the paper does not print it: {before}{written(step)} for each"
    return MeasureResult(start + step, how, most=value + step)


def _layers(model: str, names: list[str] | None) -> list[Any]:
    from reference.shared import layers

    return list(layers.targets(attached_model.model(model), names).values()) if names else []
