"""`bitsandbytes`: 4-bit base weights, and its quantisers, its 4-bit layer and its optimizers as Operations."""

from __future__ import annotations

from harness.methods.implementations.bitsandbytes.layer import nf4_linear
from harness.methods.implementations.bitsandbytes.optimizers import (
    adamw8bit_step,
    paged_8bit_states,
    paged_adamw,
    paged_adamw8bit_step,
    paged_states,
)
from harness.methods.implementations.bitsandbytes.quantisers import (
    double_dequantize,
    double_quantize,
    dynamic_quantize,
    fp4_dequantize,
    fp4_quantize,
    nf4_dequantize,
    nf4_quantize,
)
from harness.methods.implementations.bitsandbytes.weights import nf4, nf4_dq
from harness.methods.registry import Implementation


def implementations() -> list[Implementation]:
    """Return the Implementations of this package. They import bitsandbytes and torch on their first call."""
    return [one for one in globals().values() if isinstance(one, Implementation)]


__all__ = [
    "adamw8bit_step",
    "double_dequantize",
    "double_quantize",
    "dynamic_quantize",
    "fp4_dequantize",
    "fp4_quantize",
    "implementations",
    "nf4",
    "nf4_dequantize",
    "nf4_dq",
    "nf4_linear",
    "nf4_quantize",
    "paged_8bit_states",
    "paged_adamw",
    "paged_adamw8bit_step",
    "paged_states",
]
