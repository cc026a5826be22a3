"""Measures: operations and bytes of one training step, counted on a model without weights.

These counts stand in for measurements of speed on a GPU. If matrix products dominate, time is proportional to their
operations. With N weights, a token takes 2 N operations in the forward pass and 4 N in the backward pass. Of the 4 N,
half compute the gradients of weights, which frozen weights do not need. Other operations (norms, dequantisation, an
optimizer's step) and data movement are not counted. Imports torch only when a measure is computed.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Literal

from harness.claims.measure import Config, Count, MeasureResult, Method, Model, Positive, measure

DType = Literal["float32", "bfloat16", "float16"]


@measure("count")
def training_operations(
    model: Model,
    method: Method,
    tokens: Positive,
    batch: Positive = 1,
    config: Config = {},
    checkpointing: bool = False,
) -> MeasureResult:
    """Operations (multiplications and additions) of all matrix products in one training step.

    The step is a forward and a backward pass over `batch` texts of `tokens` tokens, with the Method's reference
    attached. The attention is full, and every token has a loss. The loss includes the Method's own term, e.g. AdaLoRA's
    regularizer. The optimizer's step is not included. checkpointing: whether the backward pass computes each block
    again.
    """
    from harness.claims import meta_step

    step = meta_step.step(model, method, config, tokens, batch, checkpointing=checkpointing)
    counts = meta_step.operations(step)
    return MeasureResult(counts.whole, f"{counts.in_words()}, two blocks and each further one, = {counts.whole:.4g}")


@measure("share")
def time_more_by_operations(of: Count, than: Count) -> MeasureResult:
    """Relative increase in time, `of` / `than` - 1, if time is proportional to operations. of, than: operations.

    The result is a range. One end is the increase in operations, as if matrix products took all the time. The other end
    is 0, as if both steps spent all their time on equal other work. The true increase may lie outside of the range: an
    optimizer's step, norms, dequantisation and communication are not included, and no time is measured.
    """
    more = of / than - 1
    ends = sorted((Fraction(0), more))
    how = f"{float(of):.6g} / {float(than):.6g} - 1 = {float(100 * more):+.3g}% if matrix products take all the time"
    return MeasureResult(ends[0], f"{how}, 0 if they take no time", ends[1])


@measure("bytes")
def kept_for_backward(
    model: Model, method: Method, tokens: Positive, batch: Positive = 1, config: Config = {}, dtype: DType = "float32"
) -> MeasureResult:
    """Bytes of tensors that autograd saves for the backward pass, without the model's parameters.

    The step has `batch` texts of `tokens` tokens, with the Method's reference attached. Attention is computed by
    explicit matrix products. There is no gradient checkpointing.
    """
    from harness.claims import meta_step

    counts = meta_step.saved_bytes(meta_step.step(model, method, config, tokens, batch, dtype=dtype))
    how = f"{counts.in_words(' B')}, two blocks and each further one, = {counts.whole:,} B"
    return MeasureResult(counts.whole, how)
