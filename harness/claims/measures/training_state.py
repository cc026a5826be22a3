"""Measures: bytes of weights, gradients and Adam's moments in training."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from harness.claims import attached_model
from harness.claims.measure import Config, MeasureResult, Method, Model, measure
from harness.claims.measures.parameters import Split
from harness.claims.sums import total

Each = Annotated[int, Field(ge=0)]
"""A parameter that is a number of bytes per element; 0 for elements that are not stored or not counted."""


@measure("bytes")
def adam_training(
    model: Model,
    method: Method,
    config: Config = {},
    split: Split = {},
    weight: Each = 2,
    gradient: Each = 2,
    moment: Each = 2,
) -> MeasureResult:
    """Bytes of a model's weights, and of the gradients and Adam's two moments of the parameters that a Method trains.

    weight, gradient, moment: bytes per number. The Method `full` trains all parameters, and `frozen` trains none.
    """
    own = attached_model.parameters(model)
    trained = attached_model.trained(model, method, config, split)
    trains = total(trained.values())
    weights = attached_model.parameter_count(model) + total(trained[name] for name in trained.keys() - own.keys())
    how = f"{weight} B x {weights:,} + ({gradient} + 2 x {moment}) B x {trains:,}"
    return MeasureResult(weight * weights + (gradient + 2 * moment) * trains, how)


@measure("bytes")
def full_finetuning_of_unknown_precision(model: Model) -> MeasureResult:
    """Bytes of weights, gradients and Adam's moments in full fine-tuning, if the paper does not state the precision.

    The result is a range. The least value is 6 bytes per parameter: weights and two moments in 16 bits, and gradients
    that are freed after use. The largest value is 16 bytes per parameter, as in mixed precision: weights and gradients
    in 16 bits; master weights and two moments in 32 bits (arXiv:1910.02054, section 3.1).
    """
    count = attached_model.parameter_count(model)
    least, most = 2 + 2 * 2, 2 + 2 + 4 + 2 * 4
    return MeasureResult(least * count, f"(2 + 2 x 2) B to (2 + 2 + 4 + 2 x 4) B x {count:,}", most=most * count)
