"""Five questions of a reader: each is answered on the screen, after at most two clicks and some scrolling."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from harness.analysis.run_facts import analyse, analyse_all
from harness.records import store
from harness.records.record import Record, Status
from harness.report import html
from support import recorded_run
from support.browser import Open, Shown
from support.repository import PUBLISHED

pytestmark = pytest.mark.e2e
RECIPES = "answer-0-table"
ON_SCREEN = """element => {
    const { left, top, right, bottom } = element.getBoundingClientRect();
    return left >= 0 && top >= 0 && right <= innerWidth + 1 && bottom <= innerHeight + 1 && element.checkVisibility();
}"""
each_width = pytest.mark.parametrize("width", [1280, 390])


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the page of a published run, as if three Cells had run out of memory, and one had no Record."""

    def changed(record: Record) -> Record | None:
        cell = record.cell
        if cell.model == "minilm-l6" and cell.method == "galore" and cell.config.get("rank") == 8:
            return recorded_run.failed(record, Status.OOM, because="the allocation of 92 MiB failed")
        return None if cell.method == "frozen" and cell.model != "minilm-l6" else record

    run = store.read_run(PUBLISHED / "2026-11-26-compare-small-cpu")
    kept = tuple(one for record in run.records if (one := changed(record)))
    file = tmp_path_factory.mktemp("comparison") / "report.html"
    html.write_report([analyse(replace(run, records=kept))], file)
    return file


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the page of two published runs of one suite."""
    runs = [store.read_run(PUBLISHED / name) for name in ("2026-11-24-quick-cpu", "2026-11-26-quick-cpu")]
    file = tmp_path_factory.mktemp("two") / "report.html"
    html.write_report(analyse_all(runs), file)
    return file


def on_screen(shown: Shown, selector: str) -> bool:
    return bool(shown.page.locator(selector).first.evaluate(ON_SCREEN))


def sorted_rows(shown: Shown, column: str) -> dict[str, float]:
    """Click the head of a column once, and scroll to the table. Return name and value of the rows on the screen."""
    shown.sort(RECIPES, column)
    shown.page.locator(f".scroll:has(#{RECIPES})").evaluate("box => box.scrollIntoView()")
    heads = shown.page.locator(f"#{RECIPES} thead th").all_inner_texts()
    field = f"td:nth-child({heads.index(column) + 1})"
    return {
        row.locator("th").inner_text(): float(row.locator(field).get_attribute("data-v"))
        for row in shown.page.locator(f"#{RECIPES} tbody tr").all()
        if row.locator("th a").evaluate(ON_SCREEN) and row.locator(field).evaluate(ON_SCREEN)
    }


@each_width
def test_questions_about_one_run(show: Open, comparison: Path, width: int) -> None:
    with show(comparison, width) as shown:
        # Why is this Cell missing? No click, and a link to its row.
        assert on_screen(shown, "#alerts")
        alert = shown.page.locator("#alerts").inner_text()
        assert "1 expected Cell has no Record" in alert
        assert "smollm2-135m-instruct zero-shot" in alert
        # Did merging cost latency? No click.
        cost = "#answer-0 .card:has-text('At what cost?')"
        passes = f"{cost} p:has-text('A pass takes')"
        shown.page.locator(cost).scroll_into_view_if_needed()
        assert on_screen(shown, passes)
        assert "11.4 ms merged and 11.3 ms without an adapter" in shown.page.locator(passes).inner_text()
        # Which method needs less than 300 MiB? One click.
        peaks = sorted_rows(shown, "Peak, MiB")
        assert [name for name, peak in peaks.items() if peak < 300 * 2**20] == ["frozen", "lora r=2"]
        assert max(peaks.values()) > 300 * 2**20
        # Is DoRA slower than LoRA? One click.
        steps = sorted_rows(shown, "Step, ms")
        lora, dora = (
            [seconds for name, seconds in steps.items() if name.startswith(f"{method} ")] for method in ("lora", "dora")
        )
        assert len(lora) == 3
        assert max(lora) < min(dora)
        # Why has this recipe no row? No click; one click shows its Cell.
        reason = "#answer-0 li:has-text('galore r=8')"
        shown.page.locator(reason).first.scroll_into_view_if_needed()
        assert "oom: the allocation of 92 MiB failed" in shown.page.locator(reason).first.inner_text()
        shown.page.locator(f"{reason} a").first.click()
        assert "oom" in shown.page.locator("tr:target").inner_text()
        assert shown.in_view("tr:target")


@each_width
def test_what_changed_since_the_last_run(show: Open, two_runs: Path, width: int) -> None:
    with show(two_runs, width) as shown:
        assert on_screen(shown, "#pair-1 h2")
        assert on_screen(shown, "#pair-1 p >> nth=0")
        assert "3 common Cells: no finding" in shown.page.locator("#pair-1").inner_text()
        changes = shown.sort("pair-1-table", "Peak: change, %")  # one click
        assert [change.split()[0] for change in changes] == ["−7.6", "−3.6", "—"]
        assert on_screen(shown, "#pair-1-table tbody td:text-is('−7.6')")
