"""Write single files atomically, and hash them."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from harness.errors import StoreError, UsageError

_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
"""Error numbers that file systems without hard links raise."""


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def combined_sha256(paths: Sequence[Path]) -> str:
    """Return one SHA-256 in hex digits over the names and hashes of files."""
    return hashlib.sha256("".join(f"{path.name} {sha256(path)}\n" for path in paths).encode()).hexdigest()


def whole_lines(path: Path) -> list[str]:
    """Return the complete lines of a file that another process still writes. An unfinished last line is left out.

    If there is no file, return an empty list.
    """
    return path.read_text(encoding="utf-8").rpartition("\n")[0].splitlines() if path.exists() else []


def unwritable(file: Path) -> str:
    """Return the reason why a file cannot be written. If it can be written, return an empty string."""
    if file.exists() and not file.is_file():  # e.g. /dev/null, which all processes share, must not be replaced
        return f"{file} is no regular file"
    if not file.parent.is_dir():
        return f"{file}: there is no folder {file.parent}"
    try:
        with tempfile.TemporaryFile(dir=file.parent):
            return ""
    except OSError as error:
        return f"{file}: cannot write in {file.parent}: {error.strerror}"


def refuse_unwritable(files: Mapping[str, Path | None]) -> None:
    """Raise UsageError if a file cannot be written, or if two options name the same file.

    A command calls this function before it works for minutes.

    files: path of the file for each option. None means that the file is not requested.
    """
    given = {option: file for option, file in files.items() if file is not None}
    problems = {option: why for option, file in given.items() if (why := unwritable(file))}
    if len({file.absolute() for file in given.values()}) < len(given):
        problems = {", ".join(given): f"both name {next(iter(given.values()))}"}
    if problems:
        hint = "name files in a writable folder"
        raise UsageError("; ".join(problems.values()), where=", ".join(problems), hint=hint)


def write_atomic(path: Path, data: bytes, *, new: bool = False) -> None:
    """Write `data` so that `path` has either the old content or the whole new content, even after a power cut.

    new: whether to raise FileExistsError if `path` exists, instead of replacing it.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        (_publish if new else Path.replace)(temporary, path)
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except OSError as error:
        if new and isinstance(error, FileExistsError):
            raise
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise StoreError(
            "the disk is full" if full else f"cannot write: {error.strerror}",
            where=str(path),
            hint="free some space, then `peft-harness run SUITE --resume RUN`; finished Cells are saved"
            if full
            else "choose another folder with --out",
        ) from error
    finally:
        with contextlib.suppress(OSError):  # a read-only disk refuses even the removal of a missing file
            temporary.unlink(missing_ok=True)


def _publish(temporary: Path, path: Path) -> None:
    """Rename the file `temporary` to `path`. Raises FileExistsError if `path` exists.

    The rename is atomic: if two machines try at the same time, only one succeeds.
    """
    try:
        os.link(temporary, path)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        if path.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from error
        temporary.replace(path)
