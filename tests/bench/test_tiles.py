"""The search for the fastest tile: it is bounded, keeps the default on a tie, and survives a tile that does not compile."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="tiles are those of Triton's kernels")

from triton.runtime.errors import OutOfResources, PTXASError

from harness.bench import card, card_worker, crossovers, tiles
from harness.bench.crossovers import MARGIN
from harness.errors import Exit
from harness.kernels import card_tables, crossover
from harness.kernels.triton.support import low_rank_gemm, tuned_tiles
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

    def choose(self, refused: GemmTile | None = None) -> tiles.ChosenTile:
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
        (RuntimeError("PassManager::run failed"), "PassManager::run failed"),
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
    assert product.reason(FIRST) == "changes the result"


def test_a_tile_that_leaves_elements_unwritten_is_refused_also_after_one_that_wrote_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    product, launches = planted(monkeypatch)
    assert product.reason(SECOND) == ""
    launches[FIRST] = UNWRITTEN
    assert product.reason(FIRST) == "changes the result"
    assert product.reason(SECOND) == ""


def test_an_error_that_is_not_of_the_tile_ends_the_search(monkeypatch: pytest.MonkeyPatch) -> None:
    product, launches = planted(monkeypatch)
    launches[FIRST] = RuntimeError("CUDA error: an illegal memory access was encountered")
    with pytest.raises(RuntimeError, match="illegal memory access"):
        product.reason(FIRST)


UNWRITTEN = SimpleNamespace(n_spills=0)
"""Outcome of a launch that writes the first row only."""


def planted(monkeypatch: pytest.MonkeyPatch) -> tuple[tiles._Product, dict[GemmTile, Any]]:
    """Return a product, and the outcome of each tile's launches: what Triton returns, or the error that it raises."""
    outcomes: dict[GemmTile, Any] = {}

    def launch(tile: GemmTile, operands: Any, **_: Any) -> Any:
        def run() -> Any:
            found = outcomes.get(tile)
            operands[0][: 1 if found is UNWRITTEN else None].fill_(1)
            if isinstance(found, Exception):
                raise found
            return found

        return SimpleNamespace(run=run)

    monkeypatch.setattr(low_rank_gemm, "product_launch", launch)
    clock: Any = SimpleNamespace(device=torch.device("cpu"))
    return tiles._Product(clock, 16, 32, 32, torch.float16, LARGE), outcomes


def test_the_crossovers_are_measured_with_the_tiles_of_the_same_measurement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A malformed table of the card is in force before: it is not read."""
    (tmp_path / card_tables.file_name("")).write_text("{")
    monkeypatch.setenv(card_tables.VARIABLE, str(tmp_path))
    clock: Any = SimpleNamespace(device=torch.device("cpu"))
    used: list[GemmTile] = []

    def launched_tile() -> GemmTile:
        return tuned_tiles.tuned(LARGE, low_rank_gemm.KERNEL, 4096, 1024, torch.bfloat16, clock.device)

    def shapes(_: Any) -> Iterator[dict[str, Any]]:
        for dtype in ("bfloat16", "float16"):
            used.append(launched_tile())
            yield {"dtype": dtype, "M": 4096, "N": 1024, "default": vars(LARGE), "tile": vars(FIRST)}

    def sizes(operation: str, _: Any) -> Iterator[dict[str, Any]]:
        used.append(launched_tile())
        yield {"E": 64, card_tables.CROSSOVERS[operation]: 4, "ratio": 1.5}

    monkeypatch.setattr(tiles, "measure", shapes)
    monkeypatch.setattr(crossovers, "measure", sizes)
    emitted: list[Any] = []
    card_worker._measure_crossovers(clock, lambda **event: emitted.append(json.loads(json.dumps(event))))
    assert used == [LARGE, LARGE, *[FIRST] * len(card_tables.CROSSOVERS)]
    tables = [event["table"] for event in emitted if "table" in event]
    assert [len(one["tiles"]["rows"]) for one in tables[:3]] == [1, 2, 2]  # after the first dtype, and after both
    assert tables[-1].keys() >= {"tiles", *card_tables.CROSSOVERS}


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
    assert "lora_linear: fused up to rank 63 if E >= 4096" in shown.out
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
    assert found == "tiles: for 1 of 2 shapes another tile is faster than the default"
    assert found in shown
