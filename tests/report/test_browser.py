"""The pages as a browser shows them: sort, filter, links, download, and that they are inert and accessible."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from harness.analysis.run_facts import analyse
from harness.claims.judge import ClaimVerdict, JudgedClaim
from harness.conformance.findings.outcomes import CheckOutcome
from harness.conformance.findings.report import CheckReport
from harness.records.record import CheckResult, Outcome, Record
from harness.report import check_page, claims_page, html
from harness.report.formatting import DASH
from support import recorded_run
from support.browser import Open
from support.recorded_run import EVIL

pytestmark = pytest.mark.e2e

FUSED = recorded_run.cells()["fused"].cell_id
NF4 = recorded_run.cells()["nf4"].cell_id


def _truncate(name: str, made: Record) -> Record:
    """Give one Cell truncated test items, and steps that waited for a CPU."""
    if name != "nf4" or made.measurements is None or made.training is None:
        return made
    accuracy = made.measurements.accuracy.model_copy(update={"cut_items": 312})
    training = made.training.model_copy(update={"cpu_seconds": 0.1})
    return made.model_copy(
        update={"measurements": made.measurements.model_copy(update={"accuracy": accuracy, "training": training})}
    )


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    run = recorded_run.write_run(folder / "run", change=_truncate)
    html.write_report([analyse(run)], folder / "report.html")
    return folder / "report.html"


def _claim(name: str, printed: str, verdict: ClaimVerdict = ClaimVerdict.REPRODUCED) -> JudgedClaim:
    return JudgedClaim(
        id=name, paper="lora", version="v1", source="Table 2", sentence=f"{name} trains {printed}.", tier="exact",
        headline="", printed=printed, verdict=verdict, under="", ours=printed, how="", why="", note="", rule="", tried=[],
    )  # fmt: skip


@pytest.fixture(scope="module")
def claims(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("claims") / "claims.html"
    found = [_claim("lora-roberta", "0.3M"), _claim("qlora-roberta", "98.3K"), _claim("lora-gpt3", "10,000x")]
    missed = _claim("lora-gpt2", "0.25M", ClaimVerdict.NOT_REPRODUCED)
    claims_page.write_page([*found, missed, _claim("lora-words", "merges")], {}, file)
    return file


@pytest.fixture(scope="module")
def checks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("checks") / "check.html"

    def tried(name: str, outcome: Outcome, dtype: str, defect: str = "", **more: Any) -> CheckOutcome:
        result = CheckResult(check=f"lora/{name}/{dtype}/warm", outcome=outcome, **more)
        return CheckOutcome(
            implementation="acme",
            kind="method",
            target="lora",
            dtype=dtype,
            case="rank=3",
            result=result,
            defect=defect,
        )

    passed = tried("forward", Outcome.PASS, "float32", error=0.02, allowed=0.1)
    wrong = tried("merge", Outcome.FAIL, "bfloat16", "acme-wrong", error=0.5, allowed=0.1)
    check_page.write_page(CheckReport(tried=[passed, wrong]), file)
    return file


# ---- filter


def test_a_filter_shows_rows_with_words_that_begin_like_this_and_counts_them(show: Open, report: Path) -> None:
    with show(report) as shown:
        assert shown.count("cells") == "10 rows"
        box = shown.page.locator("[data-filter=cells]")
        box.fill("LORA r=8 fused")
        assert shown.rows("cells") == ["lora r=8 [fused]"]
        assert shown.count("cells") == "1 of 10 rows"
        box.fill("smollm2 lora")  # a group's title counts for its rows
        assert shown.count("cells") == "1 of 10 rows"
        box.fill("ora")
        assert shown.count("cells") == "0 of 10 rows. No row has words that begin like this."
        assert shown.rows("cells") == []
        box.fill("(")  # no pattern, but a text
        assert shown.messages == []


@pytest.mark.parametrize(
    ("words", "ids"),
    [
        ("lora", ["lora-roberta", "lora-gpt3", "lora-gpt2", "lora-words"]),
        ("roberta", ["lora-roberta", "qlora-roberta"]),
        ("not-reproduced", ["lora-gpt2"]),
        ("0.3M", ["lora-roberta"]),
        ("Table 2 gpt", ["lora-gpt3", "lora-gpt2"]),
    ],
)
def test_a_filter_of_claims_tests_each_row_alone(show: Open, claims: Path, words: str, ids: list[str]) -> None:
    with show(claims) as shown:
        shown.page.locator("[data-filter=table-lora]").fill(words)
        assert shown.rows("table-lora") == ids
        assert shown.count("table-lora") == f"{len(ids)} of 5 rows"


# ---- sort


def test_the_first_click_sorts_upwards_and_the_second_downwards(show: Open, report: Path) -> None:
    with show(report) as shown:
        group = slice(None, 8)  # rows stay in their group
        up = [int(text.replace(",", "")) for text in shown.sort("cells", "Trainable")[group]]
        assert up == sorted(up)
        assert shown.page.locator("#cells thead [aria-sort=ascending]").inner_text() == "Trainable"
        assert shown.page.url.endswith("#?cells.sort=2%2Cup")
        down = [int(text.replace(",", "")) for text in shown.sort("cells", "Trainable")[group]]
        assert down == sorted(up, reverse=True)
        assert shown.page.locator("#cells thead [aria-sort=descending]").inner_text() == "Trainable"
        # Missing values stay at the end.
        assert shown.sort("cells", "To the highest, points")[group][-1].startswith(DASH)


def test_numbers_with_units_sort_as_numbers_and_before_words(show: Open, claims: Path) -> None:
    with show(claims) as shown:
        assert shown.sort("table-lora", "Printed") == ["10,000x", "98.3K", "0.25M", "0.3M", "merges"]


# ---- links


@pytest.mark.parametrize("pasted", [False, True], ids=["opened", "pasted"])
def test_a_link_with_the_state_of_a_table_shows_that_table(show: Open, report: Path, pasted: bool) -> None:
    link = "#?cells.sort=2,down&cells.filter=lora"
    with show(report, hash_="" if pasted else link) as shown:
        if pasted:
            shown.follow(link)
        assert shown.count("cells") == "7 of 10 rows"
        assert shown.page.locator("[data-filter=cells]").input_value() == "lora"
        assert shown.page.locator("#cells thead [aria-sort=descending]").inner_text() == "Trainable"
        assert shown.in_view("#cells thead")
        before = shown.rows("cells")
        shown.follow("#?latency.sort=0,up")  # nothing is left of the first link
        assert shown.count("cells") == "10 rows"
        assert [name for name in shown.rows("cells") if name in before] != before
        assert shown.page.locator("#cells [aria-sort]").count() == 0
        assert shown.in_view("#latency thead")


def test_a_link_to_a_row_that_a_filter_hides_shows_the_row(show: Open, report: Path) -> None:
    with show(report) as shown:
        shown.page.locator("[data-filter=cells]").fill("full")
        assert not shown.page.locator(f"#cell-{FUSED}").is_visible()
        shown.page.locator(f"#memory a[href='#cell-{FUSED}']").click()
        shown.page.wait_for_function("id => document.getElementById(id).checkVisibility()", arg=f"cell-{FUSED}")
        assert shown.in_view(f"#cell-{FUSED}")
        assert shown.in_view("#cells thead")
        assert shown.page.locator("[data-filter=cells]").input_value() == ""
        assert shown.count("cells") == "10 rows"


# ---- CSV


def test_the_csv_has_what_the_table_shows_in_the_units_of_its_heads(show: Open, report: Path) -> None:
    with show(report) as shown:
        shown.page.locator("[data-filter=cells]").fill("lora")
        name, rows = shown.csv("cells")
    assert name == "recorded-cells.csv"
    assert len(rows) == 7
    (row,) = [row for row in rows if row["Cell"].startswith("lora r=8 [reference] on nf4")]
    assert row["Model · task"] == "minilm-l6 · movie-sentiment"
    assert row["Accuracy, %"] == "80.3"
    assert [round(float(row[f"Accuracy, % ({end})"])) for end in ("low", "high")] == [78, 83]
    assert row["Accuracy, % (truncated)"] == "312 of 1000 items"
    assert row["Peak, MiB"] == str(781 - 410)
    assert 160 < float(row["Step, ms (low)"]) <= float(row["Step, ms"]) <= float(row["Step, ms (high)"]) < 200
    assert (row["Step, ms (flag)"], row["Tokens/s (flag)"]) == ("busy", "busy")
    assert row["Record"] == f"{NF4}.1"
    (below,) = [row for row in rows if row["Cell"] == "lora r=1 [reference]"]
    assert (below["To the highest, points (standing)"], below["To the highest, points"]) == ("below", "-8")
    assert below["Step, ms (flag)"] == ""


def test_the_csv_of_checks_tells_a_known_defect_from_a_share(show: Open, checks: Path) -> None:
    with show(checks) as shown:
        name, (row,) = shown.csv("matrix")
    assert name == "check-matrix.csv"
    assert row == {
        "Target": "lora", "Implementation": "acme", "float32": "pass 0.20", "float32 (share)": "0.2",
        "bfloat16": "known defect 1 of 1",
    }  # fmt: skip


def test_the_csv_of_claims_has_no_column_of_groups(show: Open, claims: Path) -> None:
    with show(claims) as shown:
        name, rows = shown.csv("table-lora")
    assert name == "claims-lora.csv"
    assert next(iter(rows[0])) == "Claim"
    assert [row["Printed"] for row in rows] == ["0.3M", "98.3K", "10,000x", "0.25M", "merges"]


# ---- inert, offline, accessible


def test_hostile_texts_do_nothing_even_without_the_policy(show: Open, tmp_path: Path) -> None:
    page = html.render([analyse(recorded_run.write_hostile_run(tmp_path / "run"))])
    bare = re.sub(r"<meta http-equiv=.Content-Security-Policy.[^>]*>", "", page)
    assert bare != page
    (tmp_path / "bare.html").write_text(bare, encoding="utf-8")
    with show(tmp_path / "bare.html") as shown:
        shown.page.locator("[data-filter=cells]").fill(EVIL)
        shown.sort("cells", "Status")
        _, rows = shown.csv("cells")
        assert EVIL in rows[0]["Model · task"]
        assert shown.page.locator("img").count() == 0
        assert shown.messages == []
        assert {url.partition("#")[0].partition(":")[0] for url in shown.requests} <= {"file", "blob"}
        assert len(shown.requests) == 1 + sum(url.startswith("blob:") for url in shown.requests)


SMALL_TARGETS = """[...document.querySelectorAll("a, button, summary, input")]
    .filter(target => !target.closest("svg") && target.checkVisibility())
    .filter(target => (target.closest("label") ?? target).getBoundingClientRect().height < 24)
    .map(target => target.outerHTML)"""
"""A click on its label counts for an input. Links of charts are left out, since tables have the same links."""
each_page = pytest.mark.parametrize("page", ["report", "claims", "checks"])
each_width = pytest.mark.parametrize("width", [1280, 390])


@each_width
@each_page
def test_a_page_asks_for_nothing_and_fits_its_window(
    show: Open, page: str, width: int, request: pytest.FixtureRequest
) -> None:
    with show(request.getfixturevalue(page), width) as shown:
        assert shown.page.evaluate("document.documentElement.scrollWidth") <= width
        assert shown.page.evaluate(SMALL_TARGETS) == []
        assert shown.requests == [shown.url]
        assert shown.messages == []


BROKEN = """[...document.querySelectorAll("th[scope=row]")].filter(head => head.checkVisibility()).flatMap(head => {
    const found = [], texts = document.createTreeWalker(head, NodeFilter.SHOW_TEXT);
    for (let text; (text = texts.nextNode());)
        for (const word of text.data.matchAll(/[^\\s-]+-?/g)) {
            const range = document.createRange();
            range.setStart(text, word.index);
            range.setEnd(text, word.index + word[0].length);
            if (new Set([...range.getClientRects()].map(box => box.top)).size > 1) found.push(word[0]);
        }
    return found;
})"""


@each_width
def test_the_name_of_a_row_breaks_only_between_words_or_at_a_hyphen(show: Open, report: Path, width: int) -> None:
    with show(report, width) as shown:
        assert shown.page.locator("th[scope=row]:visible").get_by_text("(bitsandbytes)").count()
        assert shown.page.evaluate(BROKEN) == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@each_width
@each_page
def test_a_page_passes_axe(show: Open, page: str, width: int, scheme: str, request: pytest.FixtureRequest) -> None:
    axe = pytest.importorskip("axe_playwright_python.base", reason="axe-playwright-python is not installed")
    with show(request.getfixturevalue(page), width, scheme=scheme) as shown:
        shown.page.evaluate(axe.AXE_SCRIPT)
        found = shown.page.evaluate("axe.run({resultTypes: ['violations']})")["violations"]
        assert [(one["id"], [node["html"] for node in one["nodes"]]) for one in found] == []


def test_a_keyboard_reaches_tables_their_explanations_and_the_content(show: Open, report: Path) -> None:
    with show(report) as shown:
        shown.page.keyboard.press("Tab")
        shown.page.keyboard.press("Enter")
        shown.page.wait_for_url(lambda url: url.endswith("#table"))
        assert shown.in_view("#table")
        region = shown.page.get_by_role("region", name="Every expected Cell")
        region.focus()
        assert region.evaluate("element => element === document.activeElement")
        means = shown.page.locator("#memory-section details.columns").first
        means.locator("summary").focus()
        shown.page.keyboard.press("Enter")
        assert means.get_by_text("memory of the process before the model was loaded").is_visible()


def test_the_head_of_a_long_table_stays(show: Open, report: Path) -> None:
    with show(report) as shown:
        shown.page.set_viewport_size({"width": 390, "height": 300})
        box = shown.page.locator(".scroll:has(#cells)")
        box.evaluate("element => { element.scrollIntoView(); element.scrollTop = 200; element.scrollLeft = 200; }")
        top, left = box.evaluate(
            "element => [element.getBoundingClientRect().top, element.getBoundingClientRect().left]"
        )
        corner = "([x, y]) => document.elementFromPoint(x + 20, y + 20).closest('th').textContent"
        assert shown.page.evaluate(corner, [left, top]) == "Cell"
