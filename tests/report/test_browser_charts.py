"""Charts as a browser shows them: choice of the axis, legend, and the text of a point by mouse, keys and touch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from harness.analysis.run_facts import analyse
from harness.records.record import Record
from harness.report import html
from support import recorded_run
from support.browser import Open, Shown

pytestmark = pytest.mark.e2e
MEMORY, LOSSES = "#ranking .chart", "#losses .chart >> nth=0"


def _wait(name: str, made: Record) -> Record:
    """Give one Cell steps that waited for a CPU, and another one losses that diverge."""
    if name == "full":
        made = recorded_run.with_losses(made, [0.7, *[9.0] * 59])
    if name != "nf4" or made.measurements is None or made.training is None:
        return made
    training = made.training.model_copy(update={"cpu_seconds": 0.1})
    return made.model_copy(update={"measurements": made.measurements.model_copy(update={"training": training})})


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    run = recorded_run.write_run(folder / "run", change=_wait)
    html.write_report([analyse(run)], folder / "report.html")
    return folder / "report.html"


def tip(shown: Shown, chart: str = MEMORY) -> str:
    return str(shown.page.locator(chart).locator(".tip").inner_text())


def dots(shown: Shown) -> Any:
    return shown.page.locator(f"{MEMORY} figure:visible .dot:visible")


def test_a_button_chooses_the_axis_and_the_address_keeps_it(show: Open, report: Path) -> None:
    with show(report) as shown:
        figures = shown.page.locator(f"{MEMORY} figure:visible figcaption")
        assert figures.all_inner_texts() == ["Accuracy against training memory"]
        shown.page.get_by_role("button", name="step time").click()
        assert figures.all_inner_texts() == ["Accuracy against step time"]
        assert shown.page.locator(f"{MEMORY} .choice [aria-pressed=true]").all_inner_texts() == ["step time"]
        shown.page.locator("[data-filter=cells]").fill("lora")
        address = shown.page.evaluate("location.hash")
        assert figures.all_inner_texts() == ["Accuracy against step time"]
        assert shown.messages == []
    with show(report, hash_=address) as again:
        assert again.page.locator(f"{MEMORY} figure:visible figcaption").inner_text() == "Accuracy against step time"
        assert again.count("cells") == "7 of 10 rows"  # the filter of the table, too
        again.follow("#?chart-0=latency")
        assert again.in_view(MEMORY)
        assert again.page.locator(f"{MEMORY} figure:visible figcaption").inner_text() == "Accuracy against latency"


def test_the_legend_filters_every_axis_by_method(show: Open, report: Path) -> None:
    with show(report) as shown:
        before = dots(shown).count()
        full = shown.page.locator(f"{MEMORY} .legend").get_by_role("button", name="full", exact=True)
        full.click()
        assert full.get_attribute("aria-pressed") == "false"
        assert dots(shown).count() == before - 1
        shown.page.get_by_role("button", name="step time").click()
        assert dots(shown).count() == before - 1
        shown.page.locator(MEMORY).get_by_role("button", name="Hide all").click()
        assert dots(shown).count() == 0
        full.click()
        assert dots(shown).count() == 1
        shown.page.locator(MEMORY).get_by_role("button", name="Hide all").click()
        shown.page.locator(MEMORY).get_by_role("button", name="Show all").click()
        assert dots(shown).count() == before
        assert shown.messages == []


def test_a_point_shows_its_text_under_the_mouse(show: Open, report: Path) -> None:
    with show(report) as shown:
        shown.page.get_by_role("button", name="step time").click()
        shown.page.locator(f"{MEMORY} figure:visible .ring").hover(force=True)
        assert tip(shown).startswith("lora r=8 [reference] on nf4")
        assert "! may be too high: other programs used the CPU while 1 of 1 run trained" in tip(shown)
        dots(shown).first.click(force=True)
        assert "#cell-" in shown.page.url


def test_arrow_keys_go_from_point_to_point_and_enter_follows_the_link(show: Open, report: Path) -> None:
    with show(report) as shown:
        plot = shown.page.locator(f"{MEMORY} figure:visible .plot")
        shown.page.locator(f"{MEMORY} .choice button").last.focus()
        shown.page.keyboard.press("Tab")
        assert plot.evaluate("element => element === document.activeElement")
        seen = []
        for _ in range(dots(shown).count()):
            shown.page.keyboard.press("ArrowRight")
            seen.append(tip(shown).partition(":")[0])
        assert len(set(seen)) == dots(shown).count()
        shown.page.keyboard.press("ArrowRight")  # around
        assert tip(shown).startswith(f"{seen[0]}:")
        shown.page.keyboard.press("ArrowUp")
        assert not tip(shown).startswith(f"{seen[0]}:")
        shown.page.keyboard.press("ArrowDown")
        assert tip(shown).startswith(f"{seen[0]}:")
        shown.page.keyboard.press("Enter")
        shown.page.wait_for_function("location.hash.startsWith('#cell-')")
        row = shown.page.locator("tr:target th").inner_text()
        assert row.split(" [")[0] == seen[0].split(" [")[0]


def test_a_tap_shows_the_text_with_a_link_and_does_not_leave(show: Open, report: Path) -> None:
    with show(report, 390) as shown:
        dots(shown).first.tap(force=True)
        assert "Row in the table" in tip(shown)
        assert "#cell-" not in shown.page.url
        shown.page.locator(f"{MEMORY} .tip a").tap()
        assert "#cell-" in shown.page.url


def test_a_curve_is_picked_and_its_text_has_the_loss_above_the_chart(show: Open, report: Path) -> None:
    with show(report) as shown:
        chart = shown.page.locator(LOSSES)
        chart.get_by_text("Drawn up to").wait_for()
        curves = chart.locator(".curve:visible")
        before = curves.count()
        chart.locator(".more summary").click()
        picked = chart.locator(".more button").first
        picked.click()
        assert curves.count() == before + 1
        name = chart.get_by_role("button", name="full", exact=True)
        number = name.get_attribute("data-series")
        places = chart.locator(f"path[data-series='{number}']").get_attribute("d").split("L")
        x, y = map(float, places[len(places) // 2].split())
        box = chart.locator(".plot").bounding_box()
        scale = box["width"] / 560
        shown.page.mouse.move(box["x"] + x * scale, box["y"] + y * scale)
        assert tip(shown, LOSSES) == f"full, step {len(places) // 2}: 9"
        assert shown.messages == []


def test_without_a_script_every_figure_is_shown_with_its_legend(show: Open, report: Path) -> None:
    with show(report, script=False) as shown:
        charts = shown.page.locator(MEMORY)
        assert charts.locator("figure:visible").count() == charts.locator("figure").count() > 3
        assert charts.locator(".legend button:visible").count() > 2
        assert charts.locator(".choice:visible, .more:visible, .tip:visible, [data-all]:visible").count() == 0


def test_print_has_the_chosen_figure_alone(show: Open, report: Path) -> None:
    with show(report) as shown:
        shown.page.emulate_media(media="print")
        assert shown.page.locator(f"{MEMORY} figure:visible").count() == 1
        assert shown.page.locator(f"{MEMORY} .choice:visible, {MEMORY} .tip:visible").count() == 0
