"""The same checks in several environments: what came and what went."""

from __future__ import annotations

from typing import Any

import pytest

from harness.conformance.findings import versions
from harness.conformance.findings.defects import Defect
from harness.conformance.findings.outcomes import CheckOutcome
from harness.conformance.findings.report import CheckReport
from harness.conformance.findings.versions import CheckedEnvironment
from harness.errors import Exit
from harness.records.check import CheckResult, Outcome
from harness.records.record import Environment
from harness.report import check_page, check_versions
from support.report_page import Page

OLD, NEW = "acme 1.0", "acme 2.0"
DEFECT = Defect(
    id="acme-wrong", library="acme", versions=">=2", implementation="acme", checks=["lora/merge/*/*"],
    summary="merges into thin air", reproduction="bitsandbytes_8bit_nan.py",
)  # fmt: skip


def environment(version: str) -> CheckedEnvironment:
    described = Environment(id=version, software={"acme": version}, machine={}, code_version="0")
    return CheckedEnvironment(
        label=f"acme {version}", name=f"acme-{version}", requirements=[f"acme=={version}"],
        packages=[f"acme=={version}"], environment=described,
    )  # fmt: skip


def outcome(check: str, fails: bool, **more: Any) -> CheckOutcome:
    wrong = {"error": 1.0, "allowed": 0.1} if fails else {"error": 0.01, "allowed": 0.1}
    result = CheckResult(check=f"lora/{check}/float32/warm", outcome=Outcome.FAIL if fails else Outcome.PASS, **wrong)
    given = {"kind": "method", "target": "lora", "dtype": "float32", "case": "rank=3", **more}
    return CheckOutcome(implementation="acme", result=result, **given)


def report(version: str, **fails: bool) -> CheckReport:
    """Return the report of one version. fails: check -> whether it fails."""
    tried = [outcome(check, wrong) for check, wrong in fails.items()]
    software = {"acme": version}
    found = CheckReport(tried=tried, defects=[DEFECT], software=software, skipped={"ghost lora": "needs ghost"})
    return found.labelled(environment(version))


@pytest.fixture
def both() -> CheckReport:
    """`merge` broke in 2.0, `gradient` was repaired in 2.0, `save` fails in both and `forward` in none."""
    old = report("1.0", merge=False, gradient=True, save=True, forward=False)
    new = report("2.0", merge=True, gradient=False, save=True, forward=False)
    new.tried[0] = new.tried[0].model_copy(update={"defect": "acme-wrong"})
    return CheckReport.joined([old, new])


def test_a_check_that_fails_in_one_version_differs_and_one_that_passes_in_all_is_left_out(both: CheckReport) -> None:
    rows = versions.check_rows(both.tried, both.environments)
    assert {row.check: row.differs for row in rows} == {"lora/merge": True, "lora/gradient": True, "lora/save": False}


def test_the_same_check_with_another_failing_case_differs() -> None:
    old, new = report("1.0", save=True), report("2.0", save=True)
    new.tried[0] = new.tried[0].model_copy(update={"case": "rank=5"})
    (row,) = versions.check_rows([*old.tried, *new.tried], [environment("1.0"), environment("2.0")])
    assert row.differs


def test_a_known_defect_shows_whatever_its_range_says() -> None:
    tried = [*report("1.0", merge=True).tried, *report("2.0", merge=True).tried]
    (row,) = versions.defect_rows(tried, [DEFECT], [environment("1.0"), environment("2.0")])
    assert [(field.version, field.shown, field.in_range) for field in row.fields] == [
        ("1.0", 1, False),
        ("2.0", 1, True),
    ]
    assert not row.differs
    assert row.is_misdated


def test_a_check_that_fails_in_another_way_tells_nothing_about_a_known_defect() -> None:
    narrow = DEFECT.model_copy(update={"at_most": 0.5})  # the error is 1.0
    tried = [*report("1.0", merge=True).tried, *report("2.0", merge=False).tried]
    assert versions.defect_rows(tried, [narrow], [environment("1.0"), environment("2.0")]) == []
    shown = report("3.0", merge=True).tried[0]
    small = shown.model_copy(update={"result": shown.result.model_copy(update={"error": 0.4})})
    three = [environment(one) for one in ("1.0", "2.0", "3.0")]
    (row,) = versions.defect_rows([*tried, small], [narrow], three)
    assert [field.tried for field in row.fields] == [0, 1, 1]
    assert row.differs


def test_a_known_defect_that_came_in_its_range_is_dated_rightly(both: CheckReport) -> None:
    (row,) = versions.defect_rows(both.tried, both.defects, both.environments)
    assert row.differs
    assert not row.is_misdated


def test_everything_carries_the_label_of_its_environment(both: CheckReport) -> None:
    assert {one.provider for one in both.tried} == {f"acme ({OLD})", f"acme ({NEW})"}
    assert both.skipped == {f"ghost lora ({OLD})": "needs ghost", f"ghost lora ({NEW})": "needs ghost"}
    assert both.exit is Exit.FAIL


def test_the_terminal_shows_only_what_differs(both: CheckReport) -> None:
    _, head, *rows, alike = check_versions.lines(both)
    assert head.split("  ")[-2:] == [OLD, NEW]
    assert {row.split("  ")[0]: row.split()[-2:] for row in rows} == {
        "acme-wrong": ["known", "1/1"], "acme lora/merge": ["known", "1/1"], "acme lora/gradient": ["1/1", "✓"],
    }  # fmt: skip
    assert alike.startswith("1 check with the same failures in every version")


def test_one_environment_alone_is_not_compared() -> None:
    assert check_versions.lines(report("1.0", merge=True)) == []
    assert check_versions.section(report("1.0", merge=True)) is None


def test_the_page_has_a_row_per_difference_and_hides_the_rest(both: CheckReport) -> None:
    page = Page(check_page.render(both))
    assert {"versions-defects-differ", "versions-checks-differ", "versions-checks-same"} <= set(page.attributes("id"))
    links = {link[1:] for link in page.attributes("href") if link.startswith("#")}
    assert links <= set(page.attributes("id"))
    assert "acme lora/gradient" in page.text
    assert ">=2, here 2.0" in page.text


def test_the_document_has_a_field_per_environment(both: CheckReport) -> None:
    document = check_versions.document(both)
    merge = next(row for row in document["checks"] if row["check"] == "lora/merge")
    assert [field["standing"] for field in merge["fields"]] == ["pass", "known defect"]
    assert [row["misdated"] for row in document["defects"]] == [False]
    assert [one["label"] for one in both.document()["environments"]] == [OLD, NEW]


def test_environments_that_each_hold_another_implementation_are_no_versions() -> None:
    """As `check torchtune axolotl`, where each runs in the environment that a table declares for it."""
    found = CheckReport(
        tried=[outcome("merge", True), outcome("save", False)],
        environments=[environment("1.0"), environment("2.0")],
    )
    assert not found.compares_versions
    assert check_versions.lines(found) == []
    assert check_versions.section(found) is None
    assert [one.provider for one in found.tried] == ["acme", "acme"]
