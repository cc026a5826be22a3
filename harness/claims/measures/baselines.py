"""Measures: closed forms of baselines that no Method implements: adapters, prefixes, projectors. No torch."""

from __future__ import annotations

from fractions import Fraction
from typing import Annotated, Any, Literal

from pydantic import Field

from harness.claims import attached_model
from harness.claims.measure import MeasureResult, Model, Positive, Quantity, measure
from harness.claims.measures.arithmetic import written
from harness.claims.sums import summed

Sides = Annotated[list[Positive], Field(min_length=2, max_length=2)]
"""The sides of a matrix, e.g. `[1024, 4096]`."""
_MIN_STEP = 5
"""A rank is fitted only if one more rank changes a figure by at least this many units of its last digit."""


@measure("share")
def added_share(of: Quantity, model: Model, whole: Literal["base", "base+adapter"] = "base+adapter") -> MeasureResult:
    """Parameters added to a model, as a share of the model (`base`), or of the model with them (`base+adapter`)."""
    base = attached_model.parameter_count(model)
    if whole == "base":
        return MeasureResult(of / base, f"{written(of)} / {base:,}")
    return MeasureResult(of / (base + of), f"{written(of)} / ({base:,} + {written(of)})")


@measure("count")
def prefixes(model: Model, tokens: Positive, before: list[str] = ["k_proj", "v_proj"]) -> MeasureResult:
    """Parameters of prefix tuning: `tokens` trained vectors before the keys and the values of every layer.

    before: layers that compute keys and values, by the last parts of their paths. A vector is as long as their outputs.
    """
    return summed((tokens, layer.out_features) for layer in _layers(model, before))


@measure("count")
def bottlenecks(
    model: Model, size: Positive, after: list[str] | None = None, beside: list[str] | None = None, bias: bool = False
) -> MeasureResult:
    """Parameters of adapters with an inner width of `size`.

    after: layers with an adapter on their output; it has the width of this output. beside: layers with a parallel adapter
    from their inputs to their outputs. Both name layers by paths or by last parts of paths. bias: whether the two layers of
    an adapter have biases.
    """
    if not after and not beside:
        raise ValueError("`bottlenecks` needs `after` or `beside`")
    ends = [(layer.out_features, layer.out_features) for layer in _layers(model, after)]
    ends += [(layer.in_features, layer.out_features) for layer in _layers(model, beside)]
    biases = [width for _, last in ends for width in (size, last)] if bias else []
    return summed([*((size, first) for first, _ in ends), *((last, size) for _, last in ends), *((b,) for b in biases)])


@measure("count")
def linear_layers(sides: list[Sides], bias: bool = True) -> MeasureResult:
    """Parameters of linear layers with these sides (in, out), with or without biases."""
    weights = [(inputs, outputs) for inputs, outputs in sides]
    return summed([*weights, *((outputs,) for _, outputs in weights if bias)])


@measure("count")
def vision_transformer(
    width: Positive, mlp: Positive, layers: Positive, patch: Positive, image: Positive
) -> MeasureResult:
    """Parameters of CLIP's vision tower, without its projection to the text: patches, positions, blocks and three norms."""
    tokens = (image // patch) ** 2 + 1
    block = 4 * (width**2 + width) + 2 * width * mlp + mlp + width + 4 * width
    ends = 3 * patch**2 * width + width + tokens * width + 4 * width
    return MeasureResult(layers * block + ends, f"{layers} x {block:,} + {ends:,} (patches, positions, norms)")


@measure("count")
def at_some_rank(of_rank_1: Quantity, to: Quantity, last: Quantity, fitted: bool = False) -> MeasureResult:
    """Parameters if the rank is not printed: a range over ranks if a whole rank gives `to`, else those of the nearest rank.

    last: a unit in the last digit of `to`. fitted: take the nearest rank as if it were printed; raises ValueError if one
    more rank adds less than 5 units of the last digit, because nearly any figure would then fit.
    """
    return of_some(Fraction(0), of_rank_1, to, last, fitted, "rank")


@measure("share")
def share_at_some_rank(of_rank_1: Quantity, to: Quantity, last: Quantity, fitted: bool = False) -> MeasureResult:
    """A share, e.g. of a model's parameters, if the rank is not printed; see `at_some_rank`."""
    return of_some(Fraction(0), of_rank_1, to, last, fitted, "rank")


def of_some(start: Fraction, step: Fraction, to: Fraction, last: Fraction, fitted: bool, what: str) -> MeasureResult:
    """Return the value among `start + n * step` (n = 1, 2, ...) that is nearest to `to`.

    If this value gives the figure `to`, return a range of values, because an n that is fitted to the figure cannot confirm
    it. If no n gives the figure, the figure is wrong. fitted, ValueError: as in `at_some_rank`. what: name of a step.
    """
    nearest = max(1, round((to - start) / step))
    value = start + nearest * step
    before = f"{written(start)} + " if start else ""
    if fitted and step < _MIN_STEP * last:
        why = f"one more {what} is {written(step)}, less than {_MIN_STEP} x {written(last)}; nearly any figure has one"
        raise ValueError(why)
    gives = abs(value - to) * 2 <= last or 0 <= value - to < last  # rounded, or its digits cut
    if fitted or not gives:
        return MeasureResult(value, f"{what} {nearest}: {before}{nearest} x {written(step)}")
    how = f"{what} 1 to {nearest + 1}; the paper does not print it: {before}{written(step)} for each"
    return MeasureResult(start + step, how, most=value + step)


def _layers(model: str, names: list[str] | None) -> list[Any]:
    from reference.shared import layers

    return list(layers.targets(attached_model.model(model), names).values()) if names else []
