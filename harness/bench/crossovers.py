"""Measure up to which size the fused kernel of an Operation is faster than another way to compute it. Needs Triton."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import linear

from harness.bench.timing import Clock, Run, pairs
from harness.kernels.card_tables import CROSSOVERS

MARGIN = 1.03
"""Factor by which another way to compute, or another tile, must be faster to replace the default.

It is compared with the median ratio of times, over pairs of samples.
"""
PAIRS = {"cuda": 11, "cpu": 3}
_BLOCK = 64
_RANK = 16
_ADAPTERS = {"cuda": 4, "cpu": 2}
"""Type of the device -> number of adapters in a batch."""


@dataclass(frozen=True)
class CrossoverMeasurement:
    """Instructions for measuring the crossover of an Operation that a fused kernel or another way can compute.

    Which of the two is faster depends on a size, e.g. on the number of tokens.
    """

    other: str
    """Name of the other way, e.g. `separate products`."""
    by_default: Literal["fused", "other"]
    """The way to use where neither way is clearly faster."""
    weights: Mapping[str, Sequence[tuple[int, int]]]
    """Type of the device -> (output features E, input features D) of each measured weight, with E ascending.

    The weights for a CPU are small: there Triton's interpreter runs the kernels, only as a rehearsal.
    """
    sizes: Mapping[str, Sequence[int]]
    """Type of the device -> sizes to measure, ascending. The sizes are numbers of tokens or ranks."""
    cases: Sequence[str]
    """Uses of the Operation that are timed, e.g. `forward`.

    The default way is replaced only at sizes at which the other way is faster in every use.
    """
    ways: Callable[[str, int, int, int, torch.device], tuple[Run, Run]]
    """Function (case, E, D, size, device) -> (call of the fused kernel, call of the other way), both to be timed."""


def _dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float16


def _packed(case: str, E: int, D: int, tokens: int, device: torch.device) -> tuple[Run, Run]:
    from harness.kernels.triton import nf4_linear
    from harness.kernels.triton.nf4 import dequantize, quantize

    packed, absmax = quantize(torch.randn(E, D, device=device), _BLOCK)
    x = torch.randn(tokens, D, device=device, dtype=_dtype(device))

    def decoded() -> Tensor:
        return linear(x, dequantize(packed, absmax, _BLOCK, (E, D), x.dtype))

    return partial(nf4_linear.fused, x, packed, absmax, _BLOCK, (E, D), None), decoded


_FORWARD, _TRAINED = "forward", "forward and backward"


def _adapters(case: str, E: int, D: int, tokens: int, device: torch.device) -> tuple[Run, Run]:
    from harness.kernels.torch.multi_lora_linear import groups, products_per_adapter
    from harness.kernels.triton.multi_lora_linear import multi_lora_linear

    draw = partial(torch.randn, device=device, dtype=_dtype(device))
    count = _ADAPTERS[device.type]
    x, W, ids = draw(count, tokens, D), draw(E, D), torch.arange(count)
    As, Bs = [draw(_RANK, D) for _ in ids], [draw(E, _RANK) for _ in ids]
    scalings = [2.0] * count

    def separate() -> Tensor:
        return products_per_adapter(x, W, As, Bs, scalings, groups(ids, count))

    leaves = [x, *As, *Bs]
    return _pass(case, partial(multi_lora_linear, x, W, As, Bs, scalings, ids), leaves), _pass(case, separate, leaves)


_TOKENS = {_FORWARD: {"cuda": 16, "cpu": 16}, _TRAINED: {"cuda": 4096, "cpu": 16}}
"""Case of `lora_linear` -> type of the device -> number of tokens.

On a GPU, the forward pass alone has few tokens, as in decoding. The other case has many, as in training.
"""


def _adapted(case: str, E: int, D: int, rank: int, device: torch.device) -> tuple[Run, Run]:
    from harness.kernels.torch.lora_linear import separate_products
    from harness.kernels.triton.lora_linear import lora_linear

    draw = partial(torch.randn, device=device, dtype=_dtype(device))
    x, W, A, B = draw(_TOKENS[case][device.type], D), draw(E, D), draw(rank, D), draw(E, rank)
    given = (x, W, None, A, B, 2.0, None)
    ways = partial(lora_linear, *given), partial(separate_products, *given)
    return _pass(case, ways[0], [x, A, B]), _pass(case, ways[1], [x, A, B])


def _pass(case: str, forward: Callable[[], Tensor], leaves: Sequence[Tensor]) -> Run:
    """Return the function to time. It calls `forward` and, unless `case` is `forward`, computes gradients.

    leaves: the tensors whose gradients are computed.
    """
    if case == _FORWARD:
        return torch.no_grad()(forward)
    for leaf in leaves:
        leaf.requires_grad_()
    dy = torch.ones_like(forward())

    def both() -> object:
        return torch.autograd.grad(forward(), leaves, dy)

    return both


_SMALL = ((64, 64),)
CROSSOVER_MEASUREMENTS = {
    "nf4_linear": CrossoverMeasurement(
        other="decode, then multiply", by_default="other",
        weights={"cuda": ((1024, 4096), (4096, 4096), (10240, 5120), (14336, 4096), (28672, 8192)), "cpu": _SMALL},
        sizes={"cuda": (1, 8, 16, 32, 64, 128, 256), "cpu": (1,)}, cases=(_FORWARD,), ways=_packed,
    ),
    "multi_lora_linear": CrossoverMeasurement(
        other="products per adapter", by_default="fused",
        weights={"cuda": ((1024, 4096), (4096, 4096), (14336, 4096)), "cpu": _SMALL},
        sizes={"cuda": (1, 16, 128, 512, 2048), "cpu": (4,)}, cases=(_FORWARD, _TRAINED), ways=_adapters,
    ),
    "lora_linear": CrossoverMeasurement(
        other="separate products", by_default="fused",
        weights={"cuda": ((1024, 4096), (4096, 4096), (14336, 4096)), "cpu": _SMALL},
        sizes={"cuda": (16, 32, 64, 128, 256), "cpu": (4,)}, cases=(_FORWARD, _TRAINED), ways=_adapted,
    ),
}  # fmt: skip
"""Operation -> the measurement of its crossover. The weights for a GPU have sizes of Llama 3 and sizes in between."""


def measure(operation: str, clock: Clock) -> Iterator[dict[str, Any]]:
    """Yield a row for each weight, size and case of an Operation, in this order. Weights and inputs are random.

    `fused_s` and `other_s` are the median seconds of the fused kernel and of the other way. `ratio` is fused time /
    other time, the median over pairs of samples.
    """
    crossing, kind = CROSSOVER_MEASUREMENTS[operation], clock.device.type
    torch.manual_seed(0)
    for E, D in crossing.weights[kind]:
        for size in crossing.sizes[kind]:
            for case in crossing.cases:
                fused, other = crossing.ways(case, E, D, size, clock.device)
                found = pairs(clock, fused, other, PAIRS[kind], single=True)
                yield {
                    "operation": operation, "E": E, "D": D, "case": case, CROSSOVERS[operation]: size,
                    "fused_s": median(found.ours), "other_s": median(found.other),
                    "ratio": median(a / b for a, b in zip(found.ours, found.other, strict=True)),
                }  # fmt: skip


def table(operation: str, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the crossovers of an Operation, as a section of the card's table. rows: the rows of `measure`.

    The default way is kept between two measured sizes, and where neither way is faster by `MARGIN`.
    """
    size = CROSSOVERS[operation]
    found = [
        {"E": E, size: _limit(operation, [row for row in rows if row["E"] == E])}
        for E in dict.fromkeys(row["E"] for row in rows)
    ]
    return {"standing": "measured by `peft-harness bench --crossovers`", "rows": found, "times": list(rows)}


def _limit(operation: str, rows: Sequence[dict[str, Any]]) -> int | None:
    """Return the largest size for which the fused kernel is used: 0 if it is never used, None if always.

    rows: the rows of one weight, as `measure` yields them.
    """
    by_size: dict[int, list[float]] = {}
    for row in rows:
        by_size.setdefault(row[CROSSOVERS[operation]], []).append(row["ratio"])
    if CROSSOVER_MEASUREMENTS[operation].by_default == "other":
        most = 0
        for size, ratios in by_size.items():
            if max(ratios) * MARGIN >= 1:
                break
            most = size
        return most
    limit = None
    for size, ratios in reversed(by_size.items()):
        if min(ratios) <= MARGIN:
            break
        limit = size - 1
    return limit
