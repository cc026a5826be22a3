"""`history add`: store the results of runs in a history. The runs of a suite on one night are called passes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from harness.analysis import tracked_metrics
from harness.console import print_lines, print_note
from harness.errors import Exit, UsageError, plural
from harness.records import store
from harness.records.record import Status
from harness.records.store import Run
from harness.regression.history import night_files
from harness.regression.history.night_files import AttemptRow, Night, RunHeader


@dataclass
class Added:
    """Result of one call of `add`."""

    left_out: list[str] = field(default_factory=list)
    """One sentence for each part of a run that was not added (a file, a Cell or its times), with the reason."""
    nights: dict[str, int] = field(default_factory=dict)
    """Date of a night -> number of rows added to its file."""
    rows: int = 0
    """Number of rows (attempts at Cells) of all runs, including rows that the history already had."""
    findings: set[Exit] = field(default_factory=set)


def add(names: Sequence[str], folder: Path, night: str | None = None) -> Exit:
    """Add runs to a history, print what was added and return the exit code.

    names: the runs, as folders or ids. night: the date under which all runs are stored. If None, each run is stored
    under the UTC date of its start.

    Returns FAIL if a file was changed after its run. Returns NOTHING_COMPARED if there is nothing to add. Returns
    INFRASTRUCTURE if a Record is missing or unreadable, or if a footer has no hashes. Raises UsageError if a run does
    not exist, if the date is invalid, or if a run is already stored under another night.
    """
    if night is not None and not night_files.is_night(night):
        raise UsageError(f"not a date: {night!r}", where="--night", hint="write it as 2026-01-31")
    runs = [store.read_run(store.find_run(name)) for name in names]
    added = Added()
    with night_files.locked(folder):
        for run in runs:
            _add(run, folder, night or run.manifest.started[:10], added)
    print_lines(added.left_out, err=True)
    for name in sorted(added.nights):
        new = added.nights[name]
        path = folder / f"{name}.jsonl"
        print_lines([f"{path}: {plural(new, 'new row')}" if new else f"{path}: nothing new"])
    if Exit.FAIL in added.findings:
        return Exit.FAIL
    if not added.rows:
        print_note("nothing to add: no Record that counts")
        return Exit.NOTHING_COMPARED
    return Exit.INFRASTRUCTURE if added.findings else Exit.PASS


def _add(run: Run, folder: Path, name: str, added: Added) -> None:
    """Add one run to the night with the date `name`. If new rows result, write the files of the history."""
    if not night_files.is_night(name):
        raise UsageError(
            f"has no start date: {run.manifest.started!r}", where=str(run.path), hint="name the night by --night"
        )
    _refuse_other_night(run, folder, name)
    _note_problems(run, added)
    broken: dict[str, str] = {}
    path = folder / f"{name}.jsonl"
    night = (night_files.read_night(path, broken) if path.exists() else None) or Night(name)
    _refuse_broken(broken, path)
    known = {(row["cell"], row["run"]): row for row in night.rows}
    rows = {(row["cell"], row["run"]): row for row in _rows(run, night, added)}
    new = sum(known.get(key) != row for key, row in rows.items())
    added.rows += len(rows)
    added.nights[name] = added.nights.get(name, 0) + new
    header = _header(run)
    if new or (rows and night.runs.get(header["run"]) != header):
        cells = night_files.cells(folder, broken)
        _refuse_broken(broken, folder)
        night_files.write_cells(
            folder, cells | {r.cell_id: r.cell.model_dump(mode="json") for r in run.latest().values()}
        )
        night.runs[header["run"]] = header
        night.rows = list((known | rows).values())
        night_files.write_night(folder, night)


def _refuse_broken(broken: dict[str, str], where: Path) -> None:
    """Raise UsageError if a file has unreadable parts, since rewriting the file would delete them."""
    if broken:
        what = "; ".join(f"{file}: {why}" for file, why in broken.items())
        hint = "restore it from git, then repeat `history add`"
        raise UsageError(f"changed since `history add` wrote it: {what}", where=str(where), hint=hint)


def _header(run: Run) -> RunHeader:
    m, e = run.manifest, run.manifest.environment
    return {
        "run": m.run, "started": m.started, "suite": m.suite, "code_version": e.code_version, "git_sha": e.git_sha,
        "git_dirty": e.git_dirty, "software": dict(sorted(e.software.items())),
    }  # fmt: skip


def _rows(run: Run, night: Night, added: Added) -> Iterator[AttemptRow]:
    """Yield a row for each Cell of a run, except skipped Cells.

    Also add the place of each Cell, i.e. its machine and software, to `night.places`.
    """
    for record in run.latest().values():
        if record.status is Status.SKIPPED:
            continue  # this Cell cannot run here on any night
        place = tracked_metrics.place(record)
        place_id = tracked_metrics.place_id(place)
        night.places[place_id] = place
        row: AttemptRow = {"cell": record.cell_id, "run": record.run, "attempt": record.attempt, "on": place_id}
        if record.status is not Status.OK:
            row["status"] = record.status.value
        else:
            metrics = tracked_metrics.tracked(record)
            if metrics.untimed:
                added.left_out.append(f"no times of {record.cell.label} ({record.cell_id}): {metrics.untimed}")
            row["values"] = dict(sorted(metrics.values.items()))
        yield row


def _note_problems(run: Run, added: Added) -> None:
    """Note in `added` which files and Cells of a run are left out, or cannot be trusted, with the reasons."""
    problems = [f"{name}: {why}" for name, why in run.broken.items()]
    problems += [f"{name} {what}" for name, what in (run.changed | run.ungated).items()]
    problems += [f"{cell_id} has no Record" for cell_id in run.missing()]
    added.left_out += [f"left out: {run.path}: {problem}" for problem in problems]
    unsealed = run.footer is not None and not run.footer.sha256
    if unsealed:
        what = "its footer has no hashes, so a changed Record would not be detected"
        added.left_out.append(f"{run.path}: {what}")
    if run.changed:
        added.findings.add(Exit.FAIL)
    if run.broken or run.ungated or run.missing() or unsealed:
        added.findings.add(Exit.INFRASTRUCTURE)


def _refuse_other_night(run: Run, folder: Path, name: str) -> None:
    """Raise UsageError if the run is already stored under another night, since it would then count twice."""
    mark = f'{{"run":"{run.manifest.run}",'
    others = [path for path in sorted(folder.glob("*.jsonl")) if night_files.is_night(path.stem) and path.stem != name]
    for path in others:
        if mark in path.read_text(encoding="utf-8", errors="replace"):
            what = f"run {run.manifest.run} is a pass of the night {path.stem} already"
            hint = f"add it with --night {path.stem}, or remove it from {path}"
            raise UsageError(what, where=f"--night {name}", hint=hint)
