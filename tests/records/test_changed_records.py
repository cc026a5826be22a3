"""Records that somebody changed after the run: they do not count, and it is said wherever the run is read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from harness.analysis import run_verdict
from harness.analysis.run_facts import analyse
from harness.cli import main
from harness.errors import Exit
from harness.records import store
from harness.records.manifest import Footer
from harness.records.record import Status
from harness.report import html, terminal, view
from support import recorded_run
from support.report_page import Page, row
from support.repository import PUBLISHED

FUSED = recorded_run.cells()["fused"]


@pytest.fixture
def run(tmp_path: Path) -> store.Run:
    return recorded_run.write_run(tmp_path / "run")


def record_path(run: store.Run, attempt: int = 1) -> Path:
    return store.RunFolder(run.path).record_path(FUSED.cell_id, attempt)


def edit(path: Path) -> None:
    """Raise what a Record says of its accuracy, as whoever wants to look better might."""
    said = json.loads(path.read_text())
    accuracy = said["measurements"]["accuracy"]
    accuracy |= {"value": 1.0, "items": [{**item, "correct": 1} for item in accuracy["items"]]}
    path.write_text(json.dumps(said, indent=1) + "\n")


def remove(path: Path) -> None:
    path.unlink()


def test_a_run_seals_its_records_and_its_manifest(run: store.Run) -> None:
    assert run.footer is not None
    names = ["run.json", *(f"cells/{record.id}.json" for record in run.records)]
    assert sorted(run.footer.sha256) == sorted(names)
    assert (run.changed, len(run.records)) == ({}, 10)


@pytest.mark.slow
@pytest.mark.parametrize(("deed", "what"), [(edit, "was changed after the run"), (remove, "was removed after the run")])
def test_a_record_that_was_changed_does_not_count(
    run: store.Run, deed: Callable[[Path], None], what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    deed(record_path(run))
    again = store.read_run(run.path)
    name = f"cells/{FUSED.cell_id}.1.json"
    assert again.changed == {name: what}
    assert FUSED.cell_id not in again.latest()
    assert again.missing() == []
    assert main(["report", str(run.path)]) == Exit.FAIL
    out = capsys.readouterr().out
    assert f"changed: {name} {what}, and does not count" in out
    assert f"changed after the run: {name}" in out.splitlines()[-2]
    built = view.build([analyse(again)])["runs"][0]
    (alert,) = built["alerts"]
    assert alert["items"] == [f"{name} {what}"]
    assert "--resume measures its Cell again" in alert["text"]
    assert {c["word"]: c["count"] for c in built["counts"]} == {"ok": 9, "changed": 1}
    (shown,) = (r for g in built["comparison"]["groups"] for r in g["rows"] if r["record"] == FUSED.cell_id)
    assert shown["fields"][0]["text"] == "✗ changed"
    assert {figure["why"] for figure in shown["fields"]} == {f"{name} {what}"}
    words = Page(html.render([analyse(again)])).text
    assert "100.0 %" not in words
    assert f"{name} {what}" in words


def test_one_space_is_a_change(run: store.Run) -> None:
    path = record_path(run)
    path.write_bytes(path.read_bytes() + b" ")
    assert list(store.read_run(run.path).changed) == [f"cells/{path.name}"]


def test_a_record_that_was_put_there_does_not_count(run: store.Run) -> None:
    path = record_path(run, attempt=2)
    path.write_text(record_path(run).read_text().replace('"attempt": 1', '"attempt": 2'))
    again = store.read_run(run.path)
    assert again.changed == {f"cells/{path.name}": "was added after the run"}
    assert FUSED.cell_id in again.doubtful()


def test_an_older_attempt_does_not_stand_in_for_one_that_was_removed(tmp_path: Path) -> None:
    worse = recorded_run.failed(recorded_run.record("fused", FUSED), Status.NONCONFORMING, attempt=2)
    run = recorded_run.write_run(tmp_path / "run", extra=[worse])
    assert run_verdict.judge(run).exit is Exit.FAIL
    record_path(run, attempt=2).unlink()
    again = store.read_run(run.path)
    assert FUSED.cell_id not in again.latest()
    assert run_verdict.judge(again).exit is Exit.FAIL


def test_a_cell_cannot_be_taken_out_of_the_manifest(run: store.Run) -> None:
    manifest = json.loads((run.path / "run.json").read_text())
    manifest["cells"].pop()
    (run.path / "run.json").write_text(json.dumps(manifest))
    again = store.read_run(run.path)
    assert again.changed == {"run.json": "was changed after the run"}
    assert run_verdict.judge(again).exit is Exit.FAIL
    assert "changed: run.json was changed after the run, and does not count" in terminal.summary(analyse(again))


def close(folder: store.RunFolder, run: store.Run) -> store.Run:
    assert run.footer is not None
    folder.close(store.read_run(run.path), run.footer)
    return store.read_run(run.path)


def test_going_on_with_a_run_hides_no_change(run: store.Run) -> None:
    folder = store.RunFolder(run.path)
    edit(record_path(run))
    folder.reopen()
    assert list(store.read_run(run.path).changed) == [f"cells/{FUSED.cell_id}.1.json"]
    folder.reopen()  # that run was killed, too
    folder.write_record(recorded_run.record("fused", FUSED, attempt=2))
    again = close(folder, run)
    assert again.latest()[FUSED.cell_id].attempt == 2  # measured again, and the change is still told
    assert list(again.changed) == [f"cells/{FUSED.cell_id}.1.json"]
    assert run_verdict.judge(again).exit is Exit.FAIL
    assert sorted(path.name for path in run.path.iterdir()) == ["cells", "footer.json", "lock", "logs", "run.json"]


def test_a_record_that_was_moved_away_is_measured_again_and_forgotten(run: store.Run) -> None:
    folder = store.RunFolder(run.path)
    record_path(run).unlink()
    folder.reopen()
    assert store.read_run(run.path).missing() == [FUSED.cell_id]
    folder.write_record(recorded_run.record("fused", FUSED, attempt=2))
    again = close(folder, run)
    assert (again.changed, len(again.latest())) == ({}, 10)
    assert run_verdict.judge(again).exit is Exit.PASS


def test_a_record_that_is_written_while_the_run_is_closed_counts(run: store.Run) -> None:
    late = record_path(run)
    late.rename(run.path / "late.json")
    (run.path / "footer.json").unlink()
    unfinished = store.read_run(run.path)
    (run.path / "late.json").rename(late)
    assert run.footer is not None
    store.RunFolder(run.path).close(unfinished, run.footer)
    again = store.read_run(run.path)
    assert (again.changed, len(again.records)) == ({}, 10)


@pytest.mark.slow
def test_runs_from_before_hashes_were_kept_are_read_without_a_word(run: store.Run) -> None:
    footer = json.loads((run.path / "footer.json").read_text())
    del footer["sha256"]
    (run.path / "footer.json").write_text(json.dumps(footer))
    edit(record_path(run))
    assert store.read_run(run.path).changed == {}
    for folder in (manifest.parent for manifest in PUBLISHED.glob("*/run.json")):
        old = store.read_run(folder)
        assert (old.changed, old.broken, old.missing()) == ({}, {}, [])
        assert isinstance(old.footer, Footer)


def test_the_table_shows_the_others_as_before(run: store.Run) -> None:
    edit(record_path(run))
    again = store.read_run(run.path)
    before, after = (view.build([analyse(one)])["runs"][0]["comparison"] for one in (run, again))
    other = run.latest()[recorded_run.cells()["full"].cell_id]
    assert row(after, other)["Accuracy, %"] == row(before, other)["Accuracy, %"]
