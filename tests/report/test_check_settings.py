"""Settings of a training loop on the page and on the terminal of `check --loop`."""

from __future__ import annotations

import json

from harness.conformance.findings.loop_settings import LoopSetting, SettingFound
from harness.conformance.findings.outcomes import CheckStatus
from harness.conformance.findings.report import CheckReport
from harness.errors import Exit
from harness.report import check_page, check_terminal
from support.report_page import Page

CLIPPING = LoopSetting(name="max_grad_norm", config={"max_grad_norm": 1.0}, effect="changes", about="clips")
FOUND = SettingFound(
    setting=CLIPPING, defaults={"max_grad_norm": True}, effect="changes", first=5e-7, worst=2e-2, step=3, weights=4e-3
)


def report(*found: SettingFound) -> CheckReport:
    return CheckReport([one.outcome("trl") for one in found], settings=found)


def test_the_effect_of_a_setting_is_on_the_page_on_the_terminal_and_in_the_document() -> None:
    whole = report(FOUND)
    assert whole.exit is Exit.PASS
    (line,) = [line for line in check_terminal.matrix(whole) if line.startswith("max_grad_norm")]
    assert line.split() == [
        "max_grad_norm",
        "max_grad_norm=1.0",
        "changes",
        "yes",
        "5.0e-07",
        "2.0e-02",
        "3",
        "4.0e-03",
    ]
    page = Page(check_page.render(whole))
    assert "Does this training loop train as the recipe says?" in page.text
    assert "max_grad_norm=1.0" in page.text
    (row,) = json.loads(json.dumps(whole.document()))["settings"]
    assert (row["effect"], row["step"], row["setting"]["about"]) == ("changes", 3, "clips")


def test_a_setting_that_does_something_else_than_the_table_says_fails_its_check() -> None:
    """As when a release of trl has another default."""
    harmless = FOUND.model_copy(update={"effect": "same", "step": None})
    whole = report(harmless)
    assert whole.exit is Exit.FAIL
    (outcome,) = whole.tried
    assert outcome.status is CheckStatus.FAIL
    assert outcome.result.check == "settings/max_grad_norm/float32/trained"
    assert outcome.result.detail == "does not change training; the table says that it changes training"
    assert any("max_grad_norm" in line and "FAIL" in line for line in check_terminal.matrix(whole))


def test_a_refused_setting_shows_the_reason() -> None:
    refused = SettingFound(setting=CLIPPING, effect="refused", because="trl says no")
    assert "trl says no" in Page(check_page.render(report(refused))).text


def test_a_page_without_a_loop_has_no_section_of_settings() -> None:
    page = Page(check_page.render(CheckReport([])))
    assert "Do implementations compute what the papers say?" in page.text
    assert "One setting at a time" not in page.text
