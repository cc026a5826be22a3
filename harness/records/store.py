"""Read and write run folders. A run writes `run.json` first, then one file per attempt, and `footer.json` last.

Each file appears at once, so no reader sees a part of a file. The footer holds the hashes of the other files. The
hashes are not a signature: anyone who changes a file can change its hash, too.

results/runs/<run>/run.json  cells/<cell_id>.<attempt>.json  logs/  footer.json  report.html  lock
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shlex
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from harness.errors import StoreError, UsageError, did_you_mean
from harness.records import collection, gate
from harness.records.base_model import mistake
from harness.records.files import sha256, write_atomic
from harness.records.manifest import Footer, Manifest
from harness.records.record import SCHEMA, Record

RUNS = Path("results") / "runs"

_FOOTER, _REOPENED = "footer.json", "footer.before.json"

_Model = TypeVar("_Model", bound=BaseModel)

_TORN: dict[type[BaseModel], str] = {
    Manifest: "start a new run, since this file lists the expected Cells; the Records can still be read",
    Record: "the file is incomplete or edited; move it away and `--resume` the run to measure that Cell again",
    Footer: "the run counts as incomplete: finish it with --resume",
}


def now() -> str:
    """Return the current time in UTC, as ISO 8601 text to the second."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def write(path: Path, model: BaseModel, *, new: bool = False) -> None:
    """Write a Manifest, Record or Footer as JSON. new: whether to raise FileExistsError if the file exists."""
    write_atomic(path, model.model_dump_json(by_alias=True, indent=1).encode() + b"\n", new=new)


def _read(path: Path, kind: type[_Model]) -> _Model:
    try:
        text = path.read_bytes()
    except OSError as error:
        raise StoreError(f"cannot read: {error.strerror}", where=str(path), hint="make the file readable") from error
    try:
        found, problem = kind.model_validate_json(text), None
    except ValidationError as error:
        found, problem = None, error
    schema = _schema(text) if found is None else getattr(found, "schema_", 0)
    if schema > SCHEMA:
        hint = "install a newer peft-harness"
        raise StoreError(f"written with schema {schema}, this version reads up to {SCHEMA}", where=str(path), hint=hint)
    if found is None:
        raise StoreError(
            f"not a complete {kind.__name__}: {mistake(problem)}", where=str(path), hint=_TORN[kind]
        ) from problem
    return found


def _schema(text: bytes) -> int:
    """Return the schema number of a file that is otherwise invalid, or 0 if there is none."""
    try:
        number = json.loads(text).get("schema", 0)
    except (ValueError, AttributeError, RecursionError):
        return 0
    return number if isinstance(number, int) else 0


@dataclass(frozen=True)
class Run:
    """The content of a run folder."""

    path: Path
    """Folder of the run."""
    manifest: Manifest
    """Content of run.json."""
    records: tuple[Record, ...]
    """The Records of all attempts, except those in `broken`, `changed` and `ungated`."""
    footer: Footer | None
    """Content of footer.json; None for an unfinished run."""
    broken: dict[str, str] = field(default_factory=dict)
    """Names of unreadable files, with the reason why each cannot be read. Reports list these files."""
    changed: dict[str, str] = field(default_factory=dict)
    """Paths of files that were changed, removed or added after the run, each with what happened to it. Records in such
    files are not used."""
    ungated: dict[str, str] = field(default_factory=dict)
    """Records that are not used, because the Record that ran their parity gate (the checks before the measurement) is
    missing, unreadable or changed: path -> the reason."""

    @property
    def how(self) -> str:
        """End of the run: `finished`, `interrupted` or `failed`. A run without a footer is `incomplete`."""
        return self.footer.how if self.footer else "incomplete"

    def latest(self) -> dict[str, Record]:
        """Map each cell_id to the newest attempt's Record, in the manifest's order, without Cells in `doubtful`."""
        newest, doubtful = self._newest, self.doubtful()
        ids = [cell.cell_id for cell in self.manifest.cells]
        return {i: newest[i] for i in ids if i in newest and i not in doubtful}

    def doubtful(self) -> dict[str, str]:
        """Return the reason for each Cell whose newest Record must not be used, by cell_id.

        Such a Record was changed, removed or added after the run, or it is in `ungated`. An older Record of the Cell
        must not replace it.
        """
        reasons = self.changed | self.ungated
        return {cell_id: f"{name} {reasons[name]}" for cell_id, name in self._not_counted.items()}

    def ungated_cells(self) -> set[str]:
        """Return the cell_ids in `doubtful` whose newest Record is in `ungated`."""
        return {cell_id for cell_id, name in self._not_counted.items() if name in self.ungated}

    def missing(self) -> list[str]:
        """List the expected cell_ids without any Record."""
        have = self._newest.keys() | self.doubtful().keys()
        return [cell.cell_id for cell in self.manifest.cells if cell.cell_id not in have]

    @cached_property
    def _not_counted(self) -> dict[str, str]:
        """Map each cell_id in `doubtful` to the path of its newest Record."""
        newest, found = self._newest, dict[str, str]()
        for name in (*self.changed, *self.ungated):
            cell_id, _, attempt = Path(name).stem.partition(".")
            if attempt.isdecimal() and (cell_id not in newest or newest[cell_id].attempt < int(attempt)):
                found[cell_id] = name
        return found

    @cached_property
    def _newest(self) -> dict[str, Record]:
        return {record.cell_id: record for record in sorted(self.records, key=lambda r: r.attempt)}


class RunFolder:
    """Writer of one run folder.

    `create` and `take` lock the folder, so that no other process writes to it. The lock ends with `release`, or when
    the object or the process ends. A worker needs no lock, because it writes only one Record for the runner.
    """

    def __init__(self, path: Path, lock: int | None = None) -> None:
        self.path = path
        self._unlock = None if lock is None else weakref.finalize(self, os.close, lock)

    @classmethod
    def create(cls, path: Path, manifest: Manifest) -> RunFolder:
        """Make a run folder, lock it, write run.json, and return the RunFolder.

        Raises UsageError for a folder that already holds a run.
        """
        refuse_used(path)
        try:
            for sub in ("cells", "logs"):
                (path / sub).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(
                f"cannot make the run folder: {error.strerror}", where=str(path), hint="name a writable --out"
            ) from error
        folder = cls.take(path)
        try:
            refuse_used(path)  # another runner may have finished in the meantime
            write(path / "run.json", manifest)
        except BaseException:
            folder.release()
            raise
        return folder

    @classmethod
    def take(cls, path: Path) -> RunFolder:
        """Lock a folder for writing, and return its RunFolder. Raises UsageError if another process holds the lock."""
        return cls(path, _lock(path / "lock"))

    def release(self) -> None:
        """Release the lock."""
        if self._unlock is not None:
            self._unlock()  # a second call does nothing

    def record_path(self, cell_id: str, attempt: int) -> Path:
        """Return the path of an attempt's Record."""
        return self.path / "cells" / f"{cell_id}.{attempt}.json"

    def log_path(self, cell_id: str, attempt: int) -> Path:
        """Return the path of the log with a worker's stdout and stderr."""
        return self.path / "logs" / f"{cell_id}.{attempt}.txt"

    def next_attempt(self, cell_id: str) -> int:
        """Return the number for the next attempt at a Cell. Numbers of broken or removed files are not reused."""
        return self.last_attempts().get(cell_id, 0) + 1

    def last_attempts(self) -> dict[str, int]:
        """Map each cell_id to the number of its last attempt. Cells that were never attempted are left out.

        Lists all files of the run, so a caller with many Cells should call it only once.
        """
        names = [path.name for path in (*(self.path / "cells").glob("*.json"), *(self.path / "logs").glob("*.txt"))]
        names += [name.removeprefix("cells/") for name in _sealed(self.path)]
        found: dict[str, int] = {}
        for name in names:
            # Not every name has a number: a user may have renamed a broken file to `.1.torn.json`.
            cell_id, number = [*name.split("."), ""][:2]
            if number.isdecimal():
                found[cell_id] = max(found.get(cell_id, 0), int(number))
        return found

    def write_record(self, record: Record) -> None:
        """Write one Record. Raises StoreError if the attempt has a Record already."""
        path = self.record_path(record.cell_id, record.attempt)
        try:
            write(path, record, new=True)
        except FileExistsError as error:
            raise StoreError("this attempt has a Record already", where=str(path)) from error

    def reopen(self) -> None:
        """Prepare a finished run to be resumed: remove the footer, but save its hashes.

        Without these hashes, changes of the existing files would go unnoticed.
        """
        path = self.path / _FOOTER
        try:
            with contextlib.suppress(StoreError):
                if _read(path, Footer).sha256:
                    path.replace(self.path / _REOPENED)
            path.unlink(missing_ok=True)
        except OSError as error:
            hint = "make the folder writable, or free some space"
            raise StoreError(f"cannot write to this run: {error.strerror}", where=str(path), hint=hint) from error

    def close(self, run: Run, footer: Footer) -> Run:
        """Write footer.json with the hashes of run.json and of all Records, and return the complete run.

        run: the run as it was just read. If a worker has written a Record since then, that Record gets a hash too.
        Files that have a hash in an earlier footer keep that hash. The new footer leaves out Records that the user
        moved away to measure their Cells again.
        """
        known = _sealed(self.path)
        names = ["run.json", *run.changed]
        names += [f"cells/{file.name}" for file in _record_files(self.path) if file.name not in run.broken]
        there = {name: self.path / name for name in names if (self.path / name).is_file()}
        sealed = {name: known.get(name) or sha256(path) for name, path in there.items()}
        closed = footer.model_copy(update={"sha256": sealed})
        write(self.path / _FOOTER, closed)
        (self.path / _REOPENED).unlink(missing_ok=True)
        return replace(run, footer=closed)


def _lock(path: Path) -> int:
    """Lock a file and return its descriptor. When this process dies, the kernel releases the lock."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        hint = "free some space or check the permissions; `--out` names another folder"
        raise StoreError(f"cannot write to this run: {error.strerror}", where=str(path), hint=hint) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # The content shows other processes who holds the lock. Only the kernel knows whether it is held.
        os.truncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()} on {os.uname().nodename}\n".encode(), 0)
    except BlockingIOError as error:
        holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "unknown"
        os.close(descriptor)
        what = f"another peft-harness is writing to this run: process {holder}"
        hint = "wait until it ends, or end it; or start another run with another --out"
        raise UsageError(what, where=str(path.parent), hint=hint) from error
    except OSError as error:
        os.close(descriptor)
        hint = "use a folder (--out) on a file system with file locks"
        raise StoreError(f"cannot lock this run: {error.strerror}", where=str(path), hint=hint) from error
    return descriptor


def refuse_used(path: Path) -> None:
    """Raise UsageError if the folder `path` holds a run, or Records without a run.json."""
    if (path / "run.json").exists() or any(path.glob("cells/*.json")):
        raise UsageError("holds a run already", where=str(path), hint="name another --out, or --resume it")


def read_record(path: Path) -> Record:
    """Read and return one Record. Raises StoreError for an incomplete file."""
    return _read(path, Record)


def read_manifest(path: Path) -> Manifest:
    """Read only run.json of a run folder, and return its content. Raises UsageError if this file is missing."""
    if not (path / "run.json").is_file():
        raise UsageError("not a run folder (no run.json)", where=str(path), hint="name a run id or its folder")
    return _read(path / "run.json", Manifest)


def read_run(path: Path) -> Run:
    """Read a finished or unfinished run folder, and return the run. `Run.broken` lists the files that cannot be read."""
    manifest = read_manifest(path)
    records, broken = [], {}
    with collection.paused():
        for file in _record_files(path):
            try:
                record = read_record(file)
            except StoreError as error:
                broken[file.name] = error.what
                continue
            if record.run != manifest.run:
                broken[file.name] = (
                    f"a Record of another run, {record.run}: move the file to that run's folder, or delete it"
                )
            elif file.name == f"{record.id}.json":
                records.append(record)
            else:
                broken[file.name] = f"a copy or a renamed file: it holds Record {record.id}"
    footer = None
    if (path / _FOOTER).is_file():
        try:
            footer = _read(path / _FOOTER, Footer)
        except StoreError as error:
            broken[_FOOTER] = f"{error.what}: {error.hint}"
    changed = _changed(path, records, broken, complete=footer is not None)
    whole, ungated = gate.shared(record for record in records if f"cells/{record.id}.json" not in changed)
    lost = {f"cells/{record_id}.json": why for record_id, why in ungated.items()}
    return Run(path, manifest, tuple(whole), footer, broken, changed, lost)


def _record_files(path: Path) -> list[Path]:
    """List the files of a run's Records, without those that are being written."""
    return [file for file in sorted((path / "cells").glob("*.json")) if not file.name.startswith(".")]


def _changed(path: Path, records: Sequence[Record], broken: Mapping[str, str], *, complete: bool) -> dict[str, str]:
    """Return the files that were changed, removed or added after the run: path -> what happened.

    Files that cannot be read are left out. For a run without hashes, the result is empty. complete: whether the run has
    a footer. Without one, a file that the user moved away or that a worker added is no change.
    """
    known = _sealed(path)
    found = {}
    for name, expected in known.items():
        if not (path / name).is_file():
            if complete:  # in an unfinished run, the user moved the file away so that its Cell is measured again
                found[name] = "was removed after the run"
        elif Path(name).name not in broken and sha256(path / name) != expected:
            found[name] = "was changed after the run"
    if known and complete:
        names = (f"cells/{record.id}.json" for record in records)
        found |= {name: "was added after the run" for name in names if name not in known}
    return found


def _sealed(path: Path) -> dict[str, str]:
    """Return the hashes in a run's footer, by path. For a resumed run without a new footer, use its previous footer.

    Without any footer, the result is empty.
    """
    for name in (_FOOTER, _REOPENED):
        with contextlib.suppress(StoreError):
            return _read(path / name, Footer).sha256
    return {}


def find_run(name: str, runs: Path = RUNS) -> Path:
    """Return the folder of a run. name: its folder, its id, a unique prefix of its id, or `latest`.

    Raises UsageError if no run or several runs match.
    """
    if not name:  # an unset variable in a script; an empty prefix would match every run
        raise UsageError("the name of the run is empty", where="RUN", hint="name a run id, its folder, or `latest`")
    if (Path(name) / "run.json").is_file():
        return Path(name)
    known: Sequence[Path] = sorted(p.parent for p in runs.glob("*/run.json")) if runs.is_dir() else []
    if name == "latest" and known:
        return max(known, key=lambda p: (p / "run.json").stat().st_mtime)
    matches = [p for p in known if p.name == name] or [p for p in known if p.name.startswith(name)]
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise UsageError(f"{name!r} matches {len(matches)} runs", where=str(runs), hint="give more of its id")
    if folder := next((folder for folder in (Path(name), runs / name) if folder.is_dir()), None):
        hint = f"name a folder in {runs}, or `latest`; if this is a copy of a run, copy its run.json, too"
        if any((folder / file).exists() for file in ("adapter_config.json", "trainer_state.json")):
            hint = f"another program made it: `peft-harness import {shlex.quote(str(folder))}` makes a run of it"
        raise UsageError("is no run: it has no run.json", where=str(folder), hint=hint)
    if Path(name).is_absolute():
        raise UsageError("no such folder", where=name, hint="name a run id or its folder")
    of_suite = [p.name for p in known if f"-{name}-" in p.name]  # the middle of an id is the name of the suite
    names = ["latest", *(p.name for p in known[-3:]), *of_suite[-1:]]
    hint = did_you_mean([name, *of_suite][-1], names, "runs here", "name a folder")
    raise UsageError(f"no run {name!r}", where=str(runs), hint=hint if known else "`peft-harness run quick` first")
