"""One declaration of a metric feeds the comparison table, the export, the history and the baseline gate."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.analysis import metrics, tracked_metrics
from harness.analysis.comparison import against_baseline
from harness.analysis.comparison.baseline_rows import RowKind
from harness.analysis.metrics import Metric
from harness.analysis.run_facts import analyse
from harness.analysis.verdict_kind import VerdictKind
from harness.records.record import Record
from harness.report import html, terminal, view
from harness.report.export import frames
from support import recorded_run


def _tensors(record: Record) -> int | None:
    return 3 + record.attempt if record.measurements else None


NEW = Metric(
    name="tensors", unit="1", meaning="tensors that train", kind="counted", better="lower", read=_tensors,
    heading="Tensors", terminal_heading="tensors", column="parameters.tensors", history="tensors",
    quantity="trained tensors", row_kind=RowKind.PARAMETERS,
)  # fmt: skip


@pytest.fixture
def declared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "METRICS", (*metrics.METRICS, NEW))


@pytest.mark.usefixtures("declared")
def test_a_metric_that_is_declared_once_is_shown_exported_tracked_and_judged(tmp_path: Path) -> None:
    run = recorded_run.write_run(tmp_path / "a", only=["fused"])
    facts = analyse(run)
    head, row = terminal.summary(facts)[:2]
    assert head.split()[-1] == "tensors"
    assert row.split()[-1] == "4"
    table = view.build([facts])["runs"][0]["comparison"]
    at = [column["label"] for column in table["columns"]].index("Tensors")
    assert table["groups"][0]["rows"][0]["fields"][at]["value"] == 4
    assert 'title="tensors that train"' in html.render([facts])

    numbers = frames.of([run])
    assert numbers.cells["parameters.tensors"].tolist() == [4]
    (described,) = numbers.columns[numbers.columns["column"] == "parameters.tensors"].to_dict("records")
    assert (described["dtype"], described["unit"], described["meaning"]) == ("Int64", "1", "Tensors that train")

    assert tracked_metrics.tracked(run.records[0]).values["tensors"] == 4
    assert tracked_metrics.kind("tensors") == "counted"

    def again(_: str, record: Record) -> Record:
        return record.model_copy(update={"attempt": 2})

    grown = recorded_run.write_run(tmp_path / "b", run="b", only=["fused"], change=again)
    found = against_baseline.judge(facts, analyse(grown))
    (finding,) = [row for row in found.rows if row.what == "trained tensors"]
    assert (finding.word, finding.reason, finding.base, finding.new) == (VerdictKind.FAIL, "grew", 4, 5)


def test_names_are_unique_and_every_metric_is_described() -> None:
    for field in ("name", "column", "history", "quantity", "heading", "terminal_heading"):
        names = [name for metric in metrics.METRICS if (name := getattr(metric, field))]
        assert len(names) == len(set(names)), field
    assert all(len(metric.meaning) > 4 for metric in metrics.METRICS)
