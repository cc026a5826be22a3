"""A measure is one function in a new file, and a claim is one entry of a YAML file: no list names them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.claims import claim_file, explain, judge, measure, measures, worker
from harness.errors import SuiteError

MEASURE = '''
"""Measures: widths."""
from __future__ import annotations
from harness.claims.measure import MeasureResult, Positive, measure

@measure("count")
def doubled(width: Positive, times: int = 2) -> MeasureResult:
    """A width, several times."""
    return MeasureResult(times * width, f"{times} x {width}")
'''
CLAIM = """
paper: mine
title: Mine
version: v1
claims:
  - id: mine-doubled
    sentence: Twice the width of {{width}} is {{printed}}.
    source: Table 1
    tier: exact
    printed: 96
    measure: doubled
    with: {{width: {width}}}
"""


@pytest.fixture
def _doubled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Add a file with the measure `doubled` to the package of measures."""
    (tmp_path / "measures").mkdir()
    (tmp_path / "measures" / "widths.py").write_text(MEASURE, encoding="utf-8")
    monkeypatch.setattr(measures, "__path__", [*measures.__path__, str(tmp_path / "measures")])
    measure.measures.cache_clear()
    yield
    sys.modules.pop(f"{measures.__name__}.widths")
    measure.measures.cache_clear()


def _written(folder: Path, width: str) -> Path:
    path = folder / "mine.yaml"
    path.write_text(CLAIM.format(width=width), encoding="utf-8")
    return path


@pytest.mark.usefixtures("_doubled")
@pytest.mark.parametrize(("width", "verdict"), [("48", "reproduced"), ("47", "not-reproduced")])
def test_a_claim_is_judged_by_a_new_measure(tmp_path: Path, width: str, verdict: str) -> None:
    (claim,) = claim_file.load([_written(tmp_path, width)])
    result = worker.find(judge.plain(claim.request))
    judged = judge.judge(claim, [result])
    assert (judged.verdict, judged.how) == (verdict, f"2 x {width}")


@pytest.mark.usefixtures("_doubled")
def test_its_annotations_check_its_arguments(tmp_path: Path) -> None:
    with pytest.raises(SuiteError) as caught:
        claim_file.load([_written(tmp_path, "0")])
    (problem,) = caught.value.problems
    assert (problem.where, problem.hint) == (f"{tmp_path / 'mine.yaml'}:12", "see `peft-harness explain doubled`")


@pytest.mark.usefixtures("_doubled")
def test_explain_describes_it() -> None:
    text = dict(explain.topics())["doubled"]()
    assert "A width, several times." in text
    assert "times: int, default 2" in text
