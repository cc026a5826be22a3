"""Write the tables of runs to files, one file per table. This module imports no torch."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from harness.console import print_lines, print_note
from harness.errors import Exit, StoreError, UsageError
from harness.records import files, store
from harness.report.export.columns import TABLES

if TYPE_CHECKING:
    from pandas import DataFrame

Format = Literal["parquet", "csv"]


def export(names: Sequence[str], form: Format, out: Path | None = None) -> Exit:
    """Write the tables of runs into a folder, print the names of the files, and return the exit code.

    names: the runs, as folders or ids. out: the folder; None stands for `export-<form>` in the folder of the first run.
    Returns FAIL if a file was changed after its run. Returns NOTHING_COMPARED if there is nothing to export. Returns
    INFRASTRUCTURE if a Record is unreadable or missing. Raises UsageError if the folder is not empty, if a run does not
    exist, or if no installed library can write the format. Raises StoreError if a file cannot be written.
    """
    if form == "parquet":
        _require_pyarrow()
    paths = [store.find_run(name) for name in names]
    folder = out or paths[0] / f"export-{form}"
    _require_empty(folder)

    from harness.report.export import frames  # slow, since it imports pandas: the folder is checked first

    runs = [store.read_run(path) for path in paths]
    numbers = frames.of(runs)
    for what in numbers.left_out:
        print_note(f"left out: {what}")
    changed = any(run.changed for run in runs)
    if numbers.cells.empty:
        print_note("nothing to export: no Record that counts")
        return Exit.FAIL if changed else Exit.NOTHING_COMPARED
    _create(folder)
    for table in (*TABLES, "columns"):
        frame = getattr(numbers, table)
        path = folder / f"{table}.{form}"
        _write(path, _bytes(frame, form))
        print_lines([f"{path}: {len(frame)} rows, {len(frame.columns)} columns"])
    if changed:
        return Exit.FAIL
    return Exit.INFRASTRUCTURE if any(run.broken or run.ungated or run.missing() for run in runs) else Exit.PASS


def _require_pyarrow() -> None:
    try:
        import pyarrow.parquet  # noqa: F401  # the import is the test
    except ImportError as error:
        what = f"Parquet is written by pyarrow, which cannot be imported: {error}"
        hint = "`pip install pyarrow`, or take --format csv"
        raise UsageError(what, where="--format parquet", hint=hint) from error


def _require_empty(folder: Path) -> None:
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        what = "is not empty" if folder.is_dir() else "is not a folder"
        raise UsageError(what, where=f"--out {folder}", hint="name another folder, or move that one away")


def _create(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        what = f"cannot create the folder: {error.strerror}"
        raise UsageError(what, where=f"--out {folder}", hint="name a place where files can be written") from error


def _bytes(frame: DataFrame, form: Format) -> bytes:
    if form == "csv":
        text: str = frame.to_csv(index=False, lineterminator="\n")
        return text.encode()
    file = io.BytesIO()
    frame.to_parquet(file, engine="pyarrow", index=False)
    return file.getvalue()


def _write(path: Path, data: bytes) -> None:
    try:
        files.write_atomic(path, data)
    except StoreError as error:
        hint = f"free some space or name another --out, remove {path.parent}, and export again"
        raise StoreError(error.what, where=error.where, hint=hint) from error
