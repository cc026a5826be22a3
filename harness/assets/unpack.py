"""Extract a file or a folder from a wheel (zip) or sdist (tar), or from an archive in it."""

from __future__ import annotations

import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO

from harness.errors import AssetError

Opened = zipfile.ZipFile | tarfile.TarFile


def extract(archive: Path, member: str, destination: Path) -> None:
    """Write `member` of `archive` into the folder `destination`: a folder's files at their paths below it, or one file.

    Raises AssetError for a missing member, a path that leaves `destination`, and a file that is no zip or tar.
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
    """Open a seekable zip, or a tar of any compression."""
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
            raise AssetError(
                f"member {name!r} has a path outside its folder",
                where=archive.name,
                hint="do not use this archive",
            )
        with _read(opened, name, archive) as content:
            _copy(content, destination / relative)


def _files(opened: Opened) -> list[str]:
    """List the regular files; links and devices of a tar are ignored."""
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
