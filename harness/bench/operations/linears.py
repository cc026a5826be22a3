"""Linear layers with an adapter or a packed weight."""

from __future__ import annotations

from typing import Any

from harness.bench.costs import (
    BLOCK,
    Cost,
    TimedOperation,
    adapted_linear,
    dense_bytes,
    linear_case,
    low_rank,
    packed_bytes,
)
from harness.bench.sizes import BenchSize

VERA = 16
"""VeRA's rank as a multiple of LoRA's: 256."""
SEQUENCES, ADAPTERS = 8, 4
"""The batch of multi_lora_linear: eight sequences that share four adapters; one of each for a single token."""


def _packed_linear() -> TimedOperation:
    cost = Cost(lambda s, i: packed_bytes(s) + i * s.tokens * (s.D + s.E), lambda s: (2 * s.tokens + 1) * s.weights)
    return TimedOperation(lambda s: linear_case(s, block=BLOCK), cost, cost, per_token=True)


def _multi_lora_linear() -> TimedOperation:
    def case(s: BenchSize) -> dict[str, Any]:
        sequences = min(SEQUENCES, s.tokens)
        adapters = min(ADAPTERS, sequences)
        ids = [number % adapters for number in range(sequences)]
        return {"ids": ids, "ranks": [s.rank] * adapters, "shape": [s.D, s.E], "tokens": s.tokens // sequences}

    def adapters(s: BenchSize) -> int:
        return low_rank(s, s.rank) * min(ADAPTERS, s.tokens)

    return TimedOperation(
        case,
        Cost(
            lambda s, i: i * (s.weights + adapters(s) + s.tokens * (s.D + s.E)),
            lambda s: 2 * s.tokens * (s.weights + low_rank(s, s.rank)),
        ),
        Cost(  # W trains too
            lambda s, i: i * (2 * s.weights + 2 * adapters(s) + s.tokens * (2 * s.D + s.E)),
            lambda s: 4 * s.tokens * (s.weights + low_rank(s, s.rank)),
        ),
        per_token=True,
    )


TIMED = {
    "nf4_linear": _packed_linear(),
    "lora_linear": TimedOperation(lambda s: linear_case(s, rank=s.rank), *adapted_linear(dense_bytes), per_token=True),
    "nf4_lora_linear": TimedOperation(
        lambda s: linear_case(s, rank=s.rank, block=BLOCK),
        *adapted_linear(lambda s, _: packed_bytes(s), decoded=True),
        per_token=True,
    ),
    "dora_linear": TimedOperation(
        lambda s: linear_case(s, rank=s.rank), *adapted_linear(dense_bytes, norm=True), per_token=True
    ),
    "vera_linear": TimedOperation(
        lambda s: linear_case(s, rank=s.rank * VERA),
        *adapted_linear(dense_bytes, times=VERA, trains="bd"),
        per_token=True,
    ),
    "multi_lora_linear": _multi_lora_linear(),
}
