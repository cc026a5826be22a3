"""Adam's moments M and V of a projected gradient R in GaLore, in R's dtype or 8 bits (arXiv:2403.03507, section 4.3).

8-bit moments have the format of reference/operations/adamw8bit: codes of the dynamic map, with an absmax per block of
256 elements. They are decoded before a step and encoded after it. The state uses GaLore's names, e.g. M instead of m.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from reference.operations import adamw8bit
from reference.operations.dynamic_map import dynamic_map, quantize_blockwise

_SIGNED = {"M": True, "V": False}


def zeros(R: Tensor, bits: int) -> dict[str, Tensor]:
    """Return the moments M and V before the first step. With 32 bits, both are zeros of R's shape and dtype.

    With 8 bits and at least 4096 elements, both are flat uint8 codes. M_absmax and V_absmax then hold one float32 per
    block. With 8 bits and fewer elements, both are zeros of R's shape in float32, or in float64 for a float64 R.
    """
    if bits == 32:
        return {name: torch.zeros_like(R) for name in _SIGNED}
    if R.numel() < adamw8bit.MIN_8BIT_SIZE:
        return {name: torch.zeros_like(R, dtype=adamw8bit.working_dtype(R.dtype)) for name in _SIGNED}
    return {f"{name[0].upper()}{name[1:]}": t for name, t in adamw8bit.init_state(R).items()}


def decode(state: Mapping[str, Any], R: Tensor) -> tuple[Tensor, Tensor]:
    """Return M and V in R's shape. If the state holds codes, return decoded copies, else the state's own tensors."""
    if state["M"].dtype != torch.uint8:
        return state["M"], state["V"]
    codes = {name: state[f"{name[0].upper()}{name[1:]}"] for name in ("m", "v", "m_absmax", "v_absmax")}
    M, V = adamw8bit.moments(codes, adamw8bit.working_dtype(R.dtype))
    return M.view(R.shape), V.view(R.shape)


def encode(state: Mapping[str, Any], M: Tensor, V: Tensor) -> None:
    """Encode M and V into the 8-bit codes of a state, in place. If the state holds no codes, do nothing."""
    if state["M"].dtype != torch.uint8:
        return
    for name, value in (("M", M), ("V", V)):
        codes, absmax = quantize_blockwise(value, dynamic_map(_SIGNED[name]))
        state[name].copy_(codes)
        state[f"{name}_absmax"].copy_(absmax)


def stored_bytes(numel: int, itemsize: int, bits: int) -> int:
    """Return the size in bytes of the moments M and V together, each with `numel` elements.

    itemsize: bytes per element of the gradient. bits: 8 or 32.
    """
    return adamw8bit.state_bytes(numel) if bits == 8 else 2 * numel * itemsize
