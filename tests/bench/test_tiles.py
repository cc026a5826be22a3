"""The search for the fastest tile: it is bounded, keeps the default on a tie, and survives a tile that does not compile."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="tiles are those of Triton's kernels")

from triton.runtime.errors import OutOfResources, PTXASError

from harness.bench import card, crossovers, tiles
from harness.bench.crossovers import MARGIN
from harness.errors import Exit
from harness.kernels import card_tables, crossover
from harness.kernels.triton.support import low_rank_gemm
from harness.kernels.triton.support.gemm_tiles import CANDIDATES, LARGE, GemmTile

FIRST, SECOND, *_ = CANDIDATES[LARGE]


class Card:
    """A card on which each tile takes a fixed time, except that a series may be lucky."""

    def __init__(self, *, first: float = 1.0, second: float = 1.0, lucky: int = 0) -> None:
        self.seconds = {LARGE: 1.0, FIRST: first, SECOND: second}
        self.lucky = lucky
        self.compared: list[tuple[GemmTile, GemmTile]] = []

    def ratio(self, one: GemmTile, other: GemmTile) -> float:
        self.compared.append((one, other))
        luck = 1.5 if len(self.compared) == self.lucky else 1.0
        return luck * self.seconds[one] / self.seconds[other]

    def choose(self, refused: GemmTile | None = None) -> tiles.Choice:
        return tiles.choose(
            LARGE, (FIRST, SECOND), self.ratio, lambda one: "spills registers" if one == refused else ""
        )


@pytest.mark.parametrize(
    ("given", "tile"),
    [
        (Card(), LARGE),
        (Card(first=1 / MARGIN, second=1.5), LARGE),  # a tie
        (Card(second=0.8), SECOND),
        (Card(first=0.8, second=0.799), FIRST),  # a tie of the candidates: the first one stays
        (Card(first=0.8, second=0.6), SECOND),
        (Card(lucky=1), LARGE),  # a lucky series is not confirmed
    ],
)
def test_a_tile_is_replaced_only_by_one_that_is_clearly_faster(given: Card, tile: GemmTile) -> None:
    assert given.choose().tile == tile
    assert len(given.compared) <= 3
    assert given.compared[0] == (LARGE, FIRST)


def test_a_refused_tile_is_not_timed() -> None:
    given = Card(first=0.1, second=0.8)
    found = given.choose(refused=FIRST)
    assert (found.tile, found.ratio) == (SECOND, 1.25)
    assert found.refused == {"128x128x64, 8 warps, 4 stages": "spills registers"}
    assert all(FIRST not in pair for pair in given.compared)


@pytest.mark.parametrize(
    ("outcome", "reason"),
    [
        (SimpleNamespace(n_spills=0), ""),
        (None, ""),  # by the interpreter
        (SimpleNamespace(n_spills=12), "spills registers"),
        (OutOfResources(300_000, 232_448, "shared memory"), "out of resource: shared memory, Required: 300000"),
        (PTXASError("too many registers\nfor this tile"), "PTXAS error: too many registers"),
    ],
)
def test_a_tile_that_spills_or_does_not_fit_is_refused(
    outcome: Any, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    product, launches = planted(monkeypatch)
    launches[FIRST] = outcome
    assert product.reason(FIRST).startswith(reason)
    assert bool(product.reason(FIRST)) == bool(reason)


def test_a_tile_that_changes_a_bit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    product, _ = planted(monkeypatch)
    product.expected[1][3, 5] += 0.125
    assert product.reason(FIRST) == "rounds in another way"


def test_an_error_that_is_not_of_the_tile_ends_the_search(monkeypatch: pytest.MonkeyPatch) -> None:
    product, launches = planted(monkeypatch)
    launches[FIRST] = RuntimeError("CUDA error: an illegal memory access was encountered")
    with pytest.raises(RuntimeError, match="illegal memory access"):
        product.reason(FIRST)


def planted(monkeypatch: pytest.MonkeyPatch) -> tuple[tiles._Product, dict[GemmTile, Any]]:
    """Return a product, and the outcome of each tile's launches: what Triton returns, or the error that it raises."""
    outcomes: dict[GemmTile, Any] = {}

    def launch(tile: GemmTile, operands: Any, **_: Any) -> Any:
        def run() -> Any:
            operands[0].fill_(1)
            if isinstance(found := outcomes.get(tile), Exception):
                raise found
            return found

        return SimpleNamespace(run=run)

    monkeypatch.setattr(low_rank_gemm, "product_launch", launch)
    clock: Any = SimpleNamespace(device=torch.device("cpu"))
    return tiles._Product(clock, 16, 32, 32, torch.float16, LARGE), outcomes


def test_a_search_that_fails_leaves_the_table_of_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"operation": "lora_linear", "E": 4096, "D": 4096, "case": "forward", "rank": 64, "ratio": 1.2}
    table = {"card": "ACME X1", "lora_linear": crossovers.table("lora_linear", [row])}
    events = [
        {"card": "ACME X1"}, {"row": row | {"fused_s": 1.2e-3, "other_s": 1e-3}}, {"file": "acme-x1.json", "table": table},
        {"failed": "RuntimeError: misaligned address", "traceback": "Traceback ..."},
    ]  # fmt: skip
    monkeypatch.setattr(card, "no_gpu", lambda: "")
    monkeypatch.setattr(card, "WorkerPool", lambda: SimpleNamespace(events=lambda *_: events))
    assert card.measure("crossovers", "cuda", 60.0, False, tmp_path) == Exit.INFRASTRUCTURE
    shown = capsys.readouterr()
    assert "lora_linear: largest rank for the fused kernel: 63 from E = 4096" in shown.out
    assert "misaligned address" in shown.err
    assert json.loads((tmp_path / "acme-x1.json").read_bytes()) == table
    assert crossover.limits(card_tables.read(tmp_path / "acme-x1.json"), "lora_linear") == [(4096, 63)]


def test_only_changed_tiles_are_in_the_table_and_all_are_shown() -> None:
    shape = {"operation": "tile", "dtype": "bfloat16", "M": 4096, "N": 1024, "K": 4096, "refused": {}}
    kept = shape | {"default": vars(LARGE), "tile": vars(LARGE), "ratio": 1.0}
    changed = shape | {"M": 8192, "default": vars(LARGE), "tile": vars(replace(LARGE, stages=4)), "ratio": 1.25}
    table = {"tiles": tiles.section([kept, changed], {"triton": "3.9.0"})}
    assert table["tiles"]["rows"] == [changed]
    assert table["tiles"]["stamp"] == {"triton": "3.9.0"}
    report = card.CardReport("crossovers", "cuda", {}, rows=[kept, changed], table=table, card="NVIDIA H100")
    shown = "\n".join(report.lines())
    assert "none is faster" in shown
    assert "128x128x64, 8 warps, 4 stages" in shown
    (found,) = report.document()["found"]
    assert found == "tiles: 1 shape with a tile that is faster than the default"
    assert found in shown
