"""Timed Operations: blocks of several layers with LoRA. This module imports no torch."""

from __future__ import annotations

from typing import Any

from harness.bench.costs import Cost, TimedOperation
from harness.bench.sizes import BenchSize

GROUPS = 4
"""Number of query heads that share a key and a value, as in Llama 3."""
EXPERTS, CHOSEN = 8, 2
"""Number of experts of a mixture, and number of experts that each token chooses.

An expert has an eighth of the layer's output features, so that all experts together are as large as a dense MLP.
"""


def _outputs(s: BenchSize, *, qkv: bool) -> list[tuple[int, int]]:
    """Return (output features E, input features D) of each layer of the block.

    qkv: True for the query, key and value layers, False for the MLP. s: size of the query layer, or of the MLP's gate
    layer.
    """
    if qkv:
        return [(s.E, s.D), *[(max(1, s.E // GROUPS), s.D)] * 2]
    return [(s.E, s.D), (s.E, s.D), (s.D, s.E)]


def _block(*, qkv: bool) -> TimedOperation:
    def case(s: BenchSize) -> dict[str, Any]:
        more = {"groups": GROUPS} if qkv else {}
        return {"shape": [s.E, s.D], "rows": [1, s.tokens], "ranks": [s.rank] * 3, "bias": False, **more}

    def weights(s: BenchSize) -> int:
        return sum(E * D for E, D in _outputs(s, qkv=qkv))

    def factors(s: BenchSize) -> int:
        return sum(s.rank * (E + D) for E, D in _outputs(s, qkv=qkv))

    def activations(s: BenchSize) -> int:
        """Return the number of elements of the block's input x and of its outputs."""
        return s.tokens * (s.D + (sum(E for E, _ in _outputs(s, qkv=qkv)) if qkv else s.D))

    forward = Cost(
        lambda s, i: i * (weights(s) + factors(s) + activations(s)),
        lambda s: 2 * s.tokens * (weights(s) + factors(s)),
    )
    backward = Cost(  # gives dx, and the gradients of A and B
        lambda s, i: i * (weights(s) + 2 * factors(s) + activations(s) + s.tokens * s.D),
        lambda s: 2 * s.tokens * (weights(s) + 2 * factors(s)),
    )
    return TimedOperation(case, forward, backward, per_token=True)


def _experts() -> TimedOperation:
    def hidden(s: BenchSize) -> int:
        return max(1, s.E // EXPERTS)

    def case(s: BenchSize) -> dict[str, Any]:
        sizes = {"shape": [s.D, hidden(s)], "rank": s.rank, "tokens": s.tokens}
        return {**sizes, "experts": EXPERTS, "chosen": CHOSEN}

    def weights(s: BenchSize) -> int:
        """Return the number of weights of one expert: gate, up and down projection."""
        return 3 * hidden(s) * s.D

    def factors(s: BenchSize) -> int:
        """Return the number of elements of LoRA's factors of one expert. Gate and up projection share their A."""
        return s.rank * (2 * s.D + 3 * hidden(s))

    def used(s: BenchSize) -> int:
        return min(EXPERTS, s.tokens * CHOSEN)

    def routing_bytes(s: BenchSize, i: int) -> int:
        return s.tokens * CHOSEN * (i + 8)  # a routing weight and an int64 expert index

    def flops(s: BenchSize, times_factors: int) -> float:
        return 2 * s.tokens * CHOSEN * (weights(s) + times_factors * factors(s) + s.D)

    forward = Cost(
        lambda s, i: i * (used(s) * (weights(s) + factors(s)) + 2 * s.tokens * s.D) + routing_bytes(s, i),
        lambda s: flops(s, 1),
    )
    backward = Cost(  # gives dx, and the gradients of A, B and the routing weights; unused experts get zeros
        lambda s, i: (
            i * (used(s) * (weights(s) + factors(s)) + EXPERTS * factors(s) + s.tokens * (3 * s.D + CHOSEN))
            + routing_bytes(s, i)
        ),
        lambda s: flops(s, 2),
    )
    return TimedOperation(case, forward, backward, per_token=True)


TIMED = {"lora_qkv": _block(qkv=True), "lora_mlp": _block(qkv=False), "lora_experts": _experts()}
