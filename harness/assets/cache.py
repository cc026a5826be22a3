"""The cache folder. It holds only complete entries: an entry is built in `staging/` and then renamed to its final path.

A Source is a declared model or data set. Folders: models/NAME-KEY/, data/NAME-KEY/, environments/NAME-KEY/, staging/,
carriers/ (wheels and sdists that users put there), predictions/ (files of `harness.memory_model.answer_cache`),
kernels/ (compiled C++).
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from harness.assets.table import Source
from harness.cache_folder import root
from harness.errors import AssetError

FORMAT = 1
"""Version of the code that unpacks and converts assets. Entries that another version built are built again."""

_FULL = (errno.ENOSPC, errno.EDQUOT)
_ROOM = "free some space, or set PEFT_HARNESS_CACHE to a folder on a larger disk"


def carriers() -> Path:
    """Return the folder where users may put wheels and sdists."""
    return root() / "carriers"


def entry_folder(source: Source, fingerprint: str = "") -> Path:
    """Return the path of a source's folder in the cache.

    The path contains a hash of `fingerprint` and of the source's address, SHA-256, revision and member (path in an
    archive). So a changed source gets another folder.
    """
    facts = [FORMAT, source.source, source.sha256, source.revision, source.member, fingerprint]
    if source.kind == "data" and source.scheme == "hub" and source.rows is not None:
        facts.append(source.rows.model_dump_json())
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]
    name = re.sub(r"[^\w.-]+", "-", source.name, flags=re.ASCII).strip(".-")[:60]
    return root() / ("data" if source.kind == "data" else "models") / f"{name}-{key}"


@contextmanager
def staging(what: str) -> Iterator[Path]:
    """Create a folder on the cache's file system, yield it, and remove it at the end of the block.

    The process locks the folder. A folder without a lock therefore belongs to a killed process, and a later process
    removes it. An OSError that is raised in the block, e.g. for a full disk, becomes an AssetError. what: name of the
    asset for messages.
    """
    with _asset_errors(what):
        base = root() / "staging"
        base.mkdir(parents=True, exist_ok=True)
        guard = _locked(base / "lock")  # no other process may remove the folder before it is locked
        try:
            _sweep(base)
            folder = Path(tempfile.mkdtemp(dir=base))
            lock = _locked(folder / "lock")
        finally:
            os.close(guard)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)


def sweep() -> None:
    """Remove the folders that killed processes left in `staging/`."""
    base = root() / "staging"
    if base.is_dir():
        with _asset_errors("nothing"):
            guard = _locked(base / "lock")
            try:
                _sweep(base)
            finally:
                os.close(guard)


def promote(made: Path, destination: Path) -> None:
    """Rename a finished folder to its destination atomically. If the destination exists already, keep it."""
    for path in [*made.rglob("*"), made]:
        _fsync(path)
    destination.parent.mkdir(parents=True, exist_ok=True)
    try:
        made.rename(destination)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
    _fsync(destination.parent)


def require_space(needed: int, what: str) -> None:
    """Raise AssetError unless `needed` bytes are free in the cache."""
    free = shutil.disk_usage(root()).free
    if free < needed:
        raise AssetError(
            f"not enough room for {what}: it takes about {needed / 1e6:,.0f} MB while it is unpacked, "
            f"{free / 1e6:,.0f} MB are free",
            where=str(root()),
            hint=_ROOM,
        )


def disk_full(what: str) -> AssetError:
    """Return the error for a disk that became full while `what` was fetched."""
    return AssetError(f"the disk is full: {what} was not saved", where=str(root()), hint=_ROOM)


@contextmanager
def _asset_errors(what: str) -> Iterator[None]:
    """Turn every OSError that is raised inside the context into an AssetError with a hint."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise disk_full(what) from error
        what = f"cannot write {what} to the cache: {error.strerror or error}"
        hint = "make it writable, or set PEFT_HARNESS_CACHE to a folder that is"
        raise AssetError(what, where=str(error.filename or root()), hint=hint) from error


def _sweep(base: Path) -> None:
    """Remove the unlocked folders in `base`, whose processes have ended."""
    for folder in base.iterdir():
        if folder.is_dir():
            try:
                lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
            except OSError:
                continue  # the folder was just removed, or belongs to another user
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            else:
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)


def _locked(path: Path) -> int:
    """Open a file, wait for its lock, and return the file descriptor."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    return descriptor


def _fsync(path: Path) -> None:
    """Flush a file or folder, so that a power cut after the rename leaves no empty files."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
