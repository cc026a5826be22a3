"""Measures: operations and bytes of one training step, counted on a shape without weights. Imports torch only when computed.

They rehearse what papers say of speed where there is no GPU. Time has no law of its own; where products of matrices fill
it, it grows with their operations: of N weights, a token takes 2 N in the forward pass and 4 N in the backward pass, half of
these for gradients of weights, which frozen ones have not. Not counted: what is no product of matrices (norms,
dequantisation, an optimizer's step), and what moves data.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Literal

from harness.claims.measure import Config, Count, MeasureResult, Method, Model, Positive, measure
from harness.claims.measures.arithmetic import written

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
    """Operations of all products of matrices in one training step, a multiplication and an addition each.

    Forward and backward of `batch` texts of so many tokens each, attention in full and a loss of every token included, the
    reference of the Method attached; with its own term of the loss (AdaLoRA's), without the optimizer's step.
    checkpointing: whether each block is computed again in the backward pass.
    """
    from harness.claims import meta_step

    asked = meta_step.step(model, method, config, tokens, batch, checkpointing=checkpointing)
    counts = meta_step.operations(asked)
    return MeasureResult(counts.whole, f"{counts.in_words()}, blocks after the first two, = {counts.whole:.4g}")


@measure("share")
def time_more_by_operations(of: Count, than: Count) -> MeasureResult:
    """By which share `of` takes longer than `than` by the law that time grows with operations, for numbers of these.

    From nothing, if time is spent on what both do alike, to what it is if products of matrices are all: what these alone
    would explain. It is no bound, since an optimizer's step, norms, dequantisation and what cards tell each other are not in
    it; and no time is measured.
    """
    more = of / than - 1
    ends = sorted((Fraction(0), more))
    how = f"{_rounded(of)} / {_rounded(than)} - 1 = {float(100 * more):+.3g}% if products of matrices fill the time"
    return MeasureResult(ends[0], f"{how}, 0 if they take none of it", ends[1])


@measure("bytes")
def kept_for_backward(
    model: Model, method: Method, tokens: Positive, batch: Positive = 1, config: Config = {}, dtype: DType = "float32"
) -> MeasureResult:
    """Bytes of tensors that autograd keeps from the forward for the backward pass, beside the model's parameters.

    Of `batch` texts of so many tokens each, without gradient checkpointing, attention written out, the reference of the
    Method attached.
    """
    from harness.claims import meta_step

    counts = meta_step.saved_bytes(meta_step.step(model, method, config, tokens, batch, dtype=dtype))
    return MeasureResult(
        counts.whole, f"{counts.in_words(' B')}, blocks after the first two, = {written(Fraction(counts.whole))} B"
    )


def _rounded(count: Fraction) -> str:
    return f"{float(count):.6g}"
