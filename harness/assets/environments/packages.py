"""Resolve, download and install the packages of an environment.

The user's pip resolves and downloads, so its index and proxy settings apply. uv then installs the downloaded wheels
without an index. If uv is not on the path, pip installs them.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import urllib.request
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from harness.assets import cache, pip_output
from harness.assets.environments.table import EnvironmentSpec
from harness.errors import AssetError, HarnessError, UsageError
from harness.process import lifeline
from harness.process.supervisor import Subprocess

_LEAST_PIP = 22
"""Smallest accepted major version of pip: `pip --python` exists since 22.3."""
_HEAD_S = 10.0
_SHOWN_VERSIONS = 6
DISTRIBUTION = "peft-harness"


@dataclass(frozen=True)
class IndexOptions:
    """Options that decide where pip looks for packages. By default, only the user's settings of pip apply."""

    offline: bool = False
    """True: no index is asked, only the folders of `find_links`."""
    find_links: tuple[str, ...] = ()
    """Folders, or addresses of pages, where pip also looks for wheels."""

    def arguments(self) -> list[str]:
        """Return the options for pip."""
        return [*(["--no-index"] if self.offline else []), *(f"--find-links={one}" for one in self.find_links)]


@dataclass(frozen=True)
class Package:
    """A package that pip chose."""

    name: str
    version: str
    url: str
    sha256: str
    is_direct: bool
    """True if a requirement names this file or repository."""

    @property
    def pin(self) -> str:
        """The package as a requirement that allows exactly this file."""
        if self.is_direct:
            return f"{self.name} @ {self.url}"
        return f"{self.name}=={self.version}{f' --hash=sha256:{self.sha256}' if self.sha256 else ''}"

    def size(self) -> int | None:
        """Size of the package's file in bytes. None if the server of the file does not state it."""
        parts = urlsplit(self.url)
        if parts.scheme == "file":
            path = Path(unquote(parts.path))
            return path.stat().st_size if path.is_file() else None
        if parts.scheme not in ("http", "https"):
            return None
        request = urllib.request.Request(self.url, method="HEAD")  # noqa: S310  # http or https
        try:
            with urllib.request.urlopen(request, timeout=_HEAD_S) as answer:  # noqa: S310
                length = answer.headers.get("Content-Length", "")
        except (OSError, ValueError):
            return None
        return int(length) if length.isdecimal() else None


def resolve(spec: EnvironmentSpec, python: Path, options: IndexOptions, work: Path) -> list[Package]:
    """Let pip choose the packages that an environment lacks, and return them. Nothing is installed.

    python: the environment's interpreter. work: an existing folder for files. Raises UsageError for a requirement that
    no release satisfies, and AssetError if no index can be reached.
    """
    _require_pip()
    wanted, report = work / "requirements.txt", work / "report.json"
    own = [] if not spec.isolated else _requirements_of_harness(spec)
    wanted.write_text("".join(f"{one}\n" for one in [*spec.requirements, *own]), encoding="utf-8")
    arguments = ["install", "--dry-run", "--report", str(report), "-r", str(wanted), *options.arguments()]
    arguments += [] if spec.dependencies else ["--no-deps"]
    if not spec.isolated:
        keep = work / "constraints.txt"
        keep.write_text(f"torch=={version('torch')}\n", encoding="utf-8")
        arguments += [] if "torch" in spec.projects else ["-c", str(keep)]
    run_pip(spec, python, arguments, options, work)
    found = [_package(row) for row in json.loads(report.read_text(encoding="utf-8"))["install"]]
    left_out = {canonicalize_name(one) for one in spec.without}
    return [one for one in found if one.name not in left_out]


def download(
    spec: EnvironmentSpec, python: Path, packages: Sequence[str], options: IndexOptions, work: Path
) -> list[Path]:
    """Download wheels, build wheels of source distributions, and return their paths.

    packages: requirements that name one version each, e.g. `Package.pin`.
    """
    wheels, pins = work / "wheels", work / "pins.txt"
    wheels.mkdir()
    if not packages:
        return []
    # pip wants a hash of every package, or of none.
    hashed = all("--hash=" in one for one in packages)
    lines = [one if hashed else one.partition(" --hash=")[0] for one in packages]
    pins.write_text("".join(f"{one}\n" for one in lines), encoding="utf-8")
    run_pip(
        spec, python, ["wheel", "--quiet", "--no-deps", "-w", str(wheels), "-r", str(pins), *options.arguments()],
        options, work,
    )  # fmt: skip
    return sorted(wheels.glob("*.whl"))


def unpacked_size(wheels: Sequence[Path]) -> int:
    """Return the bytes that the files in wheels take when they are installed."""
    total = 0
    for path in wheels:
        with zipfile.ZipFile(path) as wheel:
            total += sum(info.file_size for info in wheel.infolist())
    return total


def install(spec: EnvironmentSpec, python: Path, wheels: Sequence[Path], work: Path) -> str:
    """Install wheels, without an index. Return the name and version of the installing program, e.g. `pip 23.2.1`."""
    files = [str(path) for path in wheels]
    if uv := shutil.which("uv"):
        done = subprocess.run([uv, "--version"], capture_output=True, text=True, check=False)
        installer = " ".join(done.stdout.split()[:2])
        command = [uv, "pip", "install", "--quiet", "--python", str(python), "--no-index", "--no-deps", "--offline"]
        if files:
            _run(spec, [*command, *files], IndexOptions(offline=True), work)
        return installer
    if files:
        # --ignore-installed: pip must not try to uninstall packages of the Python that runs the harness.
        quiet = ["--quiet", "--no-warn-script-location"]
        arguments = ["install", *quiet, "--no-index", "--no-deps", "--ignore-installed", *files]
        run_pip(spec, python, arguments, IndexOptions(offline=True), work)
    return f"pip {version('pip')}"


def run_pip(spec: EnvironmentSpec, python: Path, arguments: Sequence[str], options: IndexOptions, work: Path) -> None:
    """Run the pip of the Python that runs the harness, but for the interpreter `python` of an environment.

    Raises UsageError or AssetError with the reason if pip fails. pip is killed if this process ends.
    """
    pip = [sys.executable, "-P", "-m", "pip", "--python", str(python), "--disable-pip-version-check", "--no-input"]
    _run(spec, [*pip, *arguments], options, work)


def _run(spec: EnvironmentSpec, command: Sequence[str], options: IndexOptions, work: Path) -> None:
    temporary = work / "tmp"
    temporary.mkdir(exist_ok=True)
    # With this TMPDIR, partial files are on the cache's disk and are removed with the staging folder.
    environment = {**os.environ, "TMPDIR": str(temporary), "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"}
    program = Subprocess(
        [sys.executable, "-P", lifeline.__file__], command, environment=environment, lifeline=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    with program:
        code = program.wait()
    if code:
        raise _failure(spec, program.output, code, options, full=program.reports_full_disk)


def _failure(spec: EnvironmentSpec, output: str, code: int, options: IndexOptions, *, full: bool) -> HarnessError:
    """Return the error that tells why pip or uv failed, according to its output."""
    what = f"environment {spec.name}"
    if full:
        return cache.disk_full(what)
    if got := pip_output.wrong_hash(output):
        hint = "do not use this file; if the package is right, correct the hash"
        return AssetError(f"cannot make {what}: a package has the wrong hash, sha256 {got}", hint=hint)
    missing = pip_output.offered_versions(output)
    if options.offline and missing:
        there = (
            f"the folders {', '.join(options.find_links)}" if options.find_links else "the folders of pip's settings"
        )
        hint = "name a folder with the wheels: --find-links FOLDER, or PIP_FIND_LINKS; or leave out --offline"
        return AssetError(f"cannot make {what} offline: no file of {missing[0]} in {there}", hint=hint)
    if pip_output.reaches_no_index(output):
        hint = "look at PIP_INDEX_URL and `pip config list`; without a network, --offline --find-links FOLDER"
        return AssetError(f"cannot make {what}: pip cannot read the package index", hint=hint)
    if missing and missing[1]:
        newest = ", ".join(missing[1][-_SHOWN_VERSIONS:])
        why = f"no version satisfies {missing[0]}"
        return UsageError(f"cannot make {what}: {why}", hint=f"the last versions are {newest}")
    if missing:
        hint = "look at its spelling, and at PIP_INDEX_URL, PIP_NO_INDEX and `pip config list`"
        why = f"the package index has no file of {missing[0]} for this Python, or cannot be read"
        return UsageError(f"cannot make {what}: {why}", hint=hint)
    if lines := pip_output.conflict(output):
        beside = "" if spec.isolated else ", or not with the installed torch"
        hint = "write `isolated: true` in a table of environments, or choose another version"
        return UsageError(
            f"cannot make {what}: its requirements cannot be installed together{beside}",
            hint=hint,
            details=[f"    {line}" for line in lines],
        )
    hint = f"the installer ended with exit code {code}; its message says why"
    return AssetError(f"cannot make {what}: {pip_output.reason(output)}", hint=hint)


def _require_pip() -> None:
    if importlib.util.find_spec("pip") is None:
        hint = f"`{sys.executable} -m ensurepip`, or `uv pip install pip`"
        raise AssetError("cannot make an environment: this Python has no pip", where=sys.executable, hint=hint)
    if (major := re.match(r"\d+", version("pip"))) and int(major[0]) < _LEAST_PIP:
        hint = f"`{sys.executable} -m pip install --upgrade pip`"
        what = f"cannot make an environment: pip {version('pip')} is too old"
        raise AssetError(what, where=sys.executable, hint=hint)


def _requirements_of_harness(spec: EnvironmentSpec) -> Iterator[str]:
    """Yield the names of the libraries that the harness needs, without versions, except those that `spec` names.

    The harness's own version bounds must not exclude an old library that is to be checked.
    """
    try:
        needed = requires(DISTRIBUTION) or []
    except PackageNotFoundError:
        needed = []
    for one in map(Requirement, needed):
        is_needed = one.marker is None or one.marker.evaluate({"extra": ""})
        if is_needed and canonicalize_name(one.name) not in spec.projects:
            yield one.name


def _package(row: dict[str, Any]) -> Package:
    """Return a package from a row of pip's installation report."""
    found, about = row["download_info"], row["metadata"]
    return Package(
        name=canonicalize_name(about["name"]),
        version=about["version"],
        url=found["url"],
        sha256=found.get("archive_info", {}).get("hashes", {}).get("sha256", ""),
        is_direct=bool(row.get("is_direct")),
    )
