"""Unpack the wheels of a kit that this Python lacks: `python unpack.py WHEELS SITE`. Needs the standard library only.

A kit is the folder that `peft-harness kit` makes for a machine without network.
"""

from __future__ import annotations

import os
import shutil
import sys
import zipfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def main(wheels: Path, site: Path) -> None:
    """Unpack each wheel whose distribution is not installed into `site`. Nothing is installed outside of it.

    A wheel that was unpacked completely stays as it is: a running `peft-harness night` may use its libraries.
    Exit with an error if a wheel is not for this version of Python.
    """
    done = site / ".unpacked"
    done.mkdir(parents=True, exist_ok=True)
    major, minor, *_ = sys.version_info
    for wheel in sorted(wheels.glob("*.whl")):
        name, *_, python, abi, _ = wheel.stem.split("-")
        try:
            version(name.replace("_", "-"))
        except PackageNotFoundError:
            if not _fits(python, abi):
                sys.exit(
                    f"error: {wheel.name} is for another Python than {sys.executable}\n"
                    f"hint: make the kit with --python {major}.{minor}, or set PYTHON to the interpreter that the kit was "
                    "made for"
                )
            if not (done / wheel.name).is_file():
                _unpack(wheel, site)
                (done / wheel.name).touch()


def _unpack(wheel: Path, site: Path) -> None:
    """Move the files of a wheel into `site`. Replace existing files by renaming, so that readers keep the old ones."""
    temporary = site / f".new-{os.getpid()}"
    try:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(temporary)  # the kit's own wheels
        for file in [path for path in temporary.rglob("*") if path.is_file()]:
            target = site / file.relative_to(temporary)
            target.parent.mkdir(parents=True, exist_ok=True)
            file.replace(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _fits(pythons: str, abis: str) -> bool:
    """Return whether a wheel with these tags is for this Python. Tags: https://peps.python.org/pep-0425/."""
    major, minor, *_ = sys.version_info
    here, versions = f"cp{major}{minor}", range(minor + 1)
    exact = f"{here}{getattr(sys, 'abiflags', '')}"
    known = {(here, exact), (here, "none"), (f"py{major}", "none")}
    known |= {(f"py{major}{n}", "none") for n in versions} | {(f"cp{major}{n}", "abi3") for n in versions}
    return any((python, abi) in known for python in pythons.split(".") for abi in abis.split("."))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
