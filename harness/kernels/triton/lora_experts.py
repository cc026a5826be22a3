"""LoRA's linear layer for many experts on a GPU, with one launch per product for all experts.

Rows are sorted by expert. A table, made on the device, gives each program its expert and its rows, so the host never
waits. In both passes, the kernel adds the low-rank update to the product with the frozen weight. Each sum has a fixed
order and uses no atomics. An expert's offset in the stacked weights is int64, because the stack may have more than
2**31 elements. Letters in shapes: P rows, K experts, D and E input and output features, R the rank.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from harness.kernels.compile.specimen import Specimen
from harness.kernels.torch.support.autocast import once_outside_autocast
from harness.kernels.torch.support.packed_weight import PackedStack
from harness.kernels.triton.support.gemm_tiles import EXACT, FEW_ROWS, LARGE, GemmTile, gemm_tile, rank_block
from harness.kernels.triton.support.launch import KernelLaunch, meta
from harness.kernels.triton.support.matrix_product import accumulate
from harness.kernels.triton.support.rounding import store_as


@triton.jit
def grouped_product(
    out, left, right, S, T, table, scale, experts, N, K, R,
    left_m, right_e, right_k, right_n, S_m, T_e, T_r, T_n,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    EVEN_K: tl.constexpr, EVEN_R: tl.constexpr,
):  # fmt: skip
    """Compute one tile of `out` (P, N): left @ right[e] + scale S @ T[e], for some rows of one expert e.

    Shapes: left (P, K), right (experts, K, N), S (P, R), T (experts, R, N). Here K is a number of features. If S and T
    are None, the tile is scale left @ right[e]. table: three numbers for each group of rows: its expert, the index of
    its first row, and the index after the expert's last row.
    """
    place = table + tl.program_id(0) * 3
    expert, first, end = tl.load(place), tl.load(place + 1), tl.load(place + 2)
    if expert >= experts:
        return
    rows = first + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if S is not None:
        acc = accumulate(
            acc, S, T + expert * T_e, None, None, rows, columns, end, N, R, S_m, 1, T_r, T_n, 0, 0, BLOCK_R, EVEN_R
        )
        acc *= scale
    acc = accumulate(
        acc, left, right + expert * right_e, None, None, rows, columns, end, N, K,
        left_m, 1, right_k, right_n, 0, 0, BLOCK_K, EVEN_K,
    )  # fmt: skip
    if S is None:
        acc *= scale
    store_as(out + rows[:, None] * N + columns[None, :], acc, mask=(rows[:, None] < end) & (columns[None, :] < N))


@triton.jit
def grouped_outer(
    out, left, right, ends, scale, M, N, left_p, right_p,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Compute one tile of out[e], shape (M, N): scale left^T @ right, summed over the rows of expert e.

    left is (P, M), right (P, N). ends: for each expert, the index after its last row.
    """
    down = tl.cdiv(M, BLOCK_M)
    expert = (tl.program_id(0) // down).to(tl.int64)
    rows = (tl.program_id(0) % down) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    end, first = tl.load(ends + expert), tl.load(ends + expert - 1, mask=expert > 0, other=0)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    acc = accumulate(
        acc, left + first * left_p, right + first * right_p, None, None, rows, columns, M, N, end - first,
        1, left_p, right_p, 1, 0, 0, BLOCK_K, False,
    )  # fmt: skip
    mask = (rows[:, None] < M) & (columns[None, :] < N)
    store_as(out + expert * M * N + rows[:, None] * N + columns[None, :], acc * scale, mask=mask)


def _table(counts: Tensor, rows: int, block: int) -> Tensor:
    """Return the table of `grouped_product`, int64 (groups, 3). A group has at most `block` rows of one expert.

    counts: number of rows of each expert. rows: sum of the counts. The number of groups depends only on `rows`, `block`
    and the number of experts, so that the host need not know the counts. Unused groups have the expert len(counts),
    which does not exist.
    """
    number = torch.arange(triton.cdiv(rows, block) + len(counts), device=counts.device)
    groups, ends = (counts + block - 1) // block, counts.cumsum(0)
    last = groups.cumsum(0)
    expert = torch.searchsorted(last, number, right=True)
    known = expert.clamp(max=len(counts) - 1)
    first = (ends - counts)[known] + (number - (last - groups)[known]) * block
    return torch.stack([expert, first, ends[known]], dim=1).contiguous()


def _product(
    left: Tensor, right: Tensor, S: Tensor | None, T: Tensor | None, scale: float, table: Tensor, out: Tensor,
    tile: GemmTile,
) -> KernelLaunch:  # fmt: skip
    """Return the launch of `grouped_product`. right is (K, features, N) and T is (K, R, N), with any strides."""
    N, features, R = right.shape[2], right.shape[1], 0 if S is None else S.shape[1]
    block = rank_block(max(R, 1))
    return KernelLaunch(
        grouped_product,
        (len(table), triton.cdiv(N, tile.n)),
        {
            "out": out, "left": left, "right": right, "S": S, "T": T, "table": table, "scale": scale,
            "experts": len(right), "N": N, "K": features, "R": R, "left_m": left.stride(0),
            **dict(zip(("right_e", "right_k", "right_n"), right.stride(), strict=True)),
            "S_m": 0 if S is None else S.stride(0),
            **dict(zip(("T_e", "T_r", "T_n"), (0, 0, 0) if T is None else T.stride(), strict=True)),
        },
        tile.constants() | {"BLOCK_R": block, "EVEN_K": features % tile.k == 0, "EVEN_R": R % block == 0},
        num_warps=tile.warps,
        num_stages=tile.stages,
    )  # fmt: skip


def _outer(left: Tensor, right: Tensor, ends: Tensor, scale: float, out: Tensor, tile: GemmTile) -> KernelLaunch:
    """Return the launch of `grouped_outer`."""
    M, N = left.shape[1], right.shape[1]
    return KernelLaunch(
        grouped_outer,
        (len(ends) * triton.cdiv(M, tile.m), triton.cdiv(N, tile.n)),
        {
            "out": out, "left": left, "right": right, "ends": ends, "scale": scale, "M": M, "N": N,
            "left_p": left.stride(0), "right_p": right.stride(0),
        },
        tile.constants(),
        num_warps=tile.warps,
        num_stages=tile.stages,
    )  # fmt: skip


class _Groups:
    """The rows of each expert in one call, with methods for matrix products over these rows."""

    def __init__(self, counts: Tensor, rows: int) -> None:
        self.counts, self.rows, self.ends = counts, rows, counts.cumsum(0)

    def product(self, left: Tensor, right: Tensor, *term: Tensor, scale: float = 1.0) -> Tensor:
        """Return left @ right[e] + scale S @ T[e] for the rows of each expert e, shape (P, N).

        Shapes: left (P, features), right (K, features, N). term: S (P, R) and T (K, R, N). Without them, return scale
        left @ right[e].
        """
        tile = gemm_tile(-(-self.rows // len(right)), right.shape[2], left.dtype, left.device, crowded=True)
        out = left.new_empty(len(left), right.shape[2])
        S, T = term or (None, None)
        _product(left, right, S, T, scale, _table(self.counts, self.rows, tile.m), out, tile).run()
        return out

    def outer(self, left: Tensor, right: Tensor, scale: float = 1.0) -> Tensor:
        """Return scale left^T @ right for the rows of each expert, shape (K, M, N). Experts without rows get zeros.

        Shapes: left (P, M), right (P, N).
        """
        tile = gemm_tile(left.shape[1], right.shape[1], left.dtype, left.device, crowded=True)
        out = left.new_empty(len(self.ends), left.shape[1], right.shape[1])
        _outer(left, right, self.ends, scale, out, tile).run()
        return out


class _GroupedLora(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W: Tensor | PackedStack, A: Tensor, B: Tensor, scaling: float, counts: Tensor
    ) -> Tensor:
        groups, x = _Groups(counts, len(x)), x.contiguous()
        S = groups.product(x, A.transpose(1, 2))
        ctx.save_for_backward(x, A, B, S, W if isinstance(W, Tensor) else None)
        ctx.packed = W if isinstance(W, PackedStack) else None
        ctx.scaling, ctx.groups = scaling, groups
        return groups.product(x, _dense(W, x.dtype).transpose(1, 2), S, B.transpose(1, 2), scale=scaling)

    @staticmethod
    @once_outside_autocast
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, A, B, S, W = ctx.saved_tensors
        need_x, _, need_A, need_B = ctx.needs_input_grad[:4]
        groups, dy = ctx.groups, dy.contiguous()
        dx = dA = dB = None
        if need_x or need_A:
            dS = groups.product(dy, B, scale=ctx.scaling)
            dx = groups.product(dy, _dense(ctx.packed or W, dy.dtype), dS, A) if need_x else None
            dA = groups.outer(dS, x) if need_A else None
        if need_B:
            dB = groups.outer(dy, S, scale=ctx.scaling)
        return dx, None, dA, dB, None, None


def _dense(W: Tensor | PackedStack, dtype: torch.dtype) -> Tensor:
    return W if isinstance(W, Tensor) else W.dense(dtype)


def grouped_lora_linear(
    x: Tensor, W: Tensor | PackedStack, A: Tensor, B: Tensor, scaling: float, counts: Tensor
) -> Tensor:
    """Return x_p W_k^T + scaling x_p A_k^T B_k^T for each row p of expert k, shape (P, E).

    Shapes: x (P, D) sorted by expert, W (K, E, D), A (K, R, D), B (K, E, R), counts (K,). counts: number of rows of
    each expert; the sum must be P. The tensors have one dtype, float32, bfloat16 or float16, and any strides. The
    result is differentiable once, in x, A and B. Raises ValueError if A, B or a dense W differs in dtype from x.
    """
    if any(t.dtype != x.dtype for t in (W, A, B) if isinstance(t, Tensor)):
        raise ValueError(f"W, A and B must be {x.dtype} like x")
    if not len(x):
        return x.new_empty(0, W.shape[1]) + 0 * (x.sum() + A.sum() + B.sum())  # keeps the graph
    y: Tensor = _GroupedLora.apply(x, W, A, B, scaling, counts)
    return y


def _specimens(name: str, dtype: torch.dtype, tile: GemmTile) -> list[Specimen]:
    P, K, D, E, R = 4096, 8, 2048, 4096, 16
    ids = meta(torch.int64, K)
    table, S, out = meta(torch.int64, 64, 3), meta(dtype, P, R), meta(dtype, P, E)
    x, W, B = meta(dtype, P, D), meta(dtype, K, E, D), meta(dtype, K, E, R)
    return [
        _product(x, W.transpose(1, 2), S, B.transpose(1, 2), 2.0, table, out, tile).specimen(f"expert_product-{name}"),
        _outer(x, S, ids, 2.0, meta(dtype, K, D, R), tile).specimen(f"expert_outer-{name}"),
    ]


SPECIMENS = [
    one
    for name, dtype, tile in (
        ("bf16", torch.bfloat16, LARGE),
        ("bf16-few", torch.bfloat16, FEW_ROWS[0]),
        ("fp16", torch.float16, LARGE),
        ("fp32", torch.float32, EXACT),
    )
    for one in _specimens(name, dtype, tile)
]
