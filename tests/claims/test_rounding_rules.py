"""The rule by which a number comes out as a printed figure: said beside it with every verdict, unless it is rounding."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import pytest

from harness.claims import claim_file, document, table
from harness.claims.judge import ClaimVerdict, JudgedClaim, judge
from harness.claims.measure import MeasureResult
from harness.claims.printed_number import RULES
from harness.cli import main
from harness.errors import Exit
from harness.report import claims_page

MAGNITUDE = "of the same order of magnitude, by the nearest power of ten"


def judged(folder: Path, printed: str, ours: str, rounding: str = "") -> JudgedClaim:
    """Judge a ratio that was found. rounding: as the claim file writes it, empty for none."""
    more = f", rounding: {rounding}" if rounding else ""
    one = f"id: one, sentence: s, source: t, tier: exact, printed: '{printed}', measure: ratio, with: {{of: 1, to: 1}}"
    path = folder / "mine.yaml"
    path.write_text(f"paper: mine\ntitle: Mine\nversion: v1\nclaims:\n  - {{{one}{more}}}\n")
    (claim,) = claim_file.load([path])
    return judge(claim, [MeasureResult(Fraction(ours), "arithmetic")])


@pytest.mark.parametrize(
    ("printed", "ours", "rounding", "verdict", "rule"),
    [
        ("10x", "6.857", "magnitude", "reproduced", MAGNITUDE),
        ("3x", "3.4", "{about: 16%}", "reproduced", "within 16% of the printed figure"),
        ("3x", "3.5", "{about: 16%}", "not-reproduced", "within 16% of the printed figure"),
        ("3x", "3.9", "cut", "reproduced", "digits cut off, not rounded"),
        ("3x", "3", "{about: 0%}", "reproduced", "equal to the printed figure"),
        ("3x", "3.4", "nearest", "reproduced", ""),
        ("3x", "3.4", "", "reproduced", ""),
        ("> 3x", "3.4", "{about: 16%}", "reproduced", ""),  # the sign is the rule, and is printed
    ],
)
def test_the_rule_stands_beside_ours(
    tmp_path: Path, printed: str, ours: str, rounding: str, verdict: str, rule: str
) -> None:
    row = judged(tmp_path, printed, ours, rounding)
    assert row.verdict is ClaimVerdict(verdict)
    (written,) = document.document([row], {})["claims"]
    assert written["rule"] == rule
    said = f" (rule: {rule})" if rule else ""
    text = "\n".join(table.lines([row]))
    assert f"printed {printed}; we get {ours}x{said}  [t]" in text
    assert table.NO_RULES not in text
    for headlines in (False, True):
        page = tmp_path / "page.html"
        claims_page.write_page([row.model_copy(update={"headline": "h"})], {}, page, headlines=headlines)
        shown = page.read_text()
        # Quotes and signs are escaped on the page; what is printed is told before ours.
        assert f"; we get {ours}x{said}" in shown
        assert f'<td class="narrow" data-v="{rule}">{rule}</td>' in shown or headlines


@pytest.mark.parametrize("schema", [1, 2])
def test_a_ledger_without_rules_is_read_and_does_not_pass_for_rounding(
    tmp_path: Path, schema: int, capsys: pytest.CaptureFixture[str]
) -> None:
    written = document.document([judged(tmp_path, "10x", "6.857", "magnitude")], {}) | {"schema": schema}
    del written["claims"][0]["rule"]
    file = tmp_path / "claims.json"
    file.write_text(json.dumps(written))
    page = tmp_path / "page.html"
    assert main(["claims", "--show", str(file), "--html", str(page)]) == Exit.PASS
    said = capsys.readouterr().out
    assert "we get 6.857x  [t]" in said
    assert table.NO_RULES in said
    assert '<td class="narrow" data-v="not recorded">not recorded</td>' in page.read_text()
    assert main(["claims", "--show", str(file), "--json"]) == Exit.PASS
    assert json.loads(capsys.readouterr().out)["claims"][0]["rule"] is None


@pytest.mark.slow
def test_explain_tells_the_rules(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "reproduced"]) == Exit.PASS
    assert "looser rule" in " ".join(capsys.readouterr().out.split())
    assert main(["explain", "rounding"]) == Exit.PASS
    said = capsys.readouterr().out
    assert all(f"  {name}: " in said for name in RULES.keys() - {"about"})
    assert "  {about: 5%}: " in said
    assert main(["explain", "vera-10x-glue-base"]) == Exit.PASS
    assert f"rule: {MAGNITUDE}" in capsys.readouterr().out
