"""Unpack the wheels of a kit that this Python lacks: `python unpack.py WHEELS SITE`. Needs the standard library only."""

from __future__ import annotations

import sys
import zipfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def main(wheels: Path, site: Path) -> None:
    """Unpack each wheel whose distribution is not installed into `site`. Nothing is installed outside of it.

    A wheel that is unpacked already stays as it is: a running night may use its libraries.
    Exit with an error at a wheel that was compiled for another Python.
    """
    site.mkdir(exist_ok=True)
    major, minor, *_ = sys.version_info
    for wheel in sorted(wheels.glob("*.whl")):
        name, number, *_, abi, _ = wheel.stem.split("-")
        try:
            version(name.replace("_", "-"))
        except PackageNotFoundError:
            if abi.startswith("cp") and abi != f"cp{major}{minor}":
                sys.exit(
                    f"error: {wheel.name} is for another Python than {sys.executable}\n"
                    f"hint: make the kit with --python {major}.{minor}, or let PYTHON name another one"
                )
            if not (site / f"{name}-{number}.dist-info" / "RECORD").is_file():  # the last file of a wheel
                with zipfile.ZipFile(wheel) as archive:
                    archive.extractall(site)  # the kit's own wheels


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
