"""Write the result files of `bench`. This module imports no torch.

Paths are checked before any benchmark runs. Each row is written as soon as it is measured.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from harness.bench.results import BenchRow
from harness.console import print_note
from harness.errors import StoreError, UsageError
from harness.records import files
from harness.records.record import Environment

SCHEMA = 1
_WRITABLE = "name a writable path"


def check_writable(out: Path | None, export: Path | None) -> None:
    """Raise UsageError if a path is not writable, or if the folder `out` already holds results of `bench`."""
    if out is not None:
        where = f"--out {out}"
        if any(out.glob("[0-9][0-9][0-9]*-vs-*.json")):
            raise UsageError("already holds a bench", where=where, hint="name another folder, or move this one away")
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            what = f"cannot create the folder: {error.strerror}"
            raise UsageError(what, where=where, hint=_WRITABLE) from error
        _check_file(out / "row.json", where)
    if export is not None:
        _check_file(export, f"--export-pytest-benchmark {export}")


def _check_file(file: Path, where: str) -> None:
    if why := files.unwritable(file):
        raise UsageError(why, where=where, hint=_WRITABLE)


def write(path: Path, document: dict[str, Any]) -> None:
    """Write a JSON document atomically. Raises StoreError if the file cannot be written."""
    try:
        files.write_atomic(path, (json.dumps(document, indent=1, allow_nan=False) + "\n").encode())
    except StoreError as error:
        hint = "the printed table has the numbers; for the samples, free disk space or name another path and run again"
        raise StoreError(error.what, where=error.where, hint=hint) from error


class Folder:
    """Writer that puts one file per row into the folder of `--out`. Without `--out`, it writes nothing.

    Writes that failed are retried by `finish`.
    """

    def __init__(self, path: Path | None, environment: Environment) -> None:
        self.path, self.environment = path, environment
        self._count = 0
        self._pending: dict[Path, dict[str, Any]] = {}

    def save(self, row: BenchRow) -> None:
        """Write one row to a new file. If this fails, only print the error: the next rows are still measured."""
        if self.path is None:
            return
        file = self.path / f"{self._count:03d}-{_slug(row)}.json"
        environment = self.environment.model_dump(mode="json")
        self._pending[file] = {"schema": SCHEMA, "environment": environment, **row.document()}
        self._count += 1
        try:
            self._write(file)
        except StoreError as error:
            print_note(f"{file}: {error.what}; will be retried at the end")

    def finish(self) -> None:
        """Retry the writes that failed. Raises StoreError if a write fails again."""
        for file in list(self._pending):
            self._write(file)

    def _write(self, file: Path) -> None:
        write(file, self._pending[file])
        del self._pending[file]


def _slug(row: BenchRow) -> str:
    words = (row.name, row.shape, row.dtype, row.device, "vs", row.other)
    return re.sub(r"[^\w.+]+", "-", "-".join(words)).strip("-")
