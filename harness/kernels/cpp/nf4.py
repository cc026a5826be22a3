"""Calls of the C++ kernels for NF4. Each returns whether a kernel ran, or its result; the caller falls back on torch."""

from __future__ import annotations

from ctypes import c_int, c_int64, c_void_p
from functools import cache
from typing import TypeAlias

import torch
from torch import Tensor

from harness.kernels.cpp.library import library_for
from harness.kernels.dynamic_map_format import dynamic_map
from harness.kernels.nf4_format import check_second_sizes, check_sizes, levels
from harness.kernels.real_tensors import real_tensors

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_PIECE = 64
"""Number of values that `multiply` decodes at a time. Rows and blocks must be multiples of it."""
_ROWS = 4
"""Largest number of rows for which `multiply` is faster than decoding the matrix and multiplying by it."""
_FEW = 1 << 14
"""Number of values up to which one thread is faster than several."""

Constants: TypeAlias = tuple[Tensor, Tensor | None, Tensor | None, int]
"""The tensors (absmax, absmax2, offset) of a packed weight, and the block of double quantisation.

Without double quantisation, absmax is float32, and absmax2 and offset are None. With it, absmax holds 8-bit codes.
"""


def encode(values: Tensor, packed: Tensor, absmax: Tensor, block: int) -> bool:
    """Write the packed codes and the absmax of `values`, and return True. Return False if no kernel can do so.

    values: (n,), any floating dtype, read as float32. packed: uint8 (ceil(n / 2),). absmax: float32 (ceil(n / block),).
    """
    library = None if block % 2 else library_for(values, packed, absmax)
    if library is None:
        return False
    if values.dtype not in _DTYPES:
        values = values.float()
    count = values.numel()
    library.nf4_encode(
        _at(values), _at(_midpoints()), _at(packed), _at(absmax), c_int64(count), c_int64(block),
        _DTYPES[values.dtype], _threads(count),
    )  # fmt: skip
    _written(packed, absmax)
    return True


def decode(packed: Tensor, constants: Constants, out: Tensor, block: int) -> bool:
    """Write the values of a packed weight to `out`, and return True. Return False if no kernel can do so.

    packed: uint8 (ceil(n / 2),). out: n values, in any shape.
    """
    if block % 2 or out.dtype not in _DTYPES or packed.dtype != torch.uint8 or not _fit(constants):
        return False
    library = library_for(packed, out, *_given(constants))
    if library is None:
        return False
    count = out.numel()
    library.nf4_decode(
        _at(packed), *_pointers(constants), _at(levels()), _at(out), c_int64(count), c_int64(block),
        _DTYPES[out.dtype], _threads(count),
    )  # fmt: skip
    _written(out)
    return True


def decode_constants(constants: Constants, out: Tensor) -> bool:
    """Write the absmax that double quantisation encoded to `out`, float32. Return False if no kernel can do so."""
    library = library_for(out, *_given(constants)) if _fit(constants) else None
    if library is None:
        return False
    count = out.numel()
    library.double_decode(*_pointers(constants), _at(out), c_int64(count), _threads(count))
    _written(out)
    return True


def multiply(
    x: Tensor, packed: Tensor, constants: Constants, block: int, shape: tuple[int, int], bias: Tensor | None
) -> Tensor | None:
    """Return x W^T + bias (T, E) for a few rows x (T, D), without decoding the whole W. Return None if no kernel can.

    shape: (E, D). The values of W are rounded to the dtype of x, and the products are summed in float32.
    """
    E, D = shape
    if x.dim() != 2 or not 0 < len(x) <= _ROWS or x.shape[1] != D or x.dtype not in _DTYPES:
        return None
    if bias is not None and (bias.dtype != x.dtype or bias.shape != (E,)):
        return None
    if D % _PIECE or block % _PIECE or packed.dtype != torch.uint8 or not _fit(constants):
        return None
    absmax, absmax2, offset, block2 = constants
    check_sizes(packed, absmax, block, shape)
    if absmax2 is not None and offset is not None:
        check_second_sizes(absmax, absmax2, offset, block2)
    rows, bias = x.detach().contiguous(), None if bias is None else bias.detach()
    library = library_for(rows, packed, *_given(constants), *([] if bias is None else [bias]))
    if library is None:
        return None
    rows = rows.float()
    y = torch.empty(len(x), E, dtype=x.dtype, device="cpu")
    library.nf4_multiply(
        _at(rows), len(x), _at(packed), *_pointers(constants), _at(levels()), None if bias is None else _at(bias), _at(y),
        c_int64(E), c_int64(D), c_int64(block), _DTYPES[x.dtype], _threads(E * D),
    )  # fmt: skip
    return y


@cache
def _midpoints() -> Tensor:
    """Return the 15 numbers halfway between two levels, float32. A value above one of them gets a higher code."""
    with real_tensors():
        return (levels()[:-1] + levels()[1:]) / 2


def _given(constants: Constants) -> list[Tensor]:
    return [tensor for tensor in constants[:3] if tensor is not None]


def _fit(constants: Constants) -> bool:
    """Return whether the constants have the dtypes that the kernels read."""
    absmax, *second = constants[:3]
    if any(tensor is None for tensor in second):
        return absmax.dtype == torch.float32
    return absmax.dtype == torch.uint8 and all(t is not None and t.dtype == torch.float32 for t in second)


def _pointers(constants: Constants) -> tuple[c_void_p | c_int64 | None, ...]:
    absmax, absmax2, offset, block2 = constants
    if absmax2 is None or offset is None:
        return _at(absmax), None, None, None, c_int64(1)
    return _at(absmax), _at(absmax2), _at(dynamic_map(absmax.device)), _at(offset), c_int64(block2)


def _at(tensor: Tensor) -> c_void_p:
    return c_void_p(tensor.data_ptr())


def _threads(values: int) -> c_int:
    return c_int(1 if values <= _FEW else torch.get_num_threads())


def _written(*tensors: Tensor) -> None:
    """Tell autograd that the tensors have new values."""
    for tensor in tensors:
        if not tensor.is_inference():
            torch.autograd.graph.increment_version(tensor)
