"""Measures: parameters of BART, an encoder-decoder, for which there are no shape presets."""

from __future__ import annotations

from collections import Counter
from typing import Any

from harness.claims.measure import Config, MeasureResult, Method, measure
from harness.claims.sums import summed, total

Shape = dict[str, int]
"""Arguments of transformers' BartConfig: `{d_model: 768, encoder_layers: 6, ...}`."""


@measure("count")
def bart_parameters(shape: Shape, only: list[str] | None = None) -> MeasureResult:
    """Parameters of BART without a head, tied ones once. only: substrings of the names of counted parameters."""

    sizes = Counter(
        tuple(p.shape) for name, p in _bart(shape).named_parameters() if not only or any(part in name for part in only)
    )
    return MeasureResult(total(sizes), f"{total(sizes):,} of the meta model's parameters")


@measure("count")
def bart_trainable_parameters(shape: Shape, method: Method, config: Config) -> MeasureResult:
    """Trainable parameters of a Method attached to BART."""
    from harness.conformance.subject import configure
    from harness.memory_model import counting

    with counting.attached(_bart(shape), method, configure(method, config)) as adapted:
        sizes = Counter(tuple(p.shape) for p in adapted.parameters())
    return summed(sizes)


def _bart(shape: Shape) -> Any:
    import torch
    from transformers import BartConfig, BartModel

    with torch.device("meta"):
        return BartModel(BartConfig(**shape)).requires_grad_(False)
