"""Multiply by a packed NF4 weight: few tokens in one launch that decodes and multiplies, many tokens after decoding.

With few tokens, reading the weight takes nearly all the time. In NF4 it takes a quarter of the time that it takes in 16
bits. With many tokens it is faster to decode once and let torch multiply. A table in `harness/kernels/crossovers` gives
the largest number of tokens for the single launch. Its kernel computes y^T = W x^T. Decoded values go from registers
into matrix instructions without passing through shared memory, and a tile may have as few as 16 tokens. A byte holds
the codes of two neighbouring columns. The kernel therefore computes two products, one for the even and one for the odd
columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import linear

from harness.kernels.card_tables import card
from harness.kernels.compile.specimen import Specimen
from harness.kernels.crossover import crossover_of
from harness.kernels.nf4_format import check_sizes
from harness.kernels.torch.support.autocast import outside_autocast
from harness.kernels.triton.nf4 import dequantize
from harness.kernels.triton.support.launch import launch
from harness.kernels.triton.support.matrix_product import product
from harness.kernels.triton.support.nf4_levels import level_by_selection
from harness.kernels.triton.support.rounding import load_as_float32, store_as, to_dtype

_ROWS, _LARGEST_CHUNK, _WARPS, _STAGES = 64, 128, 4, 5


@triton.jit
def _fused(
    x, packed, absmax, bias, y, tokens, E, D, row_bytes,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Compute one tile of y = x W^T + bias for a packed W.

    D is a multiple of BLOCK, and BLOCK is a multiple of CHUNK, so that CHUNK values of a row have one absmax.
    """
    dtype: tl.constexpr = x.dtype.element_ty
    row, token = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    # Beyond the end the last row and token are computed again, so that loads need no mask.
    of_row, of_token = tl.minimum(row, E - 1).to(tl.int64), tl.minimum(token, tokens - 1).to(tl.int64)
    byte, column = tl.arange(0, CHUNK // 2), tl.arange(0, CHUNK)
    codes_at = packed + of_row[:, None] * row_bytes + byte[None, :]
    scale_at = absmax + of_row * (D // BLOCK)
    x_at = x + of_token[:, None] * D + column[None, :]
    sums = tl.zeros([ROWS, TOKENS], dtype=tl.float32)
    for start in range(0, D, CHUNK):
        codes = tl.load(codes_at + start // 2)
        scale = tl.load(scale_at + start // BLOCK)[:, None]
        first, second = tl.split(tl.reshape(tl.load(x_at + start), [TOKENS, CHUNK // 2, 2]))
        sums = product(to_dtype(level_by_selection(codes >> 4) * scale, dtype), tl.trans(first), sums)
        sums = product(to_dtype(level_by_selection(codes & 15) * scale, dtype), tl.trans(second), sums)
    if bias is not None:
        sums += load_as_float32(bias + of_row)[:, None]
    here = (row < E)[:, None] & (token < tokens)[None, :]
    store_as(y + of_token[None, :] * E + row[:, None], sums, mask=here)


def fused(x: Tensor, packed: Tensor, absmax: Tensor, block: int, shape: Sequence[int], bias: Tensor | None) -> Tensor:
    """Return x W^T + bias, shape (T, E), for x (T, D). The fused kernel decodes W and multiplies in one launch.

    The other arguments are those of `nf4_linear`. The result has no gradients. Raises ValueError if the kernel does not
    support D, block and dtype.
    """
    E, D = shape
    if not fits(D, block, x.dtype):
        raise ValueError(f"no fused kernel for rows of {D} values in blocks of {block} in {x.dtype}")
    tokens = x.shape[0]
    y = torch.empty(tokens, E, dtype=x.dtype, device=x.device)
    if y.numel():
        pointers = [one if one is None else one.detach().contiguous() for one in (x, packed, absmax.float(), bias)]
        constants = _tile(tokens, block)
        grid = triton.cdiv(E, constants["ROWS"]), triton.cdiv(tokens, constants["TOKENS"])
        launch(
            _fused, grid, *pointers, y, tokens, E, D, D // 2, **constants, num_warps=_WARPS, num_stages=_STAGES,
            enable_fp_fusion=False,
        )  # fmt: skip
    return y


def fits(D: int, block: int, dtype: torch.dtype) -> bool:
    """Return whether the fused kernel supports rows of D values in blocks of this size, for x of this dtype.

    A row must consist of whole blocks. A block must be a power of two of at least 32. torch multiplies float32, because
    Triton 3.6 multiplies float32 as TF32 on sm_100 at every requested precision.
    """
    whole = D > 0 and block >= 32 and block & (block - 1) == 0 and D % block == 0
    return whole and dtype in (torch.bfloat16, torch.float16)


def _tile(tokens: int, block: int) -> dict[str, int]:
    width = min(64, max(16, triton.next_power_of_2(tokens)))
    return {"BLOCK": block, "ROWS": _ROWS, "TOKENS": width, "CHUNK": min(block, _LARGEST_CHUNK)}


def is_fused_faster(tokens: int, E: int, device: torch.device) -> bool:
    """Return whether the fused kernel is expected to be faster for this number of tokens and a weight (E, D).

    The crossover in the card's table or in the default table decides; see `harness.kernels.crossover`.
    """
    return tokens <= crossover_of("nf4_linear", card(device), E)


class _Nf4Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, packed: Tensor, absmax: Tensor, block: int, shape: tuple[int, int]
    ) -> Tensor:
        ctx.save_for_backward(packed, absmax)
        ctx.block, ctx.shape = block, shape
        if fits(shape[1], block, x.dtype) and is_fused_faster(x.shape[0], shape[0], x.device):
            return fused(x, packed, absmax, block, shape, bias)
        return linear(x, dequantize(packed, absmax, block, shape, x.dtype), bias)

    @staticmethod
    @outside_autocast
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        need_x, need_bias = ctx.needs_input_grad[:2]
        packed, absmax = ctx.saved_tensors
        dx = dy @ dequantize(packed, absmax, ctx.block, ctx.shape, dy.dtype) if need_x else None
        return dx, dy.sum(dim=0) if need_bias else None, None, None, None, None


def nf4_linear(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    block: int,
    shape: Sequence[int],
    bias: Tensor | None,
    training: bool = True,
) -> Tensor:
    """Return x W^T + bias, shape (..., E), for x (..., D) and a packed W (E, D).

    packed, absmax, block: W as packed by `nf4.quantize`. shape: (E, D). W is cast to x's dtype, and the sum is in
    float32. training: ignored. The result is twice differentiable in x and bias. The backward pass decodes the weight
    again. The decoded weight is in fresh memory, not in a buffer, because torch's allocator knows which stream uses the
    memory, and reserves the memory for a CUDA graph that is being captured. Raises ValueError for a block that is not a
    power of two of at least 32, and if the length of `packed` or `absmax` does not fit `shape`.
    """
    check_sizes(packed, absmax, block, shape)
    E, D = shape
    y: Tensor = _Nf4Linear.apply(x.reshape(-1, D), bias, packed, absmax, block, (E, D))
    return y.view(*x.shape[:-1], E)


def _specimen(dtype: str, tokens: int, block: int) -> Specimen:
    pointers = {"x": f"*{dtype}", "packed": "*u8", "absmax": "*fp32", "bias": f"*{dtype}", "y": f"*{dtype}"}
    numbers = {"tokens": "i32", "E": "i32", "D": "i32", "row_bytes": "i32"}
    return Specimen(
        name=f"nf4_linear.fused-{dtype}-{tokens}-{block}",
        kernel=_fused,
        signature={**pointers, **numbers},
        constants=_tile(tokens, block),
        divisible=(*pointers, "E", "D", "row_bytes"),
        kind="gemm",
        num_warps=_WARPS,
        num_stages=_STAGES,
    )


SPECIMENS = [
    _specimen(dtype, tokens, block)
    for dtype, tokens, block in (
        ("bf16", 1, 64), ("bf16", 32, 64), ("bf16", 64, 64), ("bf16", 64, 4096), ("fp16", 16, 64)
    )
]  # fmt: skip
