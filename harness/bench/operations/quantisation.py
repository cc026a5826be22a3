"""Timed Operations: quantisation to 4 and 8 bits, and back."""

from __future__ import annotations

from harness.bench.costs import BLOCK, BLOCK8, Cost, TimedOperation, packed_bytes
from harness.bench.sizes import BenchSize

_FOUR_BIT = TimedOperation(
    lambda s: {"shape": [s.E, s.D], "block": BLOCK},
    Cost(lambda s, i: s.weights * i + packed_bytes(s), lambda s: s.weights),
)


def _constants(s: BenchSize) -> int:
    return s.weights // BLOCK


def _double(flops: int) -> TimedOperation:
    """Return the TimedOperation of double quantisation, which quantises or decodes the absmax values of a weight.

    flops: number of FLOPs per absmax value.
    """
    return TimedOperation(
        lambda s: {"blocks": _constants(s), "block": BLOCK8, "spread": 0.05},
        Cost(lambda s, _: _constants(s) * (5 + 4 / BLOCK8), lambda s: flops * _constants(s)),
    )


TIMED = {
    "nf4_quantize": _FOUR_BIT,
    "nf4_dequantize": _FOUR_BIT,
    "fp4_quantize": _FOUR_BIT,
    "fp4_dequantize": _FOUR_BIT,
    "dynamic_quantize": TimedOperation(
        lambda s: {"numel": s.weights, "block": BLOCK8},
        Cost(lambda s, i: s.weights * (i + 1 + 4 / BLOCK8), lambda s: s.weights),
    ),
    "double_quantize": _double(3),
    "double_dequantize": _double(2),
}
