"""A linear layer whose sequences have LoRA adapters of their own (Punica, arXiv:2310.18547; S-LoRA, arXiv:2311.03285).

Three grouped kernels reach every adapter through a table of addresses: `_shrink` sums over features, S = s x A^T or s dy B;
`_expand` adds S B^T or S A to what cuBLAS made of W; `_outer` sums over tokens, S^T x or S^T dy. A program finds its adapter
by its sequence's id on the device: the host waits for nothing and sorts nothing. No atomics: each sum has one order.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from harness.kernels.device import interpreted
from harness.kernels.gpu.rounding import load_as_float32, store_as, to_dtype, to_float32
from harness.kernels.gpu.specimen import Specimen

_INNER = 64  # features at a time that are summed over
_BUSY = 128  # programs that keep a GPU busy; with fewer, `_shrink` cuts its sum into up to _MOST_SPLITS
_MOST_SPLITS = 8
_FIELDS = tl.constexpr(5)  # of an adapter in the table: address of A, of B; rank; where its dA and dB begin
_A, _B = 0, 1
_WIDE = tl.constexpr(interpreted())  # where products of 16-bit numbers are formed in float32, since tl.dot cannot


@triton.jit
def _operand(value):
    return to_float32(value) if _WIDE else value


@triton.jit
def _weights(table, adapter, which: tl.constexpr, dtype: tl.constexpr, aligned: tl.constexpr):
    """Return where A or B of an adapter begins, and its rank. aligned: they are multiples of 16 bytes and of 8."""
    pointer = tl.load(table + adapter * _FIELDS + which).to(tl.pointer_type(dtype))
    rank = tl.load(table + adapter * _FIELDS + 2)
    if aligned:
        pointer, rank = tl.multiple_of(pointer, 16), tl.multiple_of(rank, 8)
    return pointer, rank


@triton.jit
def _shrink(
    x, table, scalings, ids, S, tokens, features, span, plane, width,
    which: tl.constexpr, aligned: tl.constexpr, rows: tl.constexpr, ranks: tl.constexpr, inner: tl.constexpr,
):  # fmt: skip
    """Some ranks of one piece of S of some tokens of a sequence. S: (pieces, tokens of all, width); a piece is the sum over
    `span` features."""
    tiles = tl.cdiv(tokens, rows)
    sequence = (tl.program_id(0) // tiles).to(tl.int64)
    adapter = tl.load(ids + sequence).to(tl.int64)
    if adapter < 0:
        return
    weights, rank = _weights(table, adapter, which, x.dtype.element_ty, aligned)
    token = (tl.program_id(0) % tiles) * rows + tl.arange(0, rows)
    here = token < tokens
    line = sequence * tokens + token
    r = tl.program_id(2) * ranks + tl.arange(0, ranks)
    if tl.program_id(2) * ranks >= rank:  # this adapter has fewer: nobody reads what would be here
        return
    total = tl.zeros([rows, ranks], tl.float32)
    begin = tl.program_id(1) * span
    for first in range(begin, tl.minimum(begin + span, features), inner):
        k = first + tl.arange(0, inner)
        part = tl.load(
            x + line[:, None] * features + k[None, :], mask=here[:, None] & (k < features)[None, :], other=0.0
        )
        # A (rank, features), B (features, rank)
        at = r[None, :] * features + k[:, None] if which == 0 else k[:, None] * rank + r[None, :]
        weight = tl.load(weights + at, mask=(k < features)[:, None] & (r < rank)[None, :], other=0.0)
        total = tl.dot(_operand(part), _operand(weight), total, input_precision="ieee")
    total *= tl.load(scalings + adapter)
    place = S + tl.program_id(1).to(tl.int64) * plane + line[:, None] * width + r[None, :]
    tl.store(place, total, mask=here[:, None])


@triton.jit
def _low(S, line, here, r, plane, width, pieces, rows: tl.constexpr, ranks: tl.constexpr):
    """Return the sum of the pieces of S at these lines and ranks, (rows, ranks) in float32."""
    low = tl.zeros([rows, ranks], tl.float32)
    place = S + line[:, None] * width + r[None, :]
    for _ in range(pieces):
        low += tl.load(place, mask=here[:, None], other=0.0)
        place += plane
    return low


@triton.jit
def _expand(
    out, S, table, ids, tokens, features, plane, width, pieces,
    which: tl.constexpr, aligned: tl.constexpr, rows: tl.constexpr, ranks: tl.constexpr, columns: tl.constexpr,
):  # fmt: skip
    """Add S B^T (or S A) of some tokens of a sequence to one tile of `out`."""
    tiles = tl.cdiv(tokens, rows)
    sequence = (tl.program_id(0) // tiles).to(tl.int64)
    adapter = tl.load(ids + sequence).to(tl.int64)
    if adapter < 0:
        return
    weights, rank = _weights(table, adapter, which, out.dtype.element_ty, aligned)
    token = (tl.program_id(0) % tiles) * rows + tl.arange(0, rows)
    line = sequence * tokens + token
    column = tl.program_id(1) * columns + tl.arange(0, columns)
    update = tl.zeros([rows, columns], tl.float32)
    for first in range(0, rank, ranks):
        r = first + tl.arange(0, ranks)
        low = to_dtype(_low(S, line, token < tokens, r, plane, width, pieces, rows, ranks), out.dtype.element_ty)
        at = r[:, None] * features + column[None, :] if which == 0 else column[None, :] * rank + r[:, None]
        weight = tl.load(weights + at, mask=(r < rank)[:, None] & (column < features)[None, :], other=0.0)
        update = tl.dot(_operand(low), _operand(weight), update, input_precision="ieee")
    mask = (token < tokens)[:, None] & (column < features)[None, :]
    place = out + line[:, None] * features + column[None, :]
    store_as(place, load_as_float32(place, mask=mask, other=0.0) + update, mask=mask)


@triton.jit
def _outer(
    x, S, table, ids, out, sequences, tokens, features, plane, width, pieces,
    which: tl.constexpr, aligned: tl.constexpr, rows: tl.constexpr, ranks: tl.constexpr, columns: tl.constexpr,
):  # fmt: skip
    """One tile of dA = S^T x, (rank, features), or of dB = (S^T dy)^T of one adapter, over the sequences that have it."""
    adapter = tl.program_id(0).to(tl.int64)
    _, rank = _weights(table, adapter, which, x.dtype.element_ty, aligned)
    r = tl.program_id(2) * ranks + tl.arange(0, ranks)
    if tl.program_id(2) * ranks >= rank:
        return
    column = tl.program_id(1) * columns + tl.arange(0, columns)
    total = tl.zeros([ranks, columns], tl.float32)
    for sequence in range(sequences):
        if tl.load(ids + sequence) == adapter:
            for first in range(0, tokens, rows):
                token = first + tl.arange(0, rows)
                here, line = token < tokens, sequence * tokens + token.to(tl.int64)
                low = to_dtype(_low(S, line, here, r, plane, width, pieces, rows, ranks), x.dtype.element_ty)
                mask = here[:, None] & (column < features)[None, :]
                part = tl.load(x + line[:, None] * features + column[None, :], mask=mask, other=0.0)
                total = tl.dot(tl.trans(_operand(low)), _operand(part), total, input_precision="ieee")
    begin = out + tl.load(table + adapter * _FIELDS + 3 + which)
    if which == 0:
        place = begin + r[:, None] * features + column[None, :]
    else:
        place = begin + column[None, :].to(tl.int64) * rank + r[:, None]
    store_as(place, total, mask=(r < rank)[:, None] & (column < features)[None, :])


class _Group:
    """The adapters of one call, and the launches over them. W (E, D); x (N, T, D)."""

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
        most = _tile(x.dtype, self.tokens)
        self.columns = most["columns"]
        self.tiles = {"rows": most["rows"], "ranks": min(most["ranks"], self.width)}
        self.how = {"aligned": even, "num_warps": 4, "enable_fp_fusion": True} | self.tiles
        self.programs = self.sequences * triton.cdiv(self.tokens, self.tiles["rows"])
        self.rank_tiles = triton.cdiv(max(self.ranks), self.tiles["ranks"])

    def shrink(self, x: Tensor, ids: Tensor, which: int) -> Tensor:
        """Return S = s x A^T, or with B of dy: s dy B, float32 (pieces, N T, ranks)."""
        features = x.shape[-1]
        wanted = min(_MOST_SPLITS, triton.cdiv(_BUSY, self.programs), triton.cdiv(features, 2 * _INNER))
        span = triton.cdiv(triton.cdiv(features, wanted), _INNER) * _INNER
        S = torch.empty(triton.cdiv(features, span), self.plane, device=x.device)
        _shrink[(self.programs, len(S), self.rank_tiles)](
            x, self.table, self.scalings, ids, S, self.tokens, features, span, self.plane, self.width,
            which=which, inner=_INNER, num_stages=3, **self.how,
        )  # fmt: skip
        return S

    def expand(self, out: Tensor, S: Tensor, ids: Tensor, which: int) -> None:
        """Add S B^T, or S A, to `out` (N, T, features)."""
        features = out.shape[-1]
        _expand[(self.programs, triton.cdiv(features, self.columns))](
            out, S, self.table, ids, self.tokens, features, self.plane, self.width, len(S),
            which=which, columns=self.columns, **self.how,
        )  # fmt: skip

    def outer(self, x: Tensor, S: Tensor, ids: Tensor, which: int) -> list[Tensor]:
        """Return the gradient of every A (of x and s dy B) or B (of dy and s x A^T); zeros where nobody has it."""
        features = x.shape[-1]
        flat = torch.empty(sum(self.ranks) * features, dtype=x.dtype, device=x.device)
        _outer[(len(self.ranks), triton.cdiv(features, self.columns), self.rank_tiles)](
            x, S, self.table, ids, flat, self.sequences, self.tokens, features, self.plane, self.width, len(S),
            which=which, columns=self.columns, **self.how,
        )  # fmt: skip
        parts = flat.split([rank * features for rank in self.ranks])
        shapes = [(rank, features) if which == _A else (features, rank) for rank in self.ranks]
        return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def _tile(dtype: torch.dtype, tokens: int) -> dict[str, int]:
    """Return what a program does at most; without matrix instructions, in float32, more would spill registers."""
    if dtype == torch.float32:
        return {"rows": 16 if tokens <= 16 else 32, "ranks": 16, "columns": 64}
    return {"rows": 16 if tokens <= 16 else 64, "ranks": 32, "columns": 128}


@lru_cache(maxsize=1024)
def _table(
    addresses: tuple[tuple[int, int], ...], ranks: tuple[int, ...], scalings: tuple[float, ...], D: int, E: int,
    device: torch.device,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the table and the scalings on the device. Kept, so that adapters that stay where they are upload nothing."""
    rows, before = [], 0
    for pair, rank in zip(addresses, ranks, strict=True):
        rows.append([*pair, rank, before * D, before * E])
        before += rank
    return torch.tensor(rows, dtype=torch.int64).to(device), torch.tensor(scalings).to(device)


class _MultiLora(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, ids: Tensor, scalings: Sequence[float], *adapters: Tensor) -> Tensor:
        given = [t.contiguous() for t in adapters]
        As, Bs = given[: len(scalings)], given[len(scalings) :]
        group = _Group(As, Bs, scalings, x)
        y = linear(x, W)
        S = group.shrink(x, ids, _A)
        group.expand(y, S, ids, _B)
        ctx.save_for_backward(x, W, ids, S, *given)
        ctx.group = group
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, W, ids, S, *_ = ctx.saved_tensors
        group, dy = ctx.group, dy.contiguous()
        (need_x, need_W), of_adapters = ctx.needs_input_grad[:2], ctx.needs_input_grad[4:]
        need_A, need_B = any(of_adapters[: len(group.ranks)]), any(of_adapters[len(group.ranks) :])
        dx = dW = None
        dAs: list[Tensor] | list[None] = [None] * len(group.ranks)
        dBs: list[Tensor] | list[None] = [None] * len(group.ranks)
        if need_x or need_A:
            dS = group.shrink(dy, ids, _B)
        if need_x:
            dx = dy @ W
            group.expand(dx, dS, ids, _A)
        if need_W:
            dW = dy.flatten(0, 1).T @ x.flatten(0, 1)
        if need_A:
            dAs = group.outer(x, dS, ids, _A)
        if need_B:
            dBs = group.outer(dy, S, ids, _B)
        return dx, dW, None, None, *dAs, *dBs


def multi_lora_linear(
    x: Tensor,
    W: Tensor,
    As: Sequence[Tensor],
    Bs: Sequence[Tensor],
    scalings: Sequence[float],
    ids: Sequence[int] | Tensor,
) -> Tensor:
    """Return x W^T + s_i x A_i^T B_i^T with i = ids[n] for each of N sequences, or the first term alone where it is -1.

    x (N, ..., D), W (E, D), As[i] (R_i, D), Bs[i] (E, R_i), all of one dtype of float32, bfloat16 and float16. Gradients
    reach x, W, As and Bs, once; an adapter that nobody has gets zeros. Raises ValueError if shapes or dtypes do not fit, or
    if an id is neither -1 nor an adapter's; of ids on a GPU the device finds that out, and the next synchronisation fails.
    """
    count = len(As)
    if not count == len(Bs) == len(scalings):
        raise ValueError(f"{count} As, {len(Bs)} Bs and {len(scalings)} scalings: each adapter has one of each")
    if any(t.dtype != x.dtype for t in (W, *As, *Bs)):
        raise ValueError(f"x, W and the adapters must be of one dtype, and x is {x.dtype}")
    if any(A.shape != (B.shape[1], W.shape[1]) or len(B) != len(W) for A, B in zip(As, Bs, strict=True)):
        raise ValueError(f"for W {tuple(W.shape)} an A must be (R, {W.shape[1]}) and its B ({W.shape[0]}, R)")
    chosen = torch.as_tensor(ids)
    if chosen.shape != x.shape[:1]:
        raise ValueError(f"{len(x)} sequences need as many ids, got shape {tuple(chosen.shape)}")
    known = (chosen >= -1) & (chosen < count)
    if chosen.device.type == "cpu":
        for wrong in chosen[~known].tolist():
            raise ValueError(f"id {wrong}: there are adapters 0 to {count - 1}, and -1 for none")
    else:
        torch._assert_async(known.all())
    if not count or not x.numel():
        return linear(x, W)
    rows = x.reshape(len(x), -1, x.shape[-1]).contiguous()
    y: Tensor = _MultiLora.apply(rows, W, chosen.to(x.device, non_blocking=True), tuple(scalings), *As, *Bs)
    return y.view(*x.shape[:-1], len(W))


def _specimens(name: str, dtype: torch.dtype, tokens: int) -> list[Specimen]:
    sizes = dict.fromkeys(("tokens", "features", "span", "plane", "width", "pieces", "sequences"), "i32")
    pointers = {"S": "*fp32", "table": "*i64", "ids": "*i64", "scalings": "*fp32", "x": f"*{name}", "out": f"*{name}"}
    tile = _tile(dtype, tokens) | {"aligned": True, "inner": _INNER}

    def of(kernel: Any, which: int) -> Specimen:
        signature = {n: t for n, t in (pointers | sizes).items() if n in kernel.arg_names}
        constants = {n: value for n, value in (tile | {"which": which}).items() if n in kernel.arg_names}
        return Specimen(
            name=f"multi_lora{kernel.__name__}-{'AB'[which]}-{name}-{tokens}", kernel=kernel, signature=signature,
            constants=constants, kind="other" if dtype == torch.float32 else "gemm", fused_multiply_add=True,
            divisible=tuple(n for n in signature if n in pointers or n in ("features", "span", "plane", "width")),
        )  # fmt: skip

    return [of(kernel, which) for kernel in (_shrink, _expand, _outer) for which in (_A, _B)]


SPECIMENS = [
    one
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32))
    for tokens in (1, 4096)
    for one in _specimens(name, dtype, tokens)
]
