"""Timed Operations: linear layers with an adapter or a packed weight."""

from __future__ import annotations

from typing import Any

from harness.bench.costs import BLOCK, Cost, TimedOperation, low_rank, packed_bytes
from harness.bench.sizes import BenchSize

VERA = 16
"""VeRA's rank divided by LoRA's rank. If LoRA has the rank 16, VeRA has the rank 256."""
SEQUENCES, ADAPTERS = 8, 4
"""The batch of multi_lora_linear: its number of sequences, and the number of adapters that they share.

A batch of a single token has a single sequence.
"""


def _linear_case(s: BenchSize, **more: Any) -> dict[str, Any]:
    return {"shape": [s.E, s.D], "rows": [s.tokens], "bias": False, **more}


def _packed_linear() -> TimedOperation:
    cost = Cost(lambda s, i: packed_bytes(s) + i * s.tokens * (s.D + s.E), lambda s: (2 * s.tokens + 1) * s.weights)
    return TimedOperation(lambda s: _linear_case(s, block=BLOCK), cost, cost, per_token=True)


def _adapted_linear(*, times: int = 1, trains: str = "AB", norm: bool = False, packed: bool = False) -> TimedOperation:
    """Return the TimedOperation of a layer that computes x W^T plus a low-rank product.

    times: rank of the product divided by LoRA's rank. trains: `AB` if the factors A and B are trained, otherwise the
    names of the trained vectors. norm: True if the layer computes the row norms of W + s B A. The norms need the
    product W A^T, which takes (elements of W) x (rank) multiplications. packed: True if W is in 4 bits. Decoding takes
    one more multiplication per element.
    """

    def case(s: BenchSize) -> dict[str, Any]:
        return _linear_case(s, rank=s.rank * times, **({"block": BLOCK} if packed else {}))

    def weight_bytes(s: BenchSize, i: int) -> float:
        return packed_bytes(s) if packed else i * s.weights

    def forward_flops(s: BenchSize) -> float:
        rank = s.rank * times
        of_norm = 2 * s.weights * rank + 2 * s.weights if norm else 0
        return 2 * s.tokens * (s.weights + low_rank(s, rank)) + of_norm + s.weights * packed

    def backward_flops(s: BenchSize) -> float:
        # dx = dy W + dS A with dS = dy B. If A and B train, also dA = dS^T x and dB = dy^T S; otherwise two sums.
        low = 2 * s.tokens * low_rank(s, s.rank * times) * (2 if trains == "AB" else 1)
        return 2 * s.tokens * s.weights + low + s.weights * packed

    def forward_bytes(s: BenchSize, i: int) -> float:
        return weight_bytes(s, i) + i * (low_rank(s, s.rank * times) + s.tokens * (s.D + s.E))

    def backward_bytes(s: BenchSize, i: int) -> float:
        written = low_rank(s, s.rank) if trains == "AB" else s.E + s.rank * times
        read = low_rank(s, s.rank * times) + s.tokens * (s.D + s.E)  # A, B, x and dy are read
        return weight_bytes(s, i) + i * (read + written + s.tokens * s.D)

    forward, backward = Cost(forward_bytes, forward_flops), Cost(backward_bytes, backward_flops)
    return TimedOperation(case, forward, backward, per_token=True)


def _multi_lora_linear() -> TimedOperation:
    def case(s: BenchSize) -> dict[str, Any]:
        sequences = min(SEQUENCES, s.tokens)
        adapters = min(ADAPTERS, sequences)
        ids = [number % adapters for number in range(sequences)]
        return {"ids": ids, "ranks": [s.rank] * adapters, "shape": [s.D, s.E], "tokens": s.tokens // sequences}

    def adapters(s: BenchSize) -> int:
        return low_rank(s, s.rank) * min(ADAPTERS, s.tokens)

    def flops(s: BenchSize) -> float:
        return 2 * s.tokens * (s.weights + low_rank(s, s.rank))

    forward = Cost(lambda s, i: i * (s.weights + adapters(s) + s.tokens * (s.D + s.E)), flops)
    backward = Cost(  # gives the gradient of W too
        lambda s, i: i * (2 * s.weights + 2 * adapters(s) + s.tokens * (2 * s.D + s.E)), lambda s: 2 * flops(s)
    )
    return TimedOperation(case, forward, backward, per_token=True)


TIMED = {
    "nf4_linear": _packed_linear(),
    "lora_linear": _adapted_linear(),
    "nf4_lora_linear": _adapted_linear(packed=True),
    "dora_linear": _adapted_linear(norm=True),
    "vera_linear": _adapted_linear(times=VERA, trains="bd"),
    "multi_lora_linear": _multi_lora_linear(),
}
