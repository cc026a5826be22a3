"""Measure which tile of a matrix product is fastest on a GPU ("card"). Needs Triton.

A tile is the part of the output that one program of the kernel computes. For each shape in `SHAPES`, the search tries
the few candidates of `harness.kernels.triton.support.gemm_tiles`, always in the same order. The default stays unless
another tile is clearly faster.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

import torch

from harness.bench.card import short_tile
from harness.bench.crossovers import MARGIN, PAIRS
from harness.bench.timing import Clock, pairs

if TYPE_CHECKING:
    from harness.kernels.triton.support.gemm_tiles import GemmTile
    from harness.kernels.triton.support.launch import KernelLaunch

SHAPES = {
    "cuda": ((16, 32, 64, 256, 1024, 2048, 4096, 8192), ((1024, 4096), (4096, 4096), (14336, 4096))),
    "cpu": ((16,), ((64, 64),)),
}
"""Device -> the measured values of M, and the measured pairs (N, K).

The output has M rows and N columns, and each of its elements is a sum of K terms. A call with another M or N uses the
tile of the measured shape whose M and N round up to the same numbers (`tuned_tiles.bucket`), if both shapes have the
same default tile.
"""
DTYPES = {"cuda": (torch.bfloat16, torch.float16), "cpu": (torch.float16,)}
RANK = 64
"""Rank of the low-rank term in the measured products. A kernel's iteration handles at most so many ranks, and then needs
the most shared memory."""
_COMPILER_FAILED = "PassManager::run failed"
"""Text of the RuntimeError that Triton raises if a pass of its compiler fails."""


@dataclass(frozen=True)
class ChosenTile:
    """The tile that a search has chosen."""

    tile: GemmTile
    ratio: float
    """Time of the default tile / time of this tile, the median over pairs. 1 if this is the default tile."""
    refused: dict[str, str]
    """Candidate tile, as text -> reason why it was not timed."""


def choose(
    default: GemmTile, candidates: Sequence[GemmTile], ratio: Callable[[GemmTile, GemmTile], float],
    reason: Callable[[GemmTile], str],
) -> ChosenTile:  # fmt: skip
    """Return the fastest tile. Another tile replaces the default only if it is faster by more than `MARGIN`.

    The winner must beat the default again in a second series. ratio: measures (time of the first tile) / (time of the
    second). reason: returns the reason why a candidate cannot be used, or an empty string.
    """
    best, refused = default, {}
    for candidate in candidates:
        if why := reason(candidate):
            refused[short_tile(asdict(candidate))] = why
        elif ratio(best, candidate) > MARGIN:
            best = candidate
    if best == default or (found := ratio(default, best)) <= MARGIN:
        return ChosenTile(default, 1.0, refused)
    return ChosenTile(best, found, refused)


def measure(clock: Clock) -> Iterator[dict[str, Any]]:
    """Yield the default and the chosen tile of each dtype and shape, with the ratio of their times."""
    from harness.kernels.triton.support.gemm_tiles import CANDIDATES, gemm_tile
    from harness.kernels.triton.support.tuned_tiles import name_of

    kind = clock.device.type
    torch.manual_seed(0)
    rows, weights = SHAPES[kind]
    for dtype in DTYPES[kind]:
        for N, K in weights:
            for M in rows:
                default = gemm_tile(M, N, dtype, clock.device)
                product = _Product(clock, M, N, K, dtype, default)
                chosen = choose(default, CANDIDATES[default], product.ratio, product.reason)
                yield {
                    "operation": "tile", "dtype": name_of(dtype), "M": M, "N": N, "K": K, "default": asdict(default),
                    "tile": asdict(chosen.tile), "ratio": chosen.ratio, "refused": chosen.refused,
                }  # fmt: skip


class _Product:
    """Two matrix products of one shape: one with the weight as in a forward pass, one with the weight transposed.

    The first product has all optional tensors for which tiles are tuned. No call with the same tile needs more
    registers.
    """

    def __init__(self, clock: Clock, M: int, N: int, K: int, dtype: torch.dtype, default: GemmTile) -> None:
        def drawn(*shape: int) -> torch.Tensor:
            return torch.randn(shape, dtype=dtype, device=clock.device)

        self.clock = clock
        self.left, self.S = drawn(M, K), drawn(M, RANK)
        self.rights = [(drawn(N, K).T, drawn(N, RANK).T), (drawn(K, N), drawn(RANK, N))]
        self.vectors = {"bias": drawn(N), "term_scale": drawn(N)}
        self.outs = [drawn(M, N) for _ in self.rights]
        for launch in self.launches(default):
            launch.run()
        self.expected = [out.clone() for out in self.outs]

    def launches(self, tile: GemmTile) -> list[KernelLaunch]:
        from harness.kernels.triton.support.low_rank_gemm import product_launch

        return [
            product_launch(tile, (out, self.left, right, self.S, T), scale=2.0, **vectors)
            for out, (right, T), vectors in zip(self.outs, self.rights, (self.vectors, {}), strict=True)
        ]

    def reason(self, tile: GemmTile) -> str:
        """Return the reason why a tile cannot be used, or an empty string.

        A tile cannot be used if it does not compile, spills registers or changes the result. The outputs are filled
        with NaN first, so that missing elements are noticed.
        """
        from triton.compiler.errors import CompilationError
        from triton.runtime.errors import OutOfResources, PTXASError

        for out in self.outs:
            out.fill_(torch.nan)
        try:
            compiled = [launch.run() for launch in self.launches(tile)]
        except (CompilationError, OutOfResources, PTXASError) as error:
            return str(error).strip().partition("\n")[0]
        except RuntimeError as error:
            if _COMPILER_FAILED not in str(error):
                raise
            return str(error).strip().partition("\n")[0]
        if any(one is not None and one.n_spills for one in compiled):
            return "spills registers"
        same = all(torch.equal(one, other) for one, other in zip(self.outs, self.expected, strict=True))
        return "" if same else "changes the result"

    def ratio(self, first: GemmTile, second: GemmTile) -> float:
        runs = [self.launches(tile) for tile in (first, second)]

        def timed(launches: list[KernelLaunch]) -> Callable[[], None]:
            def run() -> None:
                for launch in launches:
                    launch.run()

            return run

        found = pairs(self.clock, timed(runs[0]), timed(runs[1]), PAIRS[self.clock.device.type], single=True)
        return median(a / b for a, b in zip(found.ours, found.other, strict=True))


def section(rows: Sequence[dict[str, Any]], stamp: dict[str, Any]) -> dict[str, Any]:
    """Return the section `tiles` of a card's table. rows: the rows of `measure`.

    In the section, `shapes` is the number of all rows, and `rows` has only the rows whose tile is not the default.
    stamp: the result of `tuned_tiles.stamp`; the tiles are valid only for this stamp.
    """
    changed = [row for row in rows if row["tile"] != row["default"]]
    standing = "measured by `peft-harness bench --crossovers`"
    return {"standing": standing, "stamp": stamp, "shapes": len(rows), "rows": changed}
