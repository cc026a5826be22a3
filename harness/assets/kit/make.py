"""Make a kit: a folder with which a machine without network runs `peft-harness night`. Imports no torch.

A kit holds the source and wheels, and as many models and data sets as fit.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from harness import resources
from harness.assets import fetch
from harness.assets.kit import contents
from harness.assets.table import load_table
from harness.errors import AssetError, HarnessError, UsageError
from harness.process.supervisor import module_arguments, python
from harness.records.files import sha256, write_atomic

SCHEMA = 1
_DISTRIBUTION = _COMMAND = "peft-harness"
_HERE = Path(__file__).parent
_PIP_S = 600.0
_PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_24_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
Say = Callable[[str], None]


@dataclass
class Kit:
    """A finished kit (a folder for a machine without network): its folder, what it holds, and what was left out."""

    folder: Path
    limit_B: int
    python: str
    """Version of Python on the machine that will run the kit, e.g. `3.12`."""
    items: dict[str, int] = field(default_factory=dict)
    """Bytes of each part of the kit, by name."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Reason why the kit lacks a part, by name of the part."""

    @property
    def bytes(self) -> int:
        """Bytes of all files of the kit."""
        return sum(self.items.values())

    @property
    def lacks_needed(self) -> list[str]:
        """Distributions that are missing and without which no command starts."""
        return [name for name in self.left_out if name in contents.NEEDED]


def make(folder: Path, limit_B: int, python_version: str, say: Say) -> Kit:
    """Make a kit (a folder for a machine without network) of at most `limit_B` bytes, and return it.

    Raises UsageError if the folder is not empty or cannot be made, or if the source alone is too large, which leaves
    the folder empty. Raises HarnessError if the harness is not installed.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError("is not empty", where=str(folder), hint="name a new folder")
    kit = Kit(folder, limit_B, python_version)
    try:
        (folder / "wheels").mkdir(parents=True)
    except OSError as error:
        raise UsageError(f"cannot be made: {error.strerror}", where=str(folder), hint="name another folder") from error
    kit.items["source"] = _copy_source(folder)
    if kit.bytes > limit_B:
        for path in folder.iterdir():  # otherwise the next try would be refused, because the folder is not empty
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        what = f"the source alone takes {kit.bytes / 2**20:.1f} MiB"
        raise UsageError(what, where="--size", hint="allow at least 20MiB")
    for name in (*contents.NEEDED, *contents.USEFUL):
        _add_wheel(kit, name, say)
    for half in contents.HALF:
        if _add_half(kit, half, say):
            break
    for name in contents.LAST:
        _add_wheel(kit, name, say)
    for name in contents.SOURCES:
        if name not in kit.items:
            _add_source(kit, name, say)
    files = {path.relative_to(folder).as_posix(): sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()}
    document = {
        "schema": SCHEMA, "python": python_version, "bytes": kit.bytes, "items": kit.items, "left_out": kit.left_out,
        "sha256": files,
    }  # fmt: skip
    write_atomic(folder / "kit.json", (json.dumps(document, indent=1) + "\n").encode())
    return kit


def _copy_source(folder: Path) -> int:
    """Copy the code, the metadata of the installed harness (e.g. entry points) and the scripts. Return the bytes."""
    top, source = Path(resources.__file__).resolve().parents[1], folder / "source"
    for name in contents.FOLDERS:
        if (top / name).is_dir():
            shutil.copytree(top / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.pyc", ".*cache"))
    for name in contents.FILES:
        if (top / name).is_file():
            shutil.copy(top / name, source / name)
    try:
        installed = distribution(_DISTRIBUTION)
    except PackageNotFoundError as error:
        raise HarnessError(
            "the harness is not installed, so its entry points are unknown", hint="pip install -e ."
        ) from error
    about = folder / "metadata" / f"peft_harness-{installed.version}.dist-info"
    about.mkdir(parents=True)
    for name in ("METADATA", "entry_points.txt"):
        (about / name).write_text(installed.read_text(name) or "", encoding="utf-8")
    (folder / "bin").mkdir()
    for name, target in (("run.sh", folder), ("unpack.py", folder), (_COMMAND, folder / "bin")):
        shutil.copy(_HERE / name, target / name)
    for script in (folder / "run.sh", folder / "bin" / _COMMAND):
        script.chmod(0o755)
    return _size(folder)


def _add_wheel(kit: Kit, name: str, say: Say) -> None:
    """Download the wheel of a distribution, if possible in the version that is installed here. Keep it if it fits."""
    say(f"wheel {name}")
    target = kit.folder / "wheels" / ".new"
    target.mkdir()
    try:
        if why := _download(name, kit.python, target):
            kit.left_out[name] = why
            return
        (wheel,) = target.glob("*.whl")
        size = wheel.stat().st_size
        if kit.bytes + size > kit.limit_B:
            kit.left_out[name] = f"{size / 2**20:.1f} MiB do not fit"
            return
        wheel.rename(kit.folder / "wheels" / wheel.name)
        kit.items[name] = size
    finally:
        shutil.rmtree(target)


def _download(name: str, python_version: str, target: Path) -> str:
    """Let pip download one wheel. Return the reason if it cannot."""
    arguments = [
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--only-binary=:all:",
        "--python-version",
        python_version,
    ]
    arguments += [word for platform in _PLATFORMS for word in ("--platform", platform)]
    pins = [f"{name}=={installed}"] if (installed := _version(name)) else []
    why = ""
    for wanted in (*pins, name):  # the installed version may have no wheel for the other Python
        with python([*arguments, "--dest", str(target), wanted], {}) as child:
            code = child.wait(_PIP_S)
        if code == 0 and len(list(target.glob("*.whl"))) == 1:
            return ""
        why = f"pip cannot get it: {_last_line(child.output, code)}"
    return why


def _last_line(output: str, code: int | None) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return lines[-1] if lines else f"exit code {code}"


def _version(name: str) -> str:
    try:
        return distribution(name).version
    except PackageNotFoundError:
        return ""


def _add_source(kit: Kit, name: str, say: Say) -> None:
    """Copy a model or data from the cache, and keep it if it fits."""
    source = load_table(resources.data_folder("suites") / "sources.yaml")[name]
    if not fetch.is_local(source) and source.bytes is not None and kit.bytes + source.bytes > kit.limit_B:
        kit.left_out[name] = f"{source.bytes / 2**20:.1f} MiB do not fit"
        return
    try:
        say(f"{source.kind} {name}")
        place = fetch.ensure(source)
    except AssetError as error:
        kit.left_out[name] = error.what
        return
    place = place.parent if place.is_file() else place
    size = _size(place)
    if kit.bytes + size > kit.limit_B:
        kit.left_out[name] = f"{size / 2**20:.1f} MiB do not fit"
        return
    shutil.copytree(place, kit.folder / "cache" / place.parent.name / place.name)
    kit.items[name] = size


def _add_half(kit: Kit, half: contents.Half, say: Say) -> bool:
    """Add a model in float16, its data, and `half.yaml`, which trains it. Return whether all of it was added."""
    table, item = load_table(resources.data_folder("suites") / "sources.yaml"), f"{half.model} in float16"
    folder = kit.folder / "models" / f"{half.model}-half"
    say(f"{table[half.model].kind} {item}")
    try:
        place, *data = (fetch.ensure(table[name]) for name in (half.model, *half.data))
    except AssetError as error:
        kit.left_out[item] = error.what
        return False
    with python([*module_arguments("harness.assets.kit.half"), str(place), str(folder)], {}) as child:
        code = child.wait(_PIP_S)
    suite = kit.folder / "half.yaml"
    _write_suite(suite, half, folder.name)
    size = _size(folder) + suite.stat().st_size
    whole = size + sum(_size(one.parent) for one in data)
    if code != 0:
        kit.left_out[item] = _last_line(child.output, code)
    elif kit.bytes + whole > kit.limit_B:
        kit.left_out[item] = f"{whole / 2**20:.1f} MiB{' with its data' if data else ''} do not fit"
    else:
        kit.items[item] = size
        for name in half.data:
            _add_source(kit, name, say)
        return True
    shutil.rmtree(folder, ignore_errors=True)
    suite.unlink()
    return False


def _write_suite(file: Path, half: contents.Half, folder: str) -> None:
    text = (resources.data_folder("suites") / f"{half.suite}.yaml").read_text(encoding="utf-8")
    for old, new in ((f"suite: {half.suite}", "suite: half"), (f"model: {half.model}", f"model: ./models/{folder}")):
        text = text.replace(f"{old}\n", f"{new}\n")
    file.write_text(text, encoding="utf-8")


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
