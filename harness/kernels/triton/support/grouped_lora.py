"""Kernels that compute several LoRA adapters in one launch.

A table holds the addresses of the adapters. Each sequence has the id of an adapter, which is the adapter's place in the
table. An adapter has the factors A and B and the scaling s. x is the layer's input, and dy the gradient of its output.
`shrink` sums over features and computes S = s x A^T or S = s dy B. `expand` adds S B^T or S A to the product with W,
which cuBLAS computes. `outer` sums over tokens and computes S^T x or S^T dy. The host neither waits nor sorts. Each sum
has a fixed order and uses no atomics.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from harness.kernels.compile.specimen import Specimen
from harness.kernels.triton.support.matrix_product import product
from harness.kernels.triton.support.rounding import load_as_float32, store_as, to_dtype

INNER = 64  # features per iteration of a sum
FIELDS = tl.constexpr(5)  # per adapter in the table: addresses of A and B, rank, offsets of dA and dB
MOST_REGISTERS = 168  # in `expand` and `outer`; by default, ptxas spills one so that one more program fits


@triton.jit
def _weights(table, adapter, which: tl.constexpr, dtype: tl.constexpr, aligned: tl.constexpr):
    """Return the address of an adapter's A (if `which` is 0) or B (if it is 1), and the adapter's rank.

    aligned: whether 16 divides the address and 8 divides the rank.
    """
    pointer = tl.load(table + adapter * FIELDS + which).to(tl.pointer_type(dtype))
    rank = tl.load(table + adapter * FIELDS + 2)
    if aligned:
        pointer, rank = tl.multiple_of(pointer, 16), tl.multiple_of(rank, 8)
    return pointer, rank


@triton.jit
def shrink(
    x, table, scalings, ids, S, tokens, features, span, plane, width,
    which: tl.constexpr, aligned: tl.constexpr, rows: tl.constexpr, ranks: tl.constexpr, inner: tl.constexpr,
):  # fmt: skip
    """Compute one tile of S: some ranks, for some tokens of a sequence.

    The shape of S is (pieces, all tokens, width). Each piece is the partial sum over `span` features. The sum of the
    pieces is scaling x A^T (if `which` is 0), or scaling dy B (if it is 1, and x holds dy).
    """
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
    if tl.program_id(2) * ranks >= rank:  # this adapter has fewer ranks; nothing reads these
        return
    total = tl.zeros([rows, ranks], tl.float32)
    begin = tl.program_id(1) * span
    for first in range(begin, tl.minimum(begin + span, features), inner):
        k = first + tl.arange(0, inner)
        part = tl.load(
            x + line[:, None] * features + k[None, :], mask=here[:, None] & (k < features)[None, :], other=0.0
        )
        # A is (rank, features), and B is (features, rank).
        at = r[None, :] * features + k[:, None] if which == 0 else k[:, None] * rank + r[None, :]
        weight = tl.load(weights + at, mask=(k < features)[:, None] & (r < rank)[None, :], other=0.0)
        total = product(part, weight, total)
    total *= tl.load(scalings + adapter)
    place = S + tl.program_id(1).to(tl.int64) * plane + line[:, None] * width + r[None, :]
    tl.store(place, total, mask=here[:, None])


@triton.jit
def _low(S, line, here, r, plane, width, pieces, rows: tl.constexpr, ranks: tl.constexpr):
    """Return the sum of the pieces of S (see `shrink`) for these tokens and ranks, float32 (rows, ranks).

    line: the tokens' rows in S.
    """
    low = tl.zeros([rows, ranks], tl.float32)
    place = S + line[:, None] * width + r[None, :]
    for _ in range(pieces):
        low += tl.load(place, mask=here[:, None], other=0.0)
        place += plane
    return low


@triton.jit
def expand(
    out, S, table, ids, tokens, features, plane, width, pieces,
    which: tl.constexpr, aligned: tl.constexpr, rows: tl.constexpr, ranks: tl.constexpr, columns: tl.constexpr,
):  # fmt: skip
    """Add S A (if `which` is 0) or S B^T (if it is 1) to one tile of `out`. The pieces of S are summed first.

    A tile consists of some tokens of a sequence and some features.
    """
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
        update = product(low, weight, update)
    mask = (token < tokens)[:, None] & (column < features)[None, :]
    place = out + line[:, None] * features + column[None, :]
    store_as(place, load_as_float32(place, mask=mask, other=0.0) + update, mask=mask)


@triton.jit
def outer(
    x, S, table, ids, out, sequences, tokens, features, plane, width, pieces,
    which: tl.constexpr, aligned: tl.constexpr, rows: tl.constexpr, ranks: tl.constexpr, columns: tl.constexpr,
):  # fmt: skip
    """Compute one tile of the gradient of one adapter's A or B, summed over all sequences of the adapter.

    If `which` is 0, the gradient is that of A: S^T x, shape (rank, features). If `which` is 1, it is that of B: (S^T
    dy)^T, shape (features, rank), and the argument x holds dy.
    """
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
                total = product(tl.trans(low), part, total)
    begin = out + tl.load(table + adapter * FIELDS + 3 + which)
    if which == 0:
        place = begin + r[:, None] * features + column[None, :]
    else:
        place = begin + column[None, :].to(tl.int64) * rank + r[:, None]
    store_as(place, total, mask=(r < rank)[:, None] & (column < features)[None, :])


def tile(dtype: torch.dtype, tokens: int) -> dict[str, int]:
    """Return the size of the tile that a program computes: its `rows`, `ranks` and `columns`.

    The tile is the largest that does not spill registers, and smaller in float32 than in 16 bits. tokens: number of
    tokens per sequence.
    """
    if dtype == torch.float32:
        return {"rows": 16 if tokens <= 16 else 32, "ranks": 16, "columns": 64}
    return {"rows": 16 if tokens <= 16 else 64, "ranks": 32, "columns": 128}


def _specimens(name: str, dtype: torch.dtype, tokens: int) -> list[Specimen]:
    sizes = dict.fromkeys(("tokens", "features", "span", "plane", "width", "pieces", "sequences"), "i32")
    pointers = {"S": "*fp32", "table": "*i64", "ids": "*i64", "scalings": "*fp32", "x": f"*{name}", "out": f"*{name}"}
    fixed = tile(dtype, tokens) | {"aligned": True, "inner": INNER}

    def of(kernel: Any, which: int) -> Specimen:
        signature = {n: t for n, t in (pointers | sizes).items() if n in kernel.arg_names}
        constants = {n: value for n, value in (fixed | {"which": which}).items() if n in kernel.arg_names}
        return Specimen(
            name=f"multi_lora_{kernel.__name__}-{'AB'[which]}-{name}-{tokens}", kernel=kernel, signature=signature,
            constants=constants, kind="other" if dtype == torch.float32 else "gemm", fused_multiply_add=True,
            divisible=tuple(n for n in signature if n in pointers or n in ("features", "span", "plane", "width")),
            options={} if kernel is shrink else {"maxnreg": MOST_REGISTERS},
        )  # fmt: skip

    return [of(kernel, which) for kernel in (shrink, expand, outer) for which in (0, 1)]


SPECIMENS = [
    one
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32))
    for tokens in (1, 4096)
    for one in _specimens(name, dtype, tokens)
]
