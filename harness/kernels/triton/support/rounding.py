"""Load and store 16-bit numbers in kernels that compute in float32.

Each number is rounded once, to nearest, with ties to even.
"""

from __future__ import annotations

import triton
import triton.language as tl

from harness.kernels.device import interpreted

# Triton's interpreter truncates float32 to bfloat16, misreads subnormal bfloat16 and computes with the bit pattern of
# bfloat16. Compiled code is correct, and has instructions for both conversions.
_CASTS_ARE_WRONG = tl.constexpr(interpreted())


@triton.jit
def to_float32(value):
    """Return `value` as float32, exactly. Every loaded bfloat16 must first pass through this function."""
    if _CASTS_ARE_WRONG and value.dtype == tl.bfloat16:
        bits = value.to(tl.uint16, bitcast=True).to(tl.uint32) << 16
        exact = bits.to(tl.float32, bitcast=True)
    else:
        exact = value.to(tl.float32)
    return exact


@triton.jit
def to_dtype(value, dtype: tl.constexpr):
    """Return a float32 `value` rounded to `dtype`, to nearest with ties to even. A NaN stays NaN."""
    if _CASTS_ARE_WRONG and dtype == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
        bits16 = tl.where(is_nan, (bits >> 16) | 0x40, nearest)
        rounded = bits16.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        rounded = value.to(dtype)
    return rounded


@triton.jit
def load_as_float32(pointer, mask=None, other=None):
    """Load numbers and return them as float32, converted by `to_float32`."""
    return to_float32(tl.load(pointer, mask=mask, other=other))


@triton.jit
def store_as(pointer, value, mask=None):
    """Round a float32 `value` to the dtype of `pointer` by `to_dtype`, and store it."""
    tl.store(pointer, to_dtype(value, pointer.dtype.element_ty), mask=mask)
