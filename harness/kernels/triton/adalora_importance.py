"""AdaLoRA's importance scores (arXiv:2303.10512, eqs. 7 to 11) of all layers in two launches.

Separate torch operations launch some thirty kernels per layer. Here one launch reaches the tensors of all layers
through a table of their addresses. The table is made at each call, because gradients get new addresses. In the first
launch, each program updates the averages of one tile of an A or B, and sums the tile's importance. The second launch
adds these sums, always in the same order, and updates the averages of E.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from harness.kernels.compile.specimen import Specimen
from harness.kernels.device import interpreted
from harness.kernels.triton.support.launch import launch
from harness.kernels.triton.support.rounding import load_as_float32

_TILE = 1 << 14 if interpreted() else 2048  # weights per program
_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_COLUMNS = tl.constexpr(
    14
)  # per layer in the table: addresses of A, E and B with their states, then D and the rows of B
_A, _E, _B, _D, _OUT = (tl.constexpr(at) for at in (0, 4, 8, 12, 13))
_GRADIENTS = (1, 5, 9)


@triton.jit
def _pointer(row, column, dtype: tl.constexpr, aligned: tl.constexpr):
    pointer = tl.load(row + column).to(tl.pointer_type(dtype))
    return tl.multiple_of(pointer, 16) if aligned else pointer


@triton.jit
def _update(row, first: tl.constexpr, at, mask, beta1, rest1, beta2, rest2, dtype: tl.constexpr, aligned: tl.constexpr):
    """Update the averages I and U of the elements at the offsets `at`, and return the products I U.

    row: pointer to the layer's line in the table of addresses. From the column `first` on, this line has the addresses
    of a factor, of its gradient (0 for none), of I and of U.
    """
    has_gradient = tl.broadcast_to(tl.load(row + first + 1), mask.shape) != 0
    w = load_as_float32(_pointer(row, first, dtype, aligned) + at, mask=mask, other=0.0)
    gradient = load_as_float32(_pointer(row, first + 1, dtype, aligned) + at, mask=mask & has_gradient, other=0.0)
    averages, uncertainties = (
        _pointer(row, first + 2, tl.float32, aligned) + at,
        _pointer(row, first + 3, tl.float32, aligned) + at,
    )
    sensitivity = tl.abs(w * gradient)
    average = beta1 * tl.load(averages, mask=mask, other=0.0) + rest1 * sensitivity
    uncertainty = beta2 * tl.load(uncertainties, mask=mask, other=0.0) + rest2 * tl.abs(sensitivity - average)
    tl.store(averages, average, mask=mask)
    tl.store(uncertainties, uncertainty, mask=mask)
    return average * uncertainty


@triton.jit
def _weights(
    table, jobs, sums, beta1, rest1, beta2, rest2,
    dtype: tl.constexpr, rank: tl.constexpr, columns: tl.constexpr, tile: tl.constexpr, aligned: tl.constexpr,
):  # fmt: skip
    """Update the averages of one tile of an A or B, and store sums of the products I U.

    jobs: three numbers per program: the layer; the row of A, or -1 for B; the number of the tile. sums: `columns`
    numbers per program. For A, the first number is the sum over the tile. For B, there is one sum per rank.
    """
    job = tl.program_id(0).to(tl.int64)
    row = table + tl.load(jobs + 3 * job).to(tl.int64) * _COLUMNS
    which, number = tl.load(jobs + 3 * job + 1).to(tl.int64), tl.load(jobs + 3 * job + 2)
    if which >= 0:
        width = tl.load(row + _D)
        width = tl.multiple_of(width, 16) if aligned else width
        along = number * tile + tl.arange(0, tile)
        of_row = _update(
            row, _A, which * width + along, along < width, beta1, rest1, beta2, rest2, dtype, aligned
        )  # fmt: skip
        tl.store(sums + job * columns, tl.sum(of_row, 0))
    else:
        height: tl.constexpr = tile // columns
        line = number.to(tl.int64) * height + tl.arange(0, height)[:, None]
        column = tl.arange(0, columns)[None, :]
        mask = (line < tl.load(row + _OUT)) & (column < rank)
        of_columns = _update(row, _B, line * rank + column, mask, beta1, rest1, beta2, rest2, dtype, aligned)
        tl.store(sums + job * columns + tl.arange(0, columns), tl.sum(of_columns, 0))


@triton.jit
def _scores(
    table,
    layers,
    sums,
    scores,
    beta1,
    rest1,
    beta2,
    rest2,
    dtype: tl.constexpr,
    rank: tl.constexpr,
    columns: tl.constexpr,
):
    """Update the averages of one layer's E, and compute the layer's scores.

    layers: four numbers per layer: index of A's first job, tiles per row of A, index of B's first job, tiles of B. A
    job is a program of `_weights`.
    """
    layer = tl.program_id(0).to(tl.int64)
    row, place = table + layer * _COLUMNS, layers + 4 * layer
    first_a, tiles_a = tl.load(place).to(tl.int64), tl.load(place + 1)
    first_b, tiles_b = tl.load(place + 2).to(tl.int64), tl.load(place + 3)
    r = tl.arange(0, columns)
    score = _update(row, _E, r, r < rank, beta1, rest1, beta2, rest2, dtype, False)
    of_a, of_b = tl.zeros([columns], tl.float32), tl.zeros([columns], tl.float32)
    for tile in range(tiles_a):
        of_a += tl.load(sums + (first_a + r * tiles_a + tile) * columns, mask=r < rank, other=0.0)
    for tile in range(tiles_b):
        of_b += tl.load(sums + (first_b + tile) * columns + r, mask=r < rank, other=0.0)
    score += of_b / tl.load(row + _OUT).to(tl.float32) + of_a / tl.load(row + _D).to(tl.float32)
    tl.store(scores + layer * rank + r, score, mask=r < rank)


def adalora_importance(
    A: Tensor, E: Tensor, B: Tensor, grad_A: Tensor | None, grad_E: Tensor | None, grad_B: Tensor | None,
    I_A: Tensor, U_A: Tensor, I_E: Tensor, U_E: Tensor, I_B: Tensor, U_B: Tensor, beta1: float, beta2: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Return I_A, U_A, I_E, U_E, I_B, U_B of one layer after one step, and the layer's scores (R,).

    The arguments are those of one layer in `adalora_importance_`. They are not modified.
    """
    states = [t.clone(memory_format=torch.contiguous_format) for t in (I_A, U_A, I_E, U_E, I_B, U_B)]
    averages = dict(zip(("I_A", "U_A", "I_E", "U_E", "I_B", "U_B"), ([t] for t in states), strict=True))
    (scores,) = adalora_importance_([A], [E], [B], [grad_A], [grad_E], [grad_B], beta1=beta1, beta2=beta2, **averages)
    return (*states, scores)


def adalora_importance_(
    A: Sequence[Tensor], E: Sequence[Tensor], B: Sequence[Tensor],
    grad_A: Sequence[Tensor | None], grad_E: Sequence[Tensor | None], grad_B: Sequence[Tensor | None],
    I_A: Sequence[Tensor], U_A: Sequence[Tensor], I_E: Sequence[Tensor], U_E: Sequence[Tensor],
    I_B: Sequence[Tensor], U_B: Sequence[Tensor], beta1: float, beta2: float,
) -> list[Tensor]:  # fmt: skip
    """Update the averages of several layers by one step, in place. Return each layer's scores (R,), float32.

    Each layer has factors A (R, D), E (R, 1) and B (out, R) of one dtype: float32, bfloat16 or float16. A gradient of
    None stands for zeros. For each factor, I is the average of the sensitivity and U the average of the uncertainty. I
    and U are contiguous and always float32. Layers of the same rank, dtype and device share the launches. Raises
    ValueError if an average is not contiguous float32, or if the factors of a layer differ in rank or dtype.
    """
    layers = list(
        zip(A, grad_A, I_A, U_A, E, grad_E, I_E, U_E, B, grad_B, I_B, U_B, strict=True)
    )  # fmt: skip
    for layer in layers:
        states = [layer[at] for at in (2, 3, 6, 7, 10, 11)]
        if not all(t is not None and t.dtype == torch.float32 and t.is_contiguous() for t in states):
            raise ValueError("the averages must be contiguous float32 tensors, since they are updated in place")
    groups: dict[tuple[int, torch.dtype, torch.device], list[int]] = defaultdict(list)
    for index, (a, e, b) in enumerate(zip(A, E, B, strict=True)):
        if not a.dtype == e.dtype == b.dtype or not len(a) == len(e) == b.shape[1]:
            shown = ", ".join(f"{name} {tuple(t.shape)} {t.dtype}" for name, t in (("A", a), ("E", e), ("B", b)))
            raise ValueError(f"layer {index}: {shown}: ranks and dtypes must be equal")
        groups[len(a), a.dtype, a.device].append(index)
    scores_of: dict[int, Tensor] = {}
    for (rank, dtype, _), members in groups.items():
        scores = _group([layers[index] for index in members], rank, dtype, beta1, beta2)
        scores_of |= zip(members, scores, strict=True)
    return [scores_of[index] for index in range(len(layers))]


def _group(
    layers: list[tuple[Tensor | None, ...]], rank: int, dtype: torch.dtype, beta1: float, beta2: float
) -> Sequence[Tensor]:
    tensors = [
        [
            None if t is None else (t.to(dtype) if at in _GRADIENTS else t).detach().contiguous()
            for at, t in enumerate(layer)
        ]
        for layer in layers
    ]
    shapes = tuple((layer[0].shape[1], layer[8].shape[0]) for layer in tensors)  # type: ignore[union-attr]
    rows = [
        [0 if t is None else t.data_ptr() for t in layer] + list(shape)
        for layer, shape in zip(tensors, shapes, strict=True)
    ]
    device = tensors[0][2].device  # type: ignore[union-attr]
    table = _uploaded(torch.tensor(rows, dtype=torch.int64), device)
    columns = triton.next_power_of_2(rank)
    tile = max(_TILE, columns)
    jobs, places = _jobs(shapes, rank, columns, tile, device)
    sums = torch.empty(len(jobs), columns, device=device)
    scores = torch.empty(len(layers), rank, device=device)
    betas, options = (beta1, 1 - beta1, beta2, 1 - beta2), {"num_warps": 4, "enable_fp_fusion": True}
    aligned = all(address % 16 == 0 for row in rows for address in row[:12]) and all(D % 16 == 0 for D, _ in shapes)
    of = {"dtype": _TYPES[dtype], "rank": rank, "columns": columns}
    launch(_weights, (len(jobs),), table, jobs, sums, *betas, **of, tile=tile, aligned=aligned, **options)
    launch(_scores, (len(layers),), table, places, sums, scores, *betas, **of, **options)
    return scores.unbind()


def _uploaded(table: Tensor, device: torch.device) -> Tensor:
    """Return a copy of the table on the device. The host does not wait for the copy to finish."""
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table


@lru_cache(maxsize=64)
def _jobs(
    shapes: tuple[tuple[int, int], ...], rank: int, columns: int, tile: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return the arguments `jobs` of `_weights` and `layers` of `_scores`, int32. The result is cached.

    shapes: (D, out) of each layer.
    """
    jobs: list[tuple[int, int, int]] = []
    places = []
    for layer, (width, height) in enumerate(shapes):
        tiles_a, tiles_b = triton.cdiv(width, tile), triton.cdiv(height, tile // columns)
        places.append((len(jobs), tiles_a, len(jobs) + rank * tiles_a, tiles_b))
        jobs += [(layer, row, number) for row in range(rank) for number in range(tiles_a)]
        jobs += [(layer, -1, number) for number in range(tiles_b)]
    return torch.tensor(jobs, dtype=torch.int32).to(device), torch.tensor(places, dtype=torch.int32).to(device)


_BETAS = dict.fromkeys(("beta1", "rest1", "beta2", "rest2"), "fp32")


def _specimens(dtype: tl.dtype, rank: int) -> list[Specimen]:
    columns = triton.next_power_of_2(rank)
    of = {"dtype": dtype, "rank": rank, "columns": columns}
    tables = {"table": "*i64", "sums": "*fp32"}
    return [
        Specimen(
            name=f"adalora_importance-{dtype.name}-{rank}", kernel=_weights, kind="streaming", fused_multiply_add=True,
            signature=tables | {"jobs": "*i32"} | _BETAS, constants=of | {"tile": 2048, "aligned": True},
            divisible=("table", "jobs", "sums"),
        ),
        Specimen(
            name=f"adalora_scores-{dtype.name}-{rank}", kernel=_scores, fused_multiply_add=True,
            signature=tables | {"layers": "*i32", "scores": "*fp32"} | _BETAS, constants=of,
            divisible=("table", "layers", "sums", "scores"),
        ),
    ]  # fmt: skip


SPECIMENS = [one for dtype, rank in ((tl.bfloat16, 16), (tl.float32, 12)) for one in _specimens(dtype, rank)]
