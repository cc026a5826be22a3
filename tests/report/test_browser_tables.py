"""Tables as a browser shows them: columns to choose, filters by property, and rows that are data until a table is opened."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from harness.analysis.run_facts import analyse
from harness.report import html, table_model
from support import large_run, recorded_run
from support.browser import Open, Shown

pytestmark = pytest.mark.e2e

FUSED = recorded_run.cells()["fused"].cell_id
RECIPES = "answer-0-table"
TABLES = ("cells", "latency", "memory", "costs")


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the page of a small run. It has all its rows."""
    folder = tmp_path_factory.mktemp("report")
    html.write_report([analyse(recorded_run.write_run(folder / "run"))], folder / "report.html")
    return folder / "report.html"


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the page of the same run, with the rows of its Cells as data."""
    folder = tmp_path_factory.mktemp("stored")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(table_model, "STATIC", 3)
        html.write_report([analyse(recorded_run.write_run(folder / "run"))], folder / "report.html")
    return folder / "report.html"


def _heads(shown: Shown) -> list[str]:
    return [head.inner_text() for head in shown.page.locator(f"#{RECIPES} thead th").all() if head.is_visible()]


# ---- columns


def test_a_reader_chooses_columns_and_a_link_keeps_them(show: Open, report: Path) -> None:
    with show(report) as shown:
        usual = _heads(shown)
        assert "Tokens/s" not in usual
        shown.page.locator(f".tools:has([data-of={RECIPES}]) .menu summary").click()
        shown.page.get_by_label("Tokens/s").first.check()
        shown.page.get_by_label("Trainable").first.uncheck()
        chosen = _heads(shown)
        assert "Tokens/s" in chosen
        assert "Trainable" not in chosen
        link = "#" + shown.page.url.partition("#")[2]
        _, rows = shown.csv(RECIPES)
        assert "Tokens/s" in rows[0]
        assert "Trainable" not in rows[0]
        assert float(rows[0]["Step, ms"]) > 50
        shown.page.get_by_label("Tokens/s").first.uncheck()
        shown.page.get_by_label("Trainable").first.check()
        assert _heads(shown) == usual
        assert "columns" not in shown.page.url
    with show(report, hash_=link) as shown:
        assert _heads(shown) == chosen
        shown.follow(f"#?{RECIPES}.sort=1,up")  # nothing is left of the first link
        assert _heads(shown) == usual


# ---- filter by property


def test_a_filter_by_property_counts_its_rows_and_is_in_the_link(show: Open, report: Path) -> None:
    with show(report) as shown:
        select = shown.page.locator("[data-of=cells][data-facet=method]")
        assert select.locator("option").all_inner_texts() == ["all", "frozen", "full", "lora"]
        select.select_option("lora")
        shown.page.locator("[data-of=cells][data-facet=rank]").select_option("1")
        assert shown.rows("cells") == ["lora r=1 [reference]"]
        assert shown.count("cells") == "1 of 10 rows"
        link = "#" + shown.page.url.partition("#")[2]
        shown.page.locator("[data-of=cells][data-facet=method]").select_option("full")
        assert shown.count("cells") == "0 of 10 rows. No row has all these properties."
    with show(report, hash_=link) as shown:
        assert shown.rows("cells") == ["lora r=1 [reference]"]
        shown.page.locator(f"#memory a[href='#cell-{FUSED}']").click()
        shown.page.wait_for_function("id => document.getElementById(id).checkVisibility()", arg=f"cell-{FUSED}")
        assert shown.count("cells") == "10 rows"


def test_recipes_of_a_method_stand_together_if_the_reader_wants(show: Open, report: Path) -> None:
    def methods(shown: Shown) -> list[str]:
        return [name.split()[0] for name in shown.rows(RECIPES)]

    with show(report) as shown:
        usual = methods(shown)
        assert usual != sorted(usual)
        shown.page.get_by_label("Group by method").first.check()
        assert methods(shown) == sorted(usual)
        shown.sort(RECIPES, "Peak, MiB")
        assert methods(shown) == sorted(usual)
        shown.page.get_by_label("Group by method").first.uncheck()
        assert methods(shown) != sorted(usual)


def test_a_filter_looks_at_the_columns_that_are_shown(show: Open, report: Path) -> None:
    with show(report) as shown:
        names = shown.rows(RECIPES)
        shown.page.locator(f"[data-filter={RECIPES}]").fill("0.002")  # a learning rate
        assert shown.rows(RECIPES) == []
        shown.page.locator(f".tools:has([data-of={RECIPES}]) .menu summary").click()
        shown.page.get_by_label("Learning rate").first.check()
        assert shown.rows(RECIPES) == [name for name in names if name != "full"]  # which has another one


# ---- rows that are data


ROWS = """id => [...document.getElementById(id).querySelectorAll("tbody, tbody *")].map(element => [
    element.tagName,
    Object.fromEntries([...element.attributes].map(one => [one.name, one.value]).filter(([, value]) => value)),
    element.children.length ? "" : element.textContent.trim(),
])"""
"""Script that returns every element of the rows of a table: its name, its attributes, and its text."""


def _plain(found: list[Any]) -> list[Any]:
    """Return the elements of rows with numbers as numbers, and further columns as objects."""
    for _, attributes, _ in found:
        if (value := attributes.get("data-v", "").replace(".", "", 1)) and value.lstrip("-").isdecimal():
            attributes["data-v"] = float(attributes["data-v"])
        if "data-more" in attributes:
            attributes["data-more"] = json.loads(attributes["data-more"])
    return found


def test_the_script_makes_the_rows_that_the_page_of_a_small_run_has(show: Open, report: Path, stored: Path) -> None:
    with show(report) as small, show(stored) as large:
        for table in TABLES:
            assert large.page.locator(f"#{table} tbody").count() == 0
            large.page.locator(f"details:has(> .scroll #{table}) > summary").click()
            large.page.wait_for_selector(f"#{table} tbody")
            assert _plain(large.page.evaluate(ROWS, table)) == _plain(small.page.evaluate(ROWS, table))
        assert large.count("cells") == small.count("cells")
        assert large.sort("cells", "Trainable") == small.sort("cells", "Trainable")
        assert large.csv("memory") == small.csv("memory")
        assert large.messages == []


@pytest.mark.parametrize("pasted", [False, True], ids=["opened", "pasted"])
def test_a_link_to_a_cell_opens_the_table_of_its_row(show: Open, stored: Path, pasted: bool) -> None:
    link = f"#cell-{FUSED}"
    with show(stored, hash_="" if pasted else link) as shown:
        if pasted:
            shown.follow(link)
        assert shown.page.locator("tr:target").get_attribute("id") == f"cell-{FUSED}"
        assert shown.in_view(link)
        assert shown.in_view("#cells thead")
        assert shown.page.locator("#memory tbody").count() == 0


def test_a_link_of_a_recipe_shows_its_cell_even_if_a_filter_hides_it(show: Open, stored: Path) -> None:
    with show(stored) as shown:
        shown.page.locator(f"#{RECIPES} tbody a").last.click()
        shown.page.wait_for_selector("tr:target")
        shown.page.locator("[data-filter=cells]").fill("full")
        assert shown.count("cells") == "1 of 10 rows"
        shown.page.locator(f"#{RECIPES} a[href='#cell-{FUSED}']").click()
        shown.page.wait_for_function("id => document.getElementById(id).checkVisibility()", arg=f"cell-{FUSED}")


def test_a_link_with_the_state_of_a_table_opens_it(show: Open, stored: Path) -> None:
    with show(stored, hash_="#?cells.filter=lora+r%3D1&cells.sort=2,up") as shown:
        assert shown.rows("cells") == ["lora r=1 [reference]"]
        assert shown.count("cells") == "1 of 10 rows"
        assert shown.in_view("#cells thead")


def test_a_page_with_rows_as_data_passes_axe(show: Open, stored: Path) -> None:
    axe = pytest.importorskip("axe_playwright_python.base", reason="axe-playwright-python is not installed")
    with show(stored) as shown:
        for summary in shown.page.locator("details > summary").all():
            if summary.is_visible():
                summary.click()
        shown.page.evaluate(axe.AXE_SCRIPT)
        found = shown.page.evaluate("axe.run({resultTypes: ['violations']})")["violations"]
        assert [(one["id"], [node["html"] for node in one["nodes"]]) for one in found] == []


@pytest.mark.nightly
def test_1000_cells_open_sort_and_filter(show: Open, tmp_path: Path) -> None:
    run = large_run.write(tmp_path / "run", recipes=200, seeds=5, items=10)
    html.write_report([analyse(run)], tmp_path / "report.html")
    with show(tmp_path / "report.html") as shown:
        paint = "performance.getEntriesByName('first-contentful-paint')[0]?.startTime"
        print(f"first paint after {shown.page.evaluate(paint)} ms")
        shown.page.locator("details:has(> .scroll #cells) > summary").click()
        shown.page.wait_for_selector("#cells tbody")
        assert shown.count("cells") == "1,000 rows"
        start = time.perf_counter()
        steps = shown.sort("cells", "Step, ms")
        print(f"sorted, and read, in {time.perf_counter() - start:.2f} s")
        values = [float(text.split()[0].replace(",", "")) for text in steps]
        assert len(values) == 1000
        assert values == sorted(values)
        shown.page.locator("[data-of=cells][data-facet=method]").select_option("vera")
        assert shown.count("cells").endswith(" of 1,000 rows")


# ---- copy, print, no script


def test_a_button_copies_the_command(show: Open, report: Path) -> None:
    with show(report) as shown:
        shown.page.context.grant_permissions(["clipboard-read", "clipboard-write"])
        shown.page.locator("[data-copy=answer-0-command]").click()
        shown.page.get_by_role("button", name="Copied").wait_for()
        text = shown.page.evaluate("navigator.clipboard.readText()")
        assert text == shown.page.locator("#answer-0-command").inner_text()
        assert text.startswith("peft-harness run suites/quick.yaml --only ")


def test_on_paper_a_table_has_all_its_rows_and_no_tools(show: Open, report: Path) -> None:
    with show(report) as shown:
        shown.page.set_viewport_size({"width": 800, "height": 300})
        box = shown.page.locator(".scroll:has(#cells)")
        cut = "element => element.scrollHeight > element.clientHeight + 1"
        assert box.evaluate(cut)
        shown.page.emulate_media(media="print")
        assert not box.evaluate(cut)
        assert not shown.page.locator(".tools").first.is_visible()
        assert not shown.page.locator("[data-copy]").first.is_visible()
        position = "element => getComputedStyle(element).position"
        assert shown.page.locator("#cells thead th").first.evaluate(position) == "static"


def test_without_a_script_all_columns_are_there(show: Open, report: Path, stored: Path) -> None:
    with show(report, script=False) as shown:
        assert "Tokens/s" in _heads(shown)
        assert not shown.page.locator(".tools").first.is_visible()
    with show(stored, script=False) as shown:
        shown.page.locator("details:has(> .scroll #cells) > summary").click()
        (says,) = shown.page.locator("details:has(> .scroll #cells) > noscript > p").all()
        assert says.is_visible()
        assert "peft-harness export" in says.inner_text()
