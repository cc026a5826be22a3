"""Run folders on disk: what was finished stays, and nothing half-written is taken for a result."""

from __future__ import annotations

import errno
import fcntl
import gc
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from harness.errors import StoreError, UsageError
from harness.records import files, store
from harness.records.record import Record, Status
from support import recorded_run


@pytest.fixture
def run(tmp_path: Path) -> store.Run:
    return recorded_run.write_run(tmp_path / "run", only=["reference", "fused"])


def _path(run: store.Run, record: Record) -> Path:
    return store.RunFolder(run.path).record_path(record.cell_id, record.attempt)


def test_what_is_written_is_read_back(run: store.Run) -> None:
    assert [r.cell_id for r in run.latest().values()] == [c.cell_id for c in run.manifest.cells]
    assert (run.missing(), run.broken) == ([], {})
    for record in run.records:
        assert store.read_record(_path(run, record)) == record


def test_a_copy_with_other_items_has_other_answers(run: store.Run) -> None:
    accuracy = run.records[0].accuracy
    assert accuracy is not None
    before = accuracy.answers
    copied = accuracy.model_copy(update={"items": accuracy.items[:1]})
    assert copied.answers == {accuracy.items[0].id: accuracy.items[0].correct}
    assert accuracy.answers == before


@pytest.mark.parametrize("collects", [True, False])
def test_reading_leaves_the_garbage_collector_as_it_was(run: store.Run, collects: bool) -> None:
    before = gc.isenabled()
    try:
        (gc.enable if collects else gc.disable)()
        store.read_run(run.path)
        assert gc.isenabled() is collects
    finally:
        (gc.enable if before else gc.disable)()


@pytest.mark.parametrize("torn", [b"", b'{"schema": 1, "run": "x', b"[]", b"null", b'{"schema": "1"}', b"\xff\xfe"])
def test_a_torn_record_is_shown_and_its_cell_is_missing(run: store.Run, torn: bytes) -> None:
    whole, broken = run.records
    _path(run, broken).write_bytes(torn)
    again = store.read_run(run.path)
    assert list(again.broken) == [_path(run, broken).name]
    assert "not a complete Record" in again.broken[_path(run, broken).name]
    assert again.missing() == [broken.cell_id]
    assert again.records == (whole,)


def test_every_prefix_of_a_record_is_torn(run: store.Run) -> None:
    path = _path(run, run.records[0])
    text = path.read_bytes().rstrip()
    for length in range(0, len(text), max(1, len(text) // 50)):
        path.write_bytes(text[:length])
        with pytest.raises(StoreError, match="not a complete Record"):
            store.read_record(path)


def test_a_copy_of_a_record_is_no_second_record(run: store.Run) -> None:
    first, second = run.records
    _path(run, second).write_bytes(_path(run, first).read_bytes())
    again = store.read_run(run.path)
    assert again.records == (first,)
    assert first.id in again.broken[_path(run, second).name]


def test_a_record_of_another_run_does_not_count(run: store.Run) -> None:
    first, second = run.records
    path = _path(run, second)
    path.write_text(json.dumps({**json.loads(path.read_text()), "run": "20261101-another"}))
    again = store.read_run(run.path)
    assert again.records == (first,)
    assert "another run, 20261101-another" in again.broken[path.name]


def test_a_newer_schema_is_refused(run: store.Run) -> None:
    path = _path(run, run.records[0])
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema": store.SCHEMA + 1}))
    with pytest.raises(StoreError, match="schema") as caught:
        store.read_record(path)
    assert "newer peft-harness" in caught.value.hint
    assert "schema" in store.read_run(run.path).broken[path.name]


@pytest.mark.parametrize("field", [{"measurement": 1}, {"duration_s": float("nan")}, {"cell_id": "0" * 16}])
def test_what_no_record_can_hold_is_not_read(run: store.Run, field: dict[str, object]) -> None:
    path = _path(run, run.records[0])
    path.write_text(json.dumps({**json.loads(path.read_text()), **field}))
    with pytest.raises(StoreError, match="not a complete Record"):
        store.read_record(path)


def _change(record: Record, *path: str | int, to: object) -> dict[str, Any]:
    whole = record.model_dump(mode="json", by_alias=True)
    *way, last = path
    inner: Any = whole
    for step in way:
        inner = inner[step]
    inner[last] = to
    return whole


@pytest.mark.parametrize(
    ("path", "to", "says"),
    [
        (("checks", 0, "error"), 1e9, "did not pass"),
        (("checks", 0, "nonfinite"), 7, "7 elements not finite"),
        (("measurements", "accuracy", "value"), 0.99, "the accuracy is 0.99"),
        (
            ("measurements", "training", "step_seconds", 0),
            -1.0,
            "measurements.training.step_seconds.0: Input should be",
        ),
        (("measurements", "parameters", "adapter"), -5, "measurements.parameters.adapter: Input should be"),
    ],
)
def test_a_record_that_contradicts_itself_is_not_read(
    run: store.Run, path: tuple[str | int, ...], to: object, says: str
) -> None:
    whole = next(r for r in run.records if r.checks and r.measurements and r.measurements.training)
    file = _path(run, whole)
    file.write_text(json.dumps(_change(whole, *path, to=to)))
    with pytest.raises(StoreError) as caught:
        store.read_record(file)
    assert "not a complete Record: " in caught.value.what
    assert says in caught.value.what
    assert "pydantic" not in caught.value.what


def test_a_folder_that_is_no_run_is_told_so(tmp_path: Path) -> None:
    (tmp_path / "odd").mkdir()
    for name, runs in ((str(tmp_path / "odd"), tmp_path / "none"), ("odd", tmp_path)):
        with pytest.raises(UsageError, match="it has no run") as caught:
            store.find_run(name, runs)
        assert caught.value.where == str(tmp_path / "odd")


def test_attempt_numbers_are_never_used_again(run: store.Run) -> None:
    folder, cell_id = store.RunFolder(run.path), run.records[0].cell_id
    assert folder.next_attempt("0" * 16) == 1
    assert folder.next_attempt(cell_id) == 2
    folder.log_path(cell_id, 2).touch()  # a worker that was killed leaves its log alone
    assert folder.next_attempt(cell_id) == 3
    torn = folder.record_path(cell_id, 11)
    torn.write_text("{")
    assert folder.next_attempt(cell_id) == 12
    torn.rename(torn.with_name(f"{cell_id}.11.torn.json"))  # moved away, as the message of a torn file says
    assert folder.next_attempt(cell_id) == 12
    folder.reopen()
    folder.close(store.read_run(run.path), run.footer)  # type: ignore[arg-type]  # the fixture's run is complete
    for gone in (*run.path.glob("cells/*"), *run.path.glob("logs/*")):
        gone.unlink()
    assert folder.next_attempt(cell_id) == 2  # it was hashed, and another file of its name would be taken for a forgery


def test_a_record_is_never_replaced(run: store.Run) -> None:
    record = run.records[0]
    before = _path(run, record).read_bytes()
    with pytest.raises(StoreError, match="has a Record already"):
        store.RunFolder(run.path).write_record(recorded_run.failed(record, Status.LOST))
    assert _path(run, record).read_bytes() == before


@pytest.mark.parametrize("links", [True, False])
def test_a_record_that_comes_between_is_not_replaced(
    links: bool, run: store.Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = recorded_run.failed(run.records[0], Status.LOST, attempt=2)
    path, folder = _path(run, record), store.RunFolder(run.path)
    fsync, link = os.fsync, os.link

    def another_is_faster(descriptor: int) -> None:
        fsync(descriptor)
        path.write_text("theirs")

    monkeypatch.setattr(os, "fsync", another_is_faster)

    def no_links(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", link if links else no_links)
    with pytest.raises(StoreError, match="has a Record already"):
        folder.write_record(record)
    assert path.read_text() == "theirs"
    monkeypatch.setattr(os, "fsync", fsync)
    path.unlink()
    folder.write_record(record)
    assert store.read_record(path) == record
    assert not [*path.parent.glob(".*")]


def test_the_newest_attempt_counts_also_if_it_is_worse(run: store.Run) -> None:
    first = run.records[0]
    store.RunFolder(run.path).reopen()
    for attempt in (2, 10):
        store.RunFolder(run.path).write_record(recorded_run.failed(first, Status.OOM, attempt=attempt))
    newest = store.read_run(run.path).latest()[first.cell_id]
    assert (newest.attempt, newest.status) == (10, Status.OOM)


@pytest.mark.parametrize("where", ["write", "fsync", "replace"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_full_disk_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, number: int
) -> None:
    path = tmp_path / "footer.json"
    files.write_atomic(path, b"old")

    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        if where == "write":

            class Full(io.FileIO):
                write = fail  # type: ignore[assignment]

            patch.setattr(Path, "open", lambda self, mode: Full(self, mode.replace("b", "")))
        else:
            patch.setattr(*{"fsync": (os, "fsync"), "replace": (Path, "replace")}[where], fail)
        with pytest.raises(StoreError) as caught:
            files.write_atomic(path, b"new")
    assert caught.value.where == str(path)
    full = number != errno.EIO
    assert ("the disk is full" in caught.value.what) == full
    assert ("free some space" in caught.value.hint) == full
    assert caught.value.hint
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["footer.json"]


def test_an_interrupted_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        files.write_atomic(tmp_path / "footer.json", b"new")
    assert list(tmp_path.iterdir()) == []


def test_half_a_write_is_not_read(run: store.Run) -> None:
    # What a kill in the middle of a write leaves.
    (run.path / "cells" / f".{run.records[0].cell_id}.2.json.123.tmp").write_text("{")
    again = store.read_run(run.path)
    assert (again.records, again.broken) == (run.records, {})


def test_a_used_folder_is_refused_and_stays(run: store.Run, tmp_path: Path) -> None:
    before = sorted((p, p.stat().st_mtime_ns) for p in run.path.rglob("*"))
    with pytest.raises(UsageError, match="holds a run already"):
        store.RunFolder.create(run.path, run.manifest)
    assert sorted((p, p.stat().st_mtime_ns) for p in run.path.rglob("*")) == before
    (run.path / "run.json").unlink()  # Records alone are no new run's either
    with pytest.raises(UsageError, match="holds a run already"):
        store.RunFolder.create(run.path, run.manifest)
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="cannot make the run folder"):
        store.RunFolder.create(tmp_path / "file" / "run", run.manifest)


def test_reopening_takes_the_footer_away(run: store.Run) -> None:
    store.RunFolder(run.path).reopen()
    again = store.read_run(run.path)
    assert again.footer is None
    assert again.records == run.records


@pytest.mark.parametrize("torn", [b"", b'{"schema": 1, "run": "x', b"[]", b"\xff\xfe", b'{"schema": 99}'])
def test_a_run_with_an_unreadable_footer_is_incomplete(run: store.Run, torn: bytes) -> None:
    (run.path / "footer.json").write_bytes(torn)
    again = store.read_run(run.path)
    assert (again.footer, again.records) == (None, run.records)
    assert list(again.broken) == ["footer.json"]
    assert "measure that Cell again" not in again.broken["footer.json"]  # which would mend nothing


def test_a_torn_manifest_has_a_hint_of_its_own(run: store.Run) -> None:
    (run.path / "run.json").write_bytes(b"{")
    with pytest.raises(StoreError, match="not a complete Manifest") as caught:
        store.read_run(run.path)
    assert "start a new run" in caught.value.hint


def test_a_run_has_one_writer_at_a_time(run: store.Run) -> None:
    holder = store.RunFolder.take(run.path)
    with pytest.raises(UsageError, match="another peft-harness is writing to this run") as caught:
        store.RunFolder.take(run.path)
    assert f"process {os.getpid()} on " in caught.value.what
    assert caught.value.where == str(run.path)
    assert caught.value.hint
    holder.release()
    store.RunFolder.take(run.path).release()


def test_a_new_run_is_locked_from_its_first_moment(run: store.Run, tmp_path: Path) -> None:
    folder = store.RunFolder.create(tmp_path / "new", run.manifest)
    with pytest.raises(UsageError, match="another peft-harness"):
        store.RunFolder.take(folder.path)


def test_two_new_runs_into_one_folder(run: store.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The second looked before the first had written anything.
    (tmp_path / "new").mkdir()
    first = store.RunFolder.take(tmp_path / "new")
    with pytest.raises(UsageError, match="another peft-harness"):
        store.RunFolder.create(tmp_path / "new", run.manifest)
    assert not (tmp_path / "new" / "run.json").exists()
    first.release()
    real = store.RunFolder.take

    def late(path: Path) -> store.RunFolder:
        (path / "run.json").write_text("the first one's")
        return real(path)

    monkeypatch.setattr(store.RunFolder, "take", late)
    with pytest.raises(UsageError, match="holds a run already"):
        store.RunFolder.create(tmp_path / "new", run.manifest)
    assert (tmp_path / "new" / "run.json").read_text() == "the first one's"


@pytest.mark.slow
def test_a_killed_writer_leaves_no_lock(run: store.Run) -> None:
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom harness.records import store\n"
        "folder = store.RunFolder.take(Path(sys.argv[1]))\nprint('held', flush=True)\ntime.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(run.path)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UsageError, match=f"process {holder.pid} on "):
            store.RunFolder.take(run.path)
        holder.kill()
        holder.wait()
    store.RunFolder.take(run.path).release()


def test_a_file_system_without_locks_is_no_place_for_runs(run: store.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(StoreError, match="cannot lock this run") as caught:
        store.RunFolder.take(run.path)
    assert "--out" in caught.value.hint


def test_runs_are_found_by_folder_id_prefix_and_latest(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    for number, name in enumerate(["20260101-a", "20260102-b", "20260102-bc"]):
        recorded_run.write_run(runs / name, run=name, only=["reference"])
        os.utime(runs / name / "run.json", (number, number))
    os.utime(runs / "20260101-a" / "run.json", (9, 9))
    assert store.find_run(str(runs / "20260101-a"), tmp_path / "none") == runs / "20260101-a"
    assert store.find_run("20260101", runs) == runs / "20260101-a"
    assert store.find_run("20260102-b", runs) == runs / "20260102-b"  # whole, though another begins with it
    assert store.find_run("latest", runs) == runs / "20260101-a"
    with pytest.raises(UsageError, match="matches 2 runs"):
        store.find_run("20260102", runs)
    with pytest.raises(UsageError, match="no run 'x'") as caught:
        store.find_run("x", runs)
    assert caught.value.hint == "runs here: latest, 20260101-a, 20260102-b, 20260102-bc; or name a folder"
    for typed, meant in (("lastest", "latest"), ("20260102-d", "20260102-b"), ("quick", "20260103-quick-1")):
        if typed == "quick":
            (runs / meant).mkdir()
            (runs / meant / "run.json").write_text("{}")
        with pytest.raises(UsageError, match=f"no run '{typed}'") as caught:
            store.find_run(typed, runs)
        assert caught.value.hint == f"did you mean `{meant}`? Or name a folder"
    with pytest.raises(UsageError, match="no run 'latest'"):
        store.find_run("latest", tmp_path / "none")
    with pytest.raises(UsageError, match="no such folder") as caught:
        store.find_run(str(tmp_path / "gone"), runs)
    assert caught.value.where == str(tmp_path / "gone")


def test_an_empty_name_is_not_the_only_run(tmp_path: Path) -> None:
    """A script with `report "$UNSET"` gives one."""
    recorded_run.write_run(tmp_path / "20260101-a", run="20260101-a", only=["reference"])
    with pytest.raises(UsageError, match="is empty"):
        store.find_run("", tmp_path)


@pytest.mark.parametrize(("file", "told"), [("adapter_config.json", "peft-harness import"), ("notes.txt", "copy it")])
def test_a_folder_of_another_program_is_for_import(tmp_path: Path, file: str, told: str) -> None:
    (tmp_path / file).write_text("{}")
    with pytest.raises(UsageError, match="is no run") as caught:
        store.find_run(str(tmp_path), tmp_path / "none")
    assert told in caught.value.hint


def test_a_folder_without_run_json_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not a run folder"):
        store.read_run(tmp_path)
