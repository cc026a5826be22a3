"""Timed Operations: steps of optimizers, and AdaLoRA's importance scores."""

from __future__ import annotations

from harness.bench.costs import BLOCK8, Cost, TimedOperation, low_rank
from harness.bench.sizes import BenchSize

GALORE = 8
"""GaLore's rank divided by LoRA's rank. If LoRA has the rank 16, GaLore has the rank 128."""


def _galore_step() -> TimedOperation:
    def moment(s: BenchSize) -> int:  # elements of R, M and V; the longer side is not projected
        return s.rank * GALORE * max(s.E, s.D)

    return TimedOperation(
        lambda s: {"shape": [s.E, s.D], "rank": s.rank * GALORE},
        Cost(
            lambda s, i: i * (3 * s.weights + s.rank * GALORE * min(s.E, s.D) + 4 * moment(s)),
            lambda s: 4 * s.weights * s.rank * GALORE + 2 * s.weights + 12 * moment(s),
        ),
    )


def _adalora_importance() -> TimedOperation:
    def parameters(s: BenchSize) -> int:
        return low_rank(s, s.rank) + s.rank

    return TimedOperation(
        lambda s: {"shape": [s.E, s.D], "rank": s.rank},
        # Parameters and gradients are in the dtype. The averages, read and written, are in at least float32.
        Cost(lambda s, i: parameters(s) * (2 * i + 4 * max(4, i)) + s.rank * max(4, i), lambda s: 11 * parameters(s)),
    )


TIMED = {
    "galore_step": _galore_step(),
    "adamw8bit_step": TimedOperation(
        lambda s: {"shape": [s.E, s.D]},
        Cost(lambda s, i: s.weights * (3 * i + 4 + 16 / BLOCK8), lambda s: 15 * s.weights),
    ),
    "adalora_importance": _adalora_importance(),
    "paged_adamw": TimedOperation(  # three steps over one parameter of the weight's size and one of a bias's size
        lambda s: {"sizes": [s.weights, s.E]},
        Cost(lambda s, i: 3 * 7 * i * (s.weights + s.E), lambda s: 3 * 12 * (s.weights + s.E)),
    ),
}
