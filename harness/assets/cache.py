"""The cache folder: whole entries only. What is being made lies in `staging/` and is renamed into place at the end.

Below the root: models/NAME-KEY/, data/NAME-KEY/, carriers/ (put there by hand), staging/.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from harness.assets.table import Source
from harness.errors import AssetError

FORMAT = 1
"""Counts changes of how an asset is unpacked or converted: entries of another format are made anew."""

_FULL = (errno.ENOSPC, errno.EDQUOT)


def root() -> Path:
    """Return the cache folder: PEFT_HARNESS_CACHE, or `peft-harness` under the user's cache folder. Makes nothing."""
    if chosen := os.environ.get("PEFT_HARNESS_CACHE"):
        return Path(chosen).expanduser().absolute()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "peft-harness"
    # The XDG rule: a relative path is to be ignored.
    user = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (user if user.is_absolute() else Path.home() / ".cache") / "peft-harness"


def carriers() -> Path:
    """Return the folder where a user may put wheels and sdists by hand."""
    return root() / "carriers"


def entry_folder(source: Source, fingerprint: str = "") -> Path:
    """Return the folder of this source: another hash, revision, member or `fingerprint` is another folder."""
    facts = [FORMAT, source.source, source.sha256, source.revision, source.member, fingerprint]
    if source.kind == "data" and source.scheme == "hub" and source.rows is not None:
        facts.append(source.rows.model_dump_json())
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]
    name = re.sub(r"[^\w.-]+", "-", source.name, flags=re.ASCII).strip(".-")[:60]
    return root() / ("data" if source.kind == "data" else "models") / f"{name}-{key}"


@contextmanager
def staging(what: str) -> Iterator[Path]:
    """Make a fresh folder for `what` on the cache's file system and remove it afterwards, however the block ends.

    Each folder is locked by its process, so that a later one can tell and remove what a killed process left.
    Raises AssetError for a full disk or a folder that cannot be written, also for an OSError inside the block.
    """
    with _explained(what):
        base = root() / "staging"
        base.mkdir(parents=True, exist_ok=True)
        with _locked(base / "lock"):  # without it a sweep could take a folder between its making and its locking
            _sweep(base)
            folder = Path(tempfile.mkdtemp(dir=base))
            lock = _open_locked(folder / "lock")
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)


def promote(made: Path, destination: Path) -> None:
    """Rename a finished folder into its place, in one step. If another process was faster, its result stands."""
    for path in [*made.rglob("*"), made]:
        _to_disk(path)
    destination.parent.mkdir(parents=True, exist_ok=True)
    try:
        made.rename(destination)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
    _to_disk(destination.parent)


def require_space(needed: int, what: str) -> None:
    """Raise AssetError unless `needed` bytes are free in the cache."""
    free = shutil.disk_usage(root()).free
    if free < needed:
        raise AssetError(
            f"not enough room for {what}: it takes about {_megabytes(needed)} while it is unpacked, "
            f"{_megabytes(free)} are free",
            where=str(root()),
            hint=_ROOM,
        )


def disk_full(what: str) -> AssetError:
    """Return the error for a disk that filled up while `what` was fetched."""
    return AssetError(f"the disk is full: {what} was not kept", where=str(root()), hint=_ROOM)


def _megabytes(count: int) -> str:
    """Write a number of bytes for people."""
    return f"{count / 1e6:,.0f} MB"


_ROOM = "free some space, or set PEFT_HARNESS_CACHE to a folder on a larger disk"


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Turn an OSError into an AssetError that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise disk_full(what) from error
        raise AssetError(
            f"cannot write {what} to the cache: {error.strerror or error}",
            where=str(error.filename or root()),
            hint="make it writable, or set PEFT_HARNESS_CACHE to a folder that is",
        ) from error


def _sweep(base: Path) -> None:
    """Remove the folders of processes that are gone: their locks went with them."""
    for folder in base.iterdir():
        if folder.is_dir():
            try:
                lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
            except OSError:
                continue  # just removed by its owner, or another user's
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            else:
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)


def _open_locked(path: Path) -> int:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    return descriptor


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    descriptor = _open_locked(path)
    try:
        yield
    finally:
        os.close(descriptor)


def _to_disk(path: Path) -> None:
    """Flush a file or folder, so that a power cut after the rename leaves no empty files behind it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
