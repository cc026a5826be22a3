"""One step of AdamW with blockwise 8-bit moments (arXiv:2110.02861) in one launch.

For each element, the kernel reads p, g and two codes, and writes p and two codes: 10 bytes if p has 16 bits, 16 bytes
in float32. Separate kernels for decoding, stepping and encoding would move some 70 bytes.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from harness.kernels.compile.specimen import Specimen
from harness.kernels.device import interpreted
from harness.kernels.triton.support.dynamic_map import largest_magnitude, nearest, nearly_relative, tables
from harness.kernels.triton.support.launch import launch
from harness.kernels.triton.support.rounding import load_as_float32, store_as

BLOCK = 256
_ROWS = (
    64 if interpreted() else 4
)  # blocks per program; 4 give each of 128 threads 8 elements, a whole vector in 16 bits


@triton.jit
def _step(
    p, g, m, m_absmax, v, v_absmax, p_out, m_out, m_absmax_out, v_out, v_absmax_out,
    m_values, m_midpoints, m_buckets, v_values, v_midpoints, v_buckets,
    n, decay, step_size, root_correction, eps, beta1, rest1, beta2, rest2, rows: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows)
    at = row[:, None] * block + tl.arange(0, block)[None, :]
    has_row = row * block < n
    crosses_end = ((tl.program_id(0).to(tl.int64) + 1) * rows * block > n).to(tl.int32)
    # A mask per element turns 16-byte accesses into 1-byte ones. So there are two copies of the body, and only that for the
    # last tile has a mask.
    for masked in tl.static_range(2):
        if crosses_end == masked:
            mask = at < n if masked else None
            m_old = tl.load(m_values + tl.load(m + at, mask=mask).to(tl.int32))
            v_old = tl.load(v_values + tl.load(v + at, mask=mask).to(tl.int32))
            gradient = load_as_float32(g + at, mask=mask)
            m_new = m_old * (beta1 * tl.load(m_absmax + row, mask=has_row))[:, None] + rest1 * gradient
            v_new = v_old * (beta2 * tl.load(v_absmax + row, mask=has_row))[:, None] + rest2 * gradient * gradient
            if masked:  # elements beyond the end must not affect an absmax
                m_new, v_new = tl.where(mask, m_new, 0.0), tl.where(mask, v_new, 0.0)
            parameter = load_as_float32(p + at, mask=mask)
            moved = parameter * decay - step_size * (m_new / (tl.sqrt(v_new) * root_correction + eps))
            store_as(p_out + at, moved, mask=mask)
            m_largest, v_largest = largest_magnitude(m_new, 1), largest_magnitude(v_new, 1)
            m_code = nearest(nearly_relative(m_new, m_largest[:, None]), m_midpoints, m_buckets, True)
            v_code = nearest(nearly_relative(v_new, v_largest[:, None]), v_midpoints, v_buckets, False)
            tl.store(m_out + at, m_code.to(tl.uint8), mask=mask)
            tl.store(v_out + at, v_code.to(tl.uint8), mask=mask)
            tl.store(m_absmax_out + row, m_largest, mask=has_row)
            tl.store(v_absmax_out + row, v_largest, mask=has_row)


@torch.no_grad()
def adamw8bit_step(
    p: Tensor, g: Tensor, m: Tensor, m_absmax: Tensor, v: Tensor, v_absmax: Tensor, **options: Any
) -> tuple[Tensor, ...]:
    """Return p, m, m_absmax, v and v_absmax after one step of AdamW.

    The arguments are those of `adamw8bit_step_`, in any memory layout. They are not modified.
    """
    state = [t.contiguous() for t in (m, m_absmax, v, v_absmax)]
    inputs = [p.contiguous(), *state]
    out = [torch.empty_like(t) for t in inputs]
    _launch(inputs, g, out, **options)
    return tuple(out)


def adamw8bit_step_(
    p: Tensor, g: Tensor, m: Tensor, m_absmax: Tensor, v: Tensor, v_absmax: Tensor, **options: Any
) -> None:
    """Take one step of AdamW, and update p, m, m_absmax, v and v_absmax in place.

    p, g: parameter and gradient, of one shape, in float32, bfloat16 or float16. m: uint8 codes of the signed dynamic
    map, one per element. v: uint8 codes of the unsigned map, one per element. m_absmax, v_absmax: float32, one per
    block of 256. options: step (from 1), lr, betas, eps, weight_decay. The step computes in float32 and rounds p once.
    Weight decay comes before the update. Raises ValueError for wrong sizes, and if p or a moment is not contiguous.
    """
    state = [p, m, m_absmax, v, v_absmax]
    if not all(t.is_contiguous() for t in state):
        raise ValueError("p and its state must be contiguous; hint: use `adamw8bit_step` for views")
    _launch(state, g, state, **options)


def _launch(
    inputs: list[Tensor], g: Tensor, out: list[Tensor], *,
    step: int, lr: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.0,
) -> None:  # fmt: skip
    p, m, m_absmax, v, v_absmax = inputs
    blocks = -(-p.numel() // BLOCK)
    if not (g.shape == p.shape and m.numel() == v.numel() == p.numel() and len(m_absmax) == len(v_absmax) == blocks):
        raise ValueError(
            f"{p.numel()} parameters need gradients and codes of the same number, and {blocks} absmax; got {g.numel()} "
            f"gradients, {m.numel()} and {v.numel()} codes, {len(m_absmax)} and {len(v_absmax)} absmax"
        )
    if blocks == 0:
        return
    (beta1, beta2), options = betas, {"num_warps": 4, "enable_fp_fusion": True}
    launch(
        _step, (triton.cdiv(blocks, _ROWS),),
        p, g.contiguous(), m, m_absmax, v, v_absmax, *out, *tables(p.device, True), *tables(p.device, False),
        p.numel(), 1 - lr * weight_decay, lr / (1 - beta1**step), 1 / math.sqrt(1 - beta2**step), eps,
        beta1, 1 - beta1, beta2, 1 - beta2, rows=_ROWS, block=BLOCK, **options,
    )  # fmt: skip


_TABLES = {f"{name}_{kind}": of for name in "mv" for kind, of in
           (("values", "*fp32"), ("midpoints", "*fp32"), ("buckets", "*u8"))}  # fmt: skip
_SCALARS = ("decay", "step_size", "root_correction", "eps", "beta1", "rest1", "beta2", "rest2")


def _specimen(dtype: str) -> Specimen:
    state = {"m": "*u8", "m_absmax": "*fp32", "v": "*u8", "v_absmax": "*fp32"}
    pointers = {"p": f"*{dtype}", "g": f"*{dtype}", **state, "p_out": f"*{dtype}"}
    pointers |= {f"{name}_out": of for name, of in state.items()} | _TABLES
    return Specimen(
        name=f"adamw8bit_step-{dtype}", kernel=_step,
        signature=pointers | {"n": "i32"} | dict.fromkeys(_SCALARS, "fp32"), constants={"rows": 4, "block": BLOCK},
        divisible=tuple(pointers), kind="streaming", fused_multiply_add=True,
        narrow_loads=48,  # 16 bucket look-ups for 8 elements; at the ragged end 16 more, and 16 codes
    )  # fmt: skip


SPECIMENS = [_specimen(dtype) for dtype in ("bf16", "fp32")]
