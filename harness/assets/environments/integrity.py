"""Find damage in a finished environment: an interpreter that does not start, missing packages, changed files."""

from __future__ import annotations

import base64
import csv
import hashlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

from packaging.utils import canonicalize_name

from harness.assets.environments.folder import MadeEnvironment, site_packages
from harness.errors import AssetError, plural

_START_S = 120.0


def require_start(environment: MadeEnvironment) -> None:
    """Raise AssetError, with a hint to repair, if the interpreter of an environment does not start."""
    command = [str(environment.python), "-P", "-c", "import sys, encodings"]
    try:
        done = subprocess.run(command, capture_output=True, check=False, timeout=_START_S)
    except (OSError, subprocess.TimeoutExpired):
        done = None
    if done is None or done.returncode:
        hint = f"`peft-harness env repair {environment.name}`, or `env remove {environment.name}`"
        raise AssetError("the Python of this environment does not start", where=str(environment.folder), hint=hint)


def damage(environment: MadeEnvironment) -> list[str]:
    """Return what is wrong with an environment: one line for its interpreter and for each package that is damaged."""
    return [*_interpreter(environment), *_packages(environment)]


def _interpreter(environment: MadeEnvironment) -> Iterator[str]:
    try:
        require_start(environment)
    except AssetError as error:
        yield error.what


def _packages(environment: MadeEnvironment) -> Iterator[str]:
    folder = site_packages(environment.folder)
    records: dict[str, Path] = {
        canonicalize_name(path.parent.name.partition("-")[0]): path for path in folder.glob("*.dist-info/RECORD")
    }
    for package in environment.file.packages:
        name = package.partition("==")[0].partition(" @ ")[0]
        recorded = list(_recorded(records[name])) if name in records else []
        if name not in records:
            yield f"{name} is missing"
        elif not recorded:
            yield f"{name}: its RECORD lists no file"
        elif lost := [file for file, digest in recorded if not _is_whole(folder / file, digest)]:
            yield f"{name}: {plural(len(lost), 'file')} missing or changed, e.g. {lost[0]}"


def _recorded(record: Path) -> Iterator[tuple[str, str]]:
    """Yield the path and the digest of each file that a package's RECORD lists with a digest.

    A line that was cut off has no digest, and counts as a damaged file.
    """
    with record.open(encoding="utf-8", errors="replace", newline="") as file:
        for path, *rest in csv.reader(file):
            if len(rest) < 2:
                yield path, ""
            elif (digest := rest[0]).startswith("sha256=") and not path.startswith(
                ".."
            ):  # the first line of scripts was changed by `create`, so their digests differ
                yield path, digest


def _is_whole(path: Path, digest: str) -> bool:
    try:
        found = hashlib.sha256(path.read_bytes()).digest()
    except OSError:
        return False
    return digest == f"sha256={base64.urlsafe_b64encode(found).rstrip(b'=').decode()}"
