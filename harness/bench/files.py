"""What a bench writes: places are tried before anything runs, and each row is written as soon as it is there. No torch."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from harness.bench.results import BenchRow
from harness.errors import StoreError, UsageError
from harness.records import files
from harness.records.record import Environment

SCHEMA = 1


def refuse(out: Path | None, export: Path | None) -> None:
    """Raise UsageError for a folder that holds a bench, and for places where nothing can be written."""
    if out is not None:
        where = f"--out {out}"
        if any(out.glob("[0-9][0-9][0-9]*-vs-*.json")):
            raise UsageError("holds a bench already", where=where, hint="name another folder, or move that one away")
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(
                f"cannot make the folder: {error.strerror}", where=where, hint="name a place where files can be written"
            ) from error
        _try(out / "row.json", where)
    if export is not None:
        _try(export, f"--export-pytest-benchmark {export}")


def _try(file: Path, where: str) -> None:
    if why := files.unwritable(file):
        raise UsageError(why, where=where, hint="name a place where files can be written")


def write(path: Path, document: dict[str, Any]) -> None:
    """Write a document, whole or not at all."""
    try:
        files.write_atomic(path, (json.dumps(document, indent=1, allow_nan=False) + "\n").encode())
    except StoreError as error:
        hint = "what was printed has its numbers; for its samples make room or name another place, and run it again"
        raise StoreError(error.what, where=error.where, hint=hint) from error


class Folder:
    """The folder of `--out`, or none. What cannot be written is tried once more at the end, by `finish`."""

    def __init__(self, path: Path | None, environment: Environment) -> None:
        self.path, self.environment = path, environment
        self._count = 0
        self._left: dict[Path, dict[str, Any]] = {}

    def keep(self, row: BenchRow) -> None:
        """Write the file of the next row; say so if that fails, which is no reason to lose what is still to be measured."""
        if self.path is None:
            return
        file = self.path / f"{self._count:03d}-{_slug(row)}.json"
        self._left[file] = {
            "schema": SCHEMA, "environment": self.environment.model_dump(mode="json"), **row.document()
        }  # fmt: skip
        self._count += 1
        try:
            self._write(file)
        except StoreError as error:
            print(f"{file}: {error.what}; it is tried again at the end", file=sys.stderr)

    def finish(self) -> None:
        """Write what is left; raises StoreError if that still fails."""
        for file in list(self._left):
            self._write(file)

    def _write(self, file: Path) -> None:
        write(file, self._left[file])
        del self._left[file]


def _slug(row: BenchRow) -> str:
    words = (row.name, row.shape, row.dtype, row.device, "vs", row.other)
    return re.sub(r"[^\w.+]+", "-", "-".join(words)).strip("-")
