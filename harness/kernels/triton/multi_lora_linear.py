"""A linear layer in which every sequence has its own LoRA adapter, on a GPU.

The layer is that of Punica (arXiv:2310.18547) and S-LoRA (arXiv:2311.03285).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor
from torch.nn.functional import linear

from harness.kernels.torch.support.autocast import once_outside_autocast
from harness.kernels.triton.support.grouped_lora import INNER, MOST_REGISTERS, expand, outer, shrink, tile
from harness.kernels.triton.support.launch import launch

_BUSY = 128  # programs that keep a GPU busy; with fewer, `shrink` splits its sum into up to _MOST_SPLITS pieces
_MOST_SPLITS = 8
_A, _B = 0, 1


class _AdapterGroup:
    """The adapters of one call, with methods that launch their matrix products.

    The weight W is (E, D), and the input x is (N, T, D), with N sequences of T tokens.
    """

    def __init__(self, As: Sequence[Tensor], Bs: Sequence[Tensor], scalings: Sequence[float], x: Tensor) -> None:
        self.ranks = tuple(len(A) for A in As)
        addresses = tuple((A.data_ptr(), B.data_ptr()) for A, B in zip(As, Bs, strict=True))
        self.table, self.scalings = _table(
            addresses, self.ranks, tuple(map(float, scalings)), As[0].shape[1], len(Bs[0]), x.device
        )
        even = all(address % 16 == 0 for pair in addresses for address in pair) and all(r % 8 == 0 for r in self.ranks)
        self.sequences, self.tokens = x.shape[:2]
        self.width = max(16, triton.next_power_of_2(max(self.ranks)))
        self.plane = self.sequences * self.tokens * self.width
        most = tile(x.dtype, self.tokens)
        self.columns = most["columns"]
        self.tiles = {"rows": most["rows"], "ranks": min(most["ranks"], self.width)}
        self.options = {"aligned": even, "num_warps": 4, "enable_fp_fusion": True} | self.tiles
        self.programs = self.sequences * triton.cdiv(self.tokens, self.tiles["rows"])
        self.rank_tiles = triton.cdiv(max(self.ranks), self.tiles["ranks"])

    def shrink(self, x: Tensor, ids: Tensor, which: int) -> Tensor:
        """Return the low-rank products S of all tokens as partial sums, float32 (pieces, N T width).

        S is the sum of the pieces: scaling x A^T if `which` is _A, or scaling dy B if `which` is _B and x holds the
        gradient dy. A token has `width` numbers: the largest rank, rounded up to a power of two of at least 16.
        """
        features = x.shape[-1]
        wanted = min(_MOST_SPLITS, triton.cdiv(_BUSY, self.programs), triton.cdiv(features, 2 * INNER))
        span = triton.cdiv(triton.cdiv(features, wanted), INNER) * INNER
        S = torch.empty(triton.cdiv(features, span), self.plane, device=x.device)
        launch(
            shrink, (self.programs, len(S), self.rank_tiles),
            x, self.table, self.scalings, ids, S, self.tokens, features, span, self.plane, self.width,
            which=which, inner=INNER, num_stages=3, **self.options,
        )  # fmt: skip
        return S

    def expand(self, out: Tensor, S: Tensor, ids: Tensor, which: int) -> None:
        """Add S B^T (if `which` is _B) or S A (if `which` is _A) to `out` (N, T, features)."""
        features = out.shape[-1]
        launch(
            expand, (self.programs, triton.cdiv(features, self.columns)),
            out, S, self.table, ids, self.tokens, features, self.plane, self.width, len(S),
            which=which, columns=self.columns, maxnreg=MOST_REGISTERS, **self.options,
        )  # fmt: skip

    def outer(self, x: Tensor, S: Tensor, ids: Tensor, which: int) -> list[Tensor]:
        """Return the gradients of all A (if `which` is _A) or all B (if it is _B). An unused adapter gets zeros.

        For A, x is the layer's input, and S is scaling dy B. For B, x holds the gradient dy, and S is scaling x A^T.
        """
        features = x.shape[-1]
        flat = torch.empty(sum(self.ranks) * features, dtype=x.dtype, device=x.device)
        launch(
            outer, (len(self.ranks), triton.cdiv(features, self.columns), self.rank_tiles),
            x, S, self.table, ids, flat, self.sequences, self.tokens, features, self.plane, self.width, len(S),
            which=which, columns=self.columns, maxnreg=MOST_REGISTERS, **self.options,
        )  # fmt: skip
        parts = flat.split([rank * features for rank in self.ranks])
        shapes = [(rank, features) if which == _A else (features, rank) for rank in self.ranks]
        return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


@lru_cache(maxsize=1024)
def _table(
    addresses: tuple[tuple[int, int], ...], ranks: tuple[int, ...], scalings: tuple[float, ...], D: int, E: int,
    device: torch.device,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return (table, scalings) for the kernels of `grouped_lora`, on the device. The table is int64 (adapters, 5).

    addresses: memory addresses of each adapter's A and B. The result is cached, so that nothing is uploaded unless an
    adapter has moved.
    """
    rows, before = [], 0
    for pair, rank in zip(addresses, ranks, strict=True):
        rows.append([*pair, rank, before * D, before * E])
        before += rank
    return torch.tensor(rows, dtype=torch.int64).to(device), torch.tensor(scalings).to(device)


class _MultiLora(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W: Tensor,
        ids: Tensor,
        scalings: Sequence[float],
        idle: Collection[int],
        *adapters: Tensor,
    ) -> Tensor:
        contiguous = [t.contiguous() for t in adapters]
        As, Bs = contiguous[: len(scalings)], contiguous[len(scalings) :]
        group = _AdapterGroup(As, Bs, scalings, x)
        y = linear(x, W)
        S = group.shrink(x, ids, _A)
        group.expand(y, S, ids, _B)
        ctx.save_for_backward(x, W, ids, S, *contiguous)
        ctx.group, ctx.idle = group, idle
        return y

    @staticmethod
    @once_outside_autocast
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, W, ids, S, *_ = ctx.saved_tensors
        group, dy = ctx.group, dy.contiguous()
        (need_x, need_W), of_adapters = ctx.needs_input_grad[:2], ctx.needs_input_grad[5:]
        need_A, need_B = any(of_adapters[: len(group.ranks)]), any(of_adapters[len(group.ranks) :])
        dx = dW = None
        dAs: list[Tensor | None] = [None] * len(group.ranks)
        dBs: list[Tensor | None] = [None] * len(group.ranks)
        if need_x or need_A:
            dS = group.shrink(dy, ids, _B)
        if need_x:
            dx = dy @ W
            group.expand(dx, dS, ids, _A)
        if need_W:
            dW = dy.flatten(0, 1).T @ x.flatten(0, 1)
        if need_A:
            dAs = [None if n in ctx.idle else dA for n, dA in enumerate(group.outer(x, dS, ids, _A))]
        if need_B:
            dBs = [None if n in ctx.idle else dB for n, dB in enumerate(group.outer(dy, S, ids, _B))]
        return dx, dW, None, None, None, *dAs, *dBs


def multi_lora_linear(
    x: Tensor,
    W: Tensor,
    As: Sequence[Tensor],
    Bs: Sequence[Tensor],
    scalings: Sequence[float],
    ids: Sequence[int] | Tensor,
) -> Tensor:
    """Return x W^T + s_i x A_i^T B_i^T, shape (N, ..., E). Sequence n has the adapter i = ids[n]; its scaling is s_i.

    If ids[n] is -1, the sequence gets only x W^T. Shapes: x (N, ..., D), W (E, D), As[i] (R_i, D), Bs[i] (E, R_i).
    These tensors have one dtype: float32, bfloat16 or float16. The result is differentiable once, in x, W, As and Bs.
    The gradient of an unused adapter is None or, if the ids are on a GPU, zero: to read them would take a
    synchronisation. Raises ValueError for wrong shapes or dtypes, and for an id that is neither -1 nor an adapter. If
    the ids are on a GPU, a wrong id fails only at the next synchronisation.
    """
    count = len(As)
    if not count == len(Bs) == len(scalings):
        raise ValueError(f"each adapter needs an A, a B and a scaling, got {count}, {len(Bs)} and {len(scalings)}")
    if any(t.dtype != x.dtype for t in (W, *As, *Bs)):
        raise ValueError(f"W and the adapters must be {x.dtype} like x")
    if any(A.shape != (B.shape[1], W.shape[1]) or len(B) != len(W) for A, B in zip(As, Bs, strict=True)):
        raise ValueError(f"for W {tuple(W.shape)} every A must be (R, {W.shape[1]}) and its B ({W.shape[0]}, R)")
    chosen = torch.as_tensor(ids).contiguous()  # the kernels read them one after the other
    if chosen.shape != x.shape[:1]:
        raise ValueError(f"ids must have shape ({len(x)},), one per sequence, got {tuple(chosen.shape)}")
    known = (chosen >= -1) & (chosen < count)
    if chosen.device.type == "cpu":
        for invalid in chosen[~known].tolist():
            raise ValueError(f"id {invalid}: must be an adapter, 0 to {count - 1}, or -1 for none")
    else:
        torch._assert_async(known.all())
    if not count or not x.numel():
        return linear(x, W)
    idle = set(range(count)).difference(chosen.tolist()) if chosen.device.type == "cpu" else set()
    rows = x.reshape(len(x), -1, x.shape[-1]).contiguous()
    y: Tensor = _MultiLora.apply(rows, W, chosen.to(x.device, non_blocking=True), tuple(scalings), idle, *As, *Bs)
    return y.view(*x.shape[:-1], len(W))
