"""The verb `history add`: the passes of a night, kept."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from harness.analysis import tracked_metrics
from harness.errors import Exit, UsageError
from harness.records import store
from harness.records.record import Record, Status
from harness.records.store import Run
from harness.regression.history import night_files
from harness.regression.history.night_files import Line, Night


@dataclass
class Added:
    """What one call did. told: what was left out, with its reason. nights: rows that are new, by night."""

    told: list[str] = field(default_factory=list)
    nights: dict[str, int] = field(default_factory=dict)
    known: int = 0
    rows: int = 0
    serious: set[Exit] = field(default_factory=set)


def add(names: Sequence[str], folder: Path, night: str | None = None) -> Exit:
    """Add runs to a history, say what was added, return the exit code.

    night: of all these runs; else each run's own, the date in UTC on which it began. 1 where a file was changed after its
    run, 4 where a Record cannot be read or is missing, or nothing would show a change, 5 where there was nothing to add.
    Raises UsageError for what is no run, no date, or a run that another night has already.
    """
    if night is not None and not night_files.is_night(night):
        raise UsageError(f"{night!r} is no date", where="--night", hint="write it as 2026-01-31")
    runs = [store.read_run(store.find_run(name)) for name in names]
    done = Added()
    with night_files.held(folder):
        for run in runs:
            _add(run, folder, night or run.manifest.started[:10], done)
    for line in done.told:
        print(line, file=sys.stderr)
    for name in sorted(done.nights):
        new = done.nights[name]
        path = folder / f"{name}.jsonl"
        print(f"{path}: {new} new row{'s' * (new != 1)}" if new else f"{path}: nothing new")
    if Exit.FAIL in done.serious:
        return Exit.FAIL
    if not done.rows:
        print("nothing to add: no Record that counts", file=sys.stderr)
        return Exit.NOTHING_COMPARED
    return Exit.INFRASTRUCTURE if done.serious else Exit.PASS


def _add(run: Run, folder: Path, name: str, done: Added) -> None:
    if not night_files.is_night(name):
        raise UsageError(f"began on no date: {run.manifest.started!r}", where=str(run.path), hint="name its --night")
    _refuse_other_night(run, folder, name)
    _tell(run, done)
    broken: dict[str, str] = {}
    path = folder / f"{name}.jsonl"
    night = (night_files.read_night(path, broken) if path.exists() else None) or Night(name)
    if broken:  # what cannot be read would be lost by writing the file anew
        what = "; ".join(f"{file}: {why}" for file, why in broken.items())
        raise UsageError(f"not as `history add` left it: {what}", where=str(path), hint="restore it from git, then add")
    rows = {(row["cell"], row["run"]): row for row in night.rows}
    places: dict[str, dict[str, str]] = {}
    found = list(_rows(run, places, done))
    new = {(row["cell"], row["run"]): row for row in found if rows.get((row["cell"], row["run"])) != row}
    done.rows += len(found)
    done.nights[name] = done.nights.get(name, 0) + len(new)
    head = _head(run)
    if new or (found and night.runs.get(head["run"]) != head):
        night_files.write_cells(folder, _cells(folder) | {r.cell_id: _cell(r) for r in run.latest().values()})
        night.runs[head["run"]] = head
        night.places |= places
        night.rows = list((rows | new).values())
        night_files.write_night(folder, night)


def _cells(folder: Path) -> dict[str, Line]:
    broken: dict[str, str] = {}
    known = night_files.cells(folder, broken)
    if broken:
        what = "; ".join(f"{file}: {why}" for file, why in broken.items())
        raise UsageError(
            f"not as `history add` left it: {what}", where=str(folder), hint="restore it from git, then add"
        )
    return known


def _cell(record: Record) -> Line:
    return record.cell.model_dump(mode="json")


def _head(run: Run) -> Line:
    """Return what all rows of a run share; software and code are what may have changed since the night before."""
    m = run.manifest
    e = m.environment
    return {
        "run": m.run, "started": m.started, "suite": m.suite, "code_version": e.code_version, "git_sha": e.git_sha,
        "git_dirty": e.git_dirty, "software": dict(sorted(e.software.items())),
    }  # fmt: skip


def _rows(run: Run, places: dict[str, dict[str, str]], done: Added) -> Iterator[Line]:
    for record in run.latest().values():
        if record.status is Status.SKIPPED:
            continue  # it cannot run here on any night
        place = tracked_metrics.place(record)
        on = tracked_metrics.place_id(place)
        places[on] = place
        row = {"cell": record.cell_id, "run": record.run, "attempt": record.attempt, "on": on}
        if record.status is not Status.OK:
            yield row | {"status": record.status.value}
            continue
        kept = tracked_metrics.kept(record)
        if kept.untimed:
            done.told.append(f"no times of {record.cell.label} ({record.cell_id}): {kept.untimed}")
        yield row | {"values": dict(sorted(kept.values.items()))}


def _tell(run: Run, done: Added) -> None:
    """Name what of a run does not count, and why."""
    for name, why in run.broken.items():
        done.told.append(f"left out: {run.path}: {name}: {why}")
    for name, what in run.changed.items():
        done.told.append(f"left out: {run.path}: {name} {what}")
    for cell_id in run.missing():
        done.told.append(f"left out: {run.path}: {cell_id} has no Record")
    unsealed = run.footer is not None and not run.footer.sha256
    if unsealed:
        done.told.append(
            f"{run.path}: its footer holds no hashes, so that nobody knows whether its Records are as it left them"
        )
    if run.changed:
        done.serious.add(Exit.FAIL)
    if run.broken or run.missing() or unsealed:
        done.serious.add(Exit.INFRASTRUCTURE)


def _refuse_other_night(run: Run, folder: Path, name: str) -> None:
    """One run is one pass of one night: counted twice it would outvote the others."""
    mark = f'{{"run":"{run.manifest.run}",'
    for path in sorted(folder.glob("*.jsonl")):
        if (
            night_files.is_night(path.stem)
            and path.stem != name
            and mark in path.read_text(encoding="utf-8", errors="replace")
        ):
            raise UsageError(
                f"run {run.manifest.run} is a pass of the night {path.stem} already",
                where=f"--night {name}",
                hint=f"add it with --night {path.stem}, or take it out of {path}",
            )
