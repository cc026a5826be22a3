"""Folders of finished environments in the cache. Each folder holds `environment.json`, which is written last.

Layout: environments/NAME-KEY/ with bin/python, lib/ and environment.json. NAME-KEY.lock exists while the folder is
made. KEY is a hash of the declaration and of the Python that makes the environment. So a changed requirement or another
Python gets another folder.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import shutil
import site
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pydantic import ValidationError

from harness.assets import cache
from harness.assets.environments.table import EnvironmentSpec
from harness.cache_folder import root as cache_root
from harness.errors import AssetError
from harness.records.base_model import Bytes, FrozenModel

FORMAT = 1
"""Version of the code that makes environments. Environments that another version made are made again."""
FILE = "environment.json"


class EnvironmentFile(FrozenModel):
    """Content of environment.json."""

    spec: EnvironmentSpec
    base: dict[str, str]
    """The Python that made the environment: its folder, its version, and its versions of torch and of the libraries
    that the environment replaces."""
    versions: dict[str, str]
    """Version of each required project, by name."""
    packages: list[str]
    """All packages in the folder, as requirements with versions and hashes. `env repair` installs exactly these again."""
    size: Bytes
    """Bytes of the files in the folder."""
    made: str
    """Time of creation, UTC."""
    installer: str
    """Program that installed the packages, e.g. `pip 23.2.1`."""


@dataclass(frozen=True)
class MadeEnvironment:
    """A finished Python environment in the cache."""

    folder: Path
    file: EnvironmentFile

    @property
    def name(self) -> str:
        """Name of the environment, from a table or made from the requirement."""
        return self.file.spec.name

    @property
    def python(self) -> Path:
        """Path of the interpreter."""
        return interpreter(self.folder)

    @property
    def label(self) -> str:
        """Required projects with their versions, e.g. `peft 0.19.1`."""
        return ", ".join(f"{name} {number}" for name, number in self.file.versions.items())

    @property
    def is_current(self) -> bool:
        """True if the Python that runs the harness would make the same environment."""
        return self.folder == place(self.file.spec)


def interpreter(folder: Path) -> Path:
    """Return the path of the interpreter in the folder of an environment."""
    return folder / "bin" / "python"


def site_packages(folder: Path) -> Path:
    """Return the folder of an environment into which packages are installed."""
    return folder / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"


def root() -> Path:
    """Return the folder of all environments, without creating it."""
    return cache_root() / "environments"


def base(spec: EnvironmentSpec) -> dict[str, str]:
    """Return the versions and folders of the Python that runs the harness. An environment depends on them."""
    shared = {} if spec.isolated else {"prefix": sys.prefix, "packages": ":".join(site.getsitepackages())}
    facts = {"python": platform.python_version(), "executable": os.path.realpath(sys.executable), **shared}
    for project in () if spec.isolated else ("torch", *spec.projects):
        try:
            facts[project] = version(project)
        except PackageNotFoundError:
            facts[project] = ""
    return facts


def place(spec: EnvironmentSpec) -> Path:
    """Return the path of the folder of an environment, whether it exists or not."""
    made_from = [FORMAT, sorted(spec.requirements), spec.isolated, base(spec)]
    made_from += [sorted(spec.without)] if spec.without else []
    made_from += [] if spec.dependencies else ["without dependencies"]
    text = json.dumps(made_from, sort_keys=True)
    return root() / f"{spec.name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def read(folder: Path) -> MadeEnvironment | None:
    """Return the environment in a folder, or None if the folder does not exist or has no readable environment.json."""
    try:
        text = (folder / FILE).read_text(encoding="utf-8")
        return MadeEnvironment(folder, EnvironmentFile.model_validate_json(text))
    except (OSError, ValidationError):
        return None


def made() -> list[MadeEnvironment]:
    """Return the finished environments, sorted by name."""
    folders = sorted(root().iterdir()) if root().is_dir() else []
    return [found for folder in folders if folder.is_dir() and (found := read(folder)) is not None]


def remove(environment: MadeEnvironment) -> None:
    """Remove an environment. Its folder is renamed first, so an interrupted removal leaves nothing that looks complete."""
    with cache.staging(environment.name) as staging:
        environment.folder.rename(staging / "removed")


@contextmanager
def locked(folder: Path, wait: Callable[[], None]) -> Iterator[None]:
    """Hold the lock of an environment's folder inside the context. wait: called once if another process holds the lock.

    The lock is a file beside the folder, which is removed at the end. The kernel releases the lock of a killed process.
    """
    path = Path(f"{folder}.lock")
    lock = _lock(path, wait)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(lock)


def _lock(path: Path, wait: Callable[[], None]) -> int:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                wait()
                fcntl.flock(lock, fcntl.LOCK_EX)
            if path.exists() and path.stat().st_ino == os.fstat(lock).st_ino:
                return lock
            os.close(lock)  # void: the process that held the lock has removed the file
    except OSError as error:
        hint = "set PEFT_HARNESS_CACHE to a folder that is writable"
        what = f"cannot write to the cache: {error.strerror or error}"
        raise AssetError(what, where=str(error.filename or path), hint=hint) from error


def size(folder: Path) -> int:
    """Return the number of bytes of the files in a folder. Links are not followed."""
    return sum(path.lstat().st_size for path in folder.rglob("*") if not path.is_dir() or path.is_symlink())


def free() -> int:
    """Return the free bytes on the disk of the cache."""
    there = next(folder for folder in (root(), *root().parents) if folder.is_dir())
    return shutil.disk_usage(there).free
