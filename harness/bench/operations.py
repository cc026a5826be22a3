"""The Operations that are timed: what their arguments are drawn from, and their least bytes and FLOPs. No torch.

Bytes: every input read once and every output written once, in its own dtype. FLOPs: a multiplication and an addition are
two; a comparison is none. `i` is the bytes of an element of the case's dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from harness.bench.sizes import BenchSize

BLOCK = 64
"""Elements that share an absmax in NF4 and FP4: bitsandbytes' default."""
BLOCK8 = 256
"""The same in 8 bits."""
VERA, GALORE = 16, 8
"""VeRA's rank and GaLore's as multiples of LoRA's: 256 and 128."""
SEQUENCES, ADAPTERS = 8, 4


@dataclass(frozen=True)
class Cost:
    """bytes: (size, i) -> bytes moved at least. flops: size -> floating-point operations at least."""

    bytes: Callable[[BenchSize, int], float]
    flops: Callable[[BenchSize], float]


@dataclass(frozen=True)
class TimedOperation:
    """An Operation as it is timed.

    case: size -> what the Operation's `arguments` takes. forward: of the call; backward: of what a training step adds, None
    where nothing is differentiated. per_token: whether the number of tokens matters.
    """

    case: Callable[[BenchSize], dict[str, Any]]
    forward: Cost
    backward: Cost | None = None
    per_token: bool = False


def _packed(s: BenchSize) -> float:
    return s.weights * (0.5 + 4 / BLOCK)


def _low_rank(s: BenchSize, rank: int) -> int:
    return rank * (s.D + s.E)


def _linear(s: BenchSize, **more: Any) -> dict[str, Any]:
    return {"shape": [s.E, s.D], "rows": [s.tokens], "bias": False, **more}


def _adapted(
    weight: Callable[[BenchSize, int], float],
    times: int = 1,
    trains: str = "AB",
    norm: bool = False,
    decoded: bool = False,
) -> tuple[Cost, Cost]:
    """Return the costs of x W^T plus a low-rank product. times: its rank over LoRA's. trains: AB, or vectors alone.

    norm: whether the row norms of W + s B A are needed, by way of W A^T (E x D x R products). decoded: whether each element
    of W is a multiplication more.
    """

    def forward_flops(s: BenchSize) -> float:
        rank = s.rank * times
        of_norm = 2 * s.weights * rank + 2 * s.weights if norm else 0
        return 2 * s.tokens * (s.weights + _low_rank(s, rank)) + of_norm + s.weights * decoded

    def backward_flops(s: BenchSize) -> float:
        rank = s.rank * times
        # dx = dy W + dS A and dS = dy B; with A and B trained dA = dS^T x and dB = dy^T S besides, else two sums.
        low = 2 * s.tokens * _low_rank(s, rank) * (2 if trains == "AB" else 1)
        return 2 * s.tokens * s.weights + low + s.weights * decoded

    def forward_bytes(s: BenchSize, i: int) -> float:
        return weight(s, i) + i * (_low_rank(s, s.rank * times) + s.tokens * (s.D + s.E))

    def backward_bytes(s: BenchSize, i: int) -> float:
        written = _low_rank(s, s.rank) if trains == "AB" else s.E + s.rank * times
        read = _low_rank(s, s.rank * times) + s.tokens * (s.D + s.E)  # A and B, x and dy
        return weight(s, i) + i * (read + written + s.tokens * s.D)

    return Cost(forward_bytes, forward_flops), Cost(backward_bytes, backward_flops)


def _dense(s: BenchSize, i: int) -> float:
    return i * s.weights


def _four_bit() -> TimedOperation:
    cost = Cost(lambda s, i: s.weights * i + _packed(s), lambda s: s.weights)
    return TimedOperation(lambda s: {"shape": [s.E, s.D], "block": BLOCK}, cost)


def _galore() -> TimedOperation:
    def small(s: BenchSize) -> int:  # R, and so M and V: the longer side is not projected
        return s.rank * GALORE * max(s.E, s.D)

    return TimedOperation(
        lambda s: {"shape": [s.E, s.D], "rank": s.rank * GALORE},
        Cost(
            lambda s, i: i * (3 * s.weights + s.rank * GALORE * min(s.E, s.D) + 4 * small(s)),
            lambda s: 4 * s.weights * s.rank * GALORE + 2 * s.weights + 12 * small(s),
        ),
    )


def _several() -> TimedOperation:
    """Return a batch of eight sequences that share four adapters; of one token, one sequence and one adapter."""

    def case(s: BenchSize) -> dict[str, Any]:
        sequences = min(SEQUENCES, s.tokens)
        adapters = min(ADAPTERS, sequences)
        ids = [number % adapters for number in range(sequences)]
        return {"ids": ids, "ranks": [s.rank] * adapters, "shape": [s.D, s.E], "tokens": s.tokens // sequences}

    def adapters(s: BenchSize) -> int:
        return _low_rank(s, s.rank) * min(ADAPTERS, s.tokens)

    return TimedOperation(
        case,
        Cost(
            lambda s, i: i * (s.weights + adapters(s) + s.tokens * (s.D + s.E)),
            lambda s: 2 * s.tokens * (s.weights + _low_rank(s, s.rank)),
        ),
        Cost(  # W trains too
            lambda s, i: i * (2 * s.weights + 2 * adapters(s) + s.tokens * (2 * s.D + s.E)),
            lambda s: 4 * s.tokens * (s.weights + _low_rank(s, s.rank)),
        ),
        per_token=True,
    )


def _importance() -> TimedOperation:
    def numbers(s: BenchSize) -> int:
        return _low_rank(s, s.rank) + s.rank

    return TimedOperation(
        lambda s: {"shape": [s.E, s.D], "rank": s.rank},
        # Parameters and gradients in the dtype; the averages, read and written, in at least float32.
        Cost(lambda s, i: numbers(s) * (2 * i + 4 * max(4, i)) + s.rank * max(4, i), lambda s: 11 * numbers(s)),
    )


def _constants(s: BenchSize) -> int:
    return s.weights // BLOCK


OPERATIONS: dict[str, TimedOperation] = {
    "nf4_quantize": _four_bit(),
    "nf4_dequantize": _four_bit(),
    "fp4_quantize": _four_bit(),
    "fp4_dequantize": _four_bit(),
    "dynamic_quantize": TimedOperation(
        lambda s: {"numel": s.weights, "block": BLOCK8},
        Cost(lambda s, i: s.weights * (i + 1 + 4 / BLOCK8), lambda s: s.weights),
    ),
    "double_quantize": TimedOperation(
        lambda s: {"blocks": _constants(s), "block": BLOCK8, "spread": 0.05},
        Cost(lambda s, _: _constants(s) * (5 + 4 / BLOCK8), lambda s: 3 * _constants(s)),
    ),
    "double_dequantize": TimedOperation(
        lambda s: {"blocks": _constants(s), "block": BLOCK8, "spread": 0.05},
        Cost(lambda s, _: _constants(s) * (5 + 4 / BLOCK8), lambda s: 2 * _constants(s)),
    ),
    "nf4_linear": TimedOperation(
        lambda s: _linear(s, block=BLOCK),
        Cost(lambda s, i: _packed(s) + i * s.tokens * (s.D + s.E), lambda s: (2 * s.tokens + 1) * s.weights),
        Cost(lambda s, i: _packed(s) + i * s.tokens * (s.D + s.E), lambda s: (2 * s.tokens + 1) * s.weights),
        per_token=True,
    ),
    "lora_linear": TimedOperation(lambda s: _linear(s, rank=s.rank), *_adapted(_dense), per_token=True),
    "nf4_lora_linear": TimedOperation(
        lambda s: _linear(s, rank=s.rank, block=BLOCK), *_adapted(lambda s, _: _packed(s), decoded=True), per_token=True
    ),
    "dora_linear": TimedOperation(lambda s: _linear(s, rank=s.rank), *_adapted(_dense, norm=True), per_token=True),
    "vera_linear": TimedOperation(
        lambda s: _linear(s, rank=s.rank * VERA), *_adapted(_dense, times=VERA, trains="bd"), per_token=True
    ),
    "multi_lora_linear": _several(),
    "galore_step": _galore(),
    "adamw8bit_step": TimedOperation(
        lambda s: {"shape": [s.E, s.D]},
        Cost(lambda s, i: s.weights * (3 * i + 4 + 16 / BLOCK8), lambda s: 15 * s.weights),
    ),
    "adalora_importance": _importance(),
    "paged_adamw": TimedOperation(  # three steps over one parameter of the weight's size and one of a bias'
        lambda s: {"sizes": [s.weights, s.E]},
        Cost(lambda s, i: 3 * 7 * i * (s.weights + s.E), lambda s: 3 * 12 * (s.weights + s.E)),
    ),
}
"""Operation -> how it is timed. An Operation without an entry is told of as not timed."""
