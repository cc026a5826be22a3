"""One step of AdamW with 8-bit moments.

The moments are decoded, updated and encoded again, in chunks that fit the cache. As in Dettmers et al.,
arXiv:2110.02861, the first moment has codes of the signed dynamic map, and the second moment has codes of the unsigned
map. Each block of 256 codes has a float32 absmax. On a GPU, Triton does the whole step in one launch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from harness.kernels.device import by_triton
from harness.kernels.torch.dynamic_quantize import CHUNK, decode, encode, tables

BLOCK = 256
"""Number of elements that share one absmax."""
MIN_8BIT_SIZE = 4096
"""Smallest number of elements of a tensor whose moments are stored in 8 bits."""


def init_state(p: Tensor, min_8bit_size: int = MIN_8BIT_SIZE) -> dict[str, Tensor]:
    """Return the moments of p before the first step: all zero.

    For p of at least `min_8bit_size` elements: uint8 codes m and v, one per element, and float32 numbers m_absmax and
    v_absmax, one per 256 elements. All are flat. For a smaller p: only m and v, in the shape of p, float64 if p is
    float64, else float32.
    """
    if p.numel() < min_8bit_size:
        dtype = torch.promote_types(p.dtype, torch.float32)
        return {name: torch.zeros_like(p, dtype=dtype, memory_format=torch.contiguous_format) for name in ("m", "v")}
    state = {name: torch.zeros(p.numel(), dtype=torch.uint8, device=p.device) for name in ("m", "v")}
    blocks = -(-p.numel() // BLOCK)
    return state | {f"{name}_absmax": torch.zeros(blocks, dtype=torch.float32, device=p.device) for name in ("m", "v")}


def adamw8bit_step(
    p: Tensor, g: Tensor, m: Tensor, m_absmax: Tensor, v: Tensor, v_absmax: Tensor, **options: Any
) -> tuple[Tensor, ...]:
    """Return p, m, m_absmax, v and v_absmax after one step of AdamW.

    The arguments are those of `adamw8bit_step_`, in any memory layout. They are not modified.
    """
    if by_triton(p, g):
        from harness.kernels.triton import adamw8bit_step as gpu

        return gpu.adamw8bit_step(p, g, m, m_absmax, v, v_absmax, **options)
    # A plain clone() would keep gaps and transposition, but `adamw8bit_step_` needs contiguous memory.
    out = [t.detach().clone(memory_format=torch.contiguous_format) for t in (p, m, m_absmax, v, v_absmax)]
    adamw8bit_step_(out[0], g, *out[1:], **options)
    return tuple(out)


@torch.no_grad()
def adamw8bit_step_(
    p: Tensor,
    g: Tensor,
    m: Tensor,
    m_absmax: Tensor,
    v: Tensor,
    v_absmax: Tensor,
    *,
    step: int,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> None:
    """Take one step of AdamW, and update p, m, m_absmax, v and v_absmax in place.

    p, g: parameter and gradient, of one shape and any floating dtype. m, v: uint8 codes, flat, one per element.
    m_absmax, v_absmax: float32, one per block of 256. step: number of this step, t in the equations; the first is 1.
    The step computes in float64 if p is float64, else in float32, and rounds p once. Weight decay comes before the
    update:

        m = beta1 m + (1 - beta1) g       v = beta2 v + (1 - beta2) g^2
        p = (1 - lr weight_decay) p - lr (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)
    """
    options: dict[str, Any] = {"step": step, "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
    if not p.is_contiguous():
        packed = p.contiguous()
        adamw8bit_step_(packed, g, m, m_absmax, v, v_absmax, **options)
        p.copy_(packed)
        return
    if by_triton(p, g):
        from harness.kernels.triton import adamw8bit_step as gpu

        gpu.adamw8bit_step_(p, g, m, m_absmax, v, v_absmax, **options)
        return
    n, dtype, signed, unsigned = p.numel(), working_dtype(p), tables(p.device, True), tables(p.device, False)
    flat, gradient = p.view(-1), g.reshape(-1)
    chunk = CHUNK if p.device.type == "cpu" else max(1, n)
    for first in firsts(n, chunk):
        part, blocks = slice(first, first + chunk), slice(first // BLOCK, -(-min(first + chunk, n) // BLOCK))
        G = gradient[part].to(dtype)
        M = decode(m[part], m_absmax[blocks], BLOCK, signed).to(dtype)
        V = decode(v[part], v_absmax[blocks], BLOCK, unsigned).to(dtype)
        flat[part] = update(flat[part].to(dtype), G, M, V, **options)
        m[part], m_absmax[blocks] = encode(M.float(), BLOCK, signed)
        v[part], v_absmax[blocks] = encode(V.float(), BLOCK, unsigned)


def firsts(n: int, chunk: int) -> Sequence[int]:
    """Return the index of the first element of each chunk. n: number of elements. chunk: elements per chunk.

    `harness.memory_model.dry_step` replaces this function, so that a simulated step runs only a few chunks.
    """
    return range(0, n, chunk)


def working_dtype(p: Tensor) -> torch.dtype:
    """Return the dtype in which a step on p computes: float64 if p is float64, else float32."""
    return torch.promote_types(p.dtype, torch.float32)


def update(
    p: Tensor, g: Tensor, M: Tensor, V: Tensor,
    *, step: int, lr: float, betas: tuple[float, float], eps: float, weight_decay: float,
) -> Tensor:  # fmt: skip
    """Return p after a step of AdamW on decoded moments, and update the moments M and V in place.

    All tensors have the dtype `working_dtype(p)`, in which the step computes.
    """
    M.mul_(betas[0]).add_(g, alpha=1 - betas[0])
    V.mul_(betas[1]).addcmul_(g, g, value=1 - betas[1])
    denominator = V.sqrt().div_(math.sqrt(1 - betas[1] ** step)).add_(eps)
    return (p * (1 - lr * weight_decay)).addcdiv_(M, denominator, value=-lr / (1 - betas[0] ** step))
