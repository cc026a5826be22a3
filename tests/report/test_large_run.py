"""The page of a run with 1,000 Cells: its size, and the work to make it."""

from __future__ import annotations

import cProfile
import json
import pstats
import time
from collections import Counter
from pathlib import Path

import pytest

from harness.analysis.run_facts import analyse
from harness.records import store
from harness.report import html, table_model, terminal
from support import large_run
from support.report_page import Page

pytestmark = pytest.mark.slow
Calls = Counter[tuple[str, int, str]]
CELLS, RECIPES = 1000, 60
LARGEST = 6 * 2**20
ELEMENTS = 40_000
"""Bounds that the page of 1,000 Cells keeps: its size in bytes, and its number of elements."""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> store.Run:
    return large_run.write(tmp_path_factory.mktemp("large") / "run", recipes=200, seeds=5, items=100)


@pytest.fixture(scope="module")
def page(large: store.Run) -> str:
    start = time.perf_counter()
    made = html.render([analyse(large)])
    print(f"analysed and rendered in {time.perf_counter() - start:.1f} s")
    return made


@pytest.mark.nightly
def test_the_page_of_1000_cells_is_small(page: str) -> None:
    elements = len(Page(page).tags)
    print(f"{len(page.encode()):,} bytes, {elements:,} elements")
    assert len(page.encode()) <= LARGEST
    assert elements <= ELEMENTS


@pytest.mark.nightly
def test_recipes_have_rows_and_cells_are_data(page: str, large: store.Run) -> None:
    parsed = Page(page)
    assert len([a for tag, a in parsed.tags if tag == "tr" and "data-method" in a]) == 200
    stored = json.loads(next(text for text in parsed.raw["script"] if text.startswith('{"rows"')))
    ids = {row[1] for _, rows in stored["tables"]["cells"] for row in rows}
    assert ids == {f"cell-{cell.cell_id}" for cell in large.manifest.cells}
    assert {len(rows) for name in ("cells", "memory", "costs") for _, rows in stored["tables"][name]} == {CELLS}
    assert "Without a script" in parsed.text
    assert "peft-harness export" in parsed.text


@pytest.mark.nightly
def test_a_page_up_to_the_bound_needs_no_script(tmp_path: Path) -> None:
    run = large_run.write(tmp_path / "r", recipes=table_model.STATIC // 2, seeds=2, items=10)
    parsed = Page(html.render([analyse(run)]))
    assert {f"cell-{cell.cell_id}" for cell in run.manifest.cells} <= set(parsed.attributes("id"))
    assert "stored" not in parsed.attributes("id")
    assert "Without a script" not in parsed.text


def _calls(run: store.Run) -> Calls:
    """Count the calls that make the page and the summary of a run: of the harness's functions, and of comparisons.

    Charts are left out: their labels avoid each other.
    """
    profile = cProfile.Profile()
    facts = analyse(run)
    profile.enable()
    html.render([facts])
    terminal.summary(facts)
    profile.disable()
    stats = pstats.Stats(profile).stats  # type: ignore[attr-defined]
    ours = {where: calls for where, (calls, *_) in stats.items() if "/harness/" in where[0] or where[2] == "__eq__"}
    ours = {where: calls for where, calls in ours.items() if "svg" not in where[0]}
    return Counter(ours)


@pytest.mark.nightly
def test_no_function_is_called_with_the_square_of_the_number_of_cells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table_model, "STATIC", 0)
    once, twice = (
        _calls(large_run.write(tmp_path / str(n), recipes=n, seeds=2, items=10)) for n in (RECIPES, 2 * RECIPES)
    )
    # Twice the Cells make twice the calls, or four times as many where each Cell meets each other.
    assert {
        where: (once[where], calls) for where, calls in twice.items() if calls > 4 * RECIPES and calls > 3 * once[where]
    } == {}


@pytest.mark.nightly
def test_answers_to_items_and_names_of_checks_are_read_once_per_record(tmp_path: Path) -> None:
    run = large_run.write(tmp_path / "run", recipes=RECIPES, seeds=2, items=10)
    checks = sum(len(record.checks) for record in run.records)
    found = {(Path(file).name, name): calls for (file, _, name), calls in _calls(run).items()}
    assert found["measured.py", "answers"] == len(run.records)
    assert found["check.py", "parse"] <= checks
