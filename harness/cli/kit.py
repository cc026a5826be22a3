"""The command `kit`: make a folder with all that a machine without network needs for `peft-harness night`."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click

from harness.cli import options
from harness.console import align_columns, print_lines, print_note
from harness.errors import Exit

_OLDEST_MINOR = 11
"""Minor version of the oldest Python 3 on which peft-harness runs; `requires-python` in pyproject.toml."""


def _bytes(_: click.Context, __: click.Parameter, value: str) -> int:
    """Return a size such as `60MiB` in bytes."""
    from harness.memory_model import size_units

    try:
        return size_units.parse_size(value).number_B
    except ValueError as error:
        what = f"`{value}` is no size of a kit; write a number and its unit, e.g. 60MiB or 60MB"
        raise click.BadParameter(what) from error


def _version(_: click.Context, __: click.Parameter, value: str) -> str:
    minor = re.fullmatch(r"3\.(\d+)", value)
    if minor is None or int(minor[1]) < _OLDEST_MINOR:
        raise click.BadParameter(f"`{value}` is no version such as 3.12; peft-harness needs 3.{_OLDEST_MINOR} or newer")
    return value


@click.command(epilog="Example: peft-harness kit ./kit")
@click.argument("folder", type=options.FOLDER, metavar="DIR")
@click.option(
    "--size", callback=_bytes, default="60MiB", show_default=True, metavar="SIZE", help="Maximum size of the kit."
)
@click.option(
    "--python",
    "python_version",
    callback=_version,
    default="3.12",
    show_default=True,
    metavar="VERSION",
    help="Python of the other machine.",
)
def kit(folder: Path, size: int, python_version: str) -> Exit:
    """Make a folder that runs `night` on a machine without network.

    The other machine needs Python with torch, triton, transformers and peft, and a GPU. It needs no package index and no
    hub. DIR gets the source, the wheels that the machine lacks, a small model in float16, other models and data as far as
    they fit, and run.sh:

    \b
      peft-harness kit kit --size 60MiB
      bash kit/run.sh --budget 10m --out night     # there

    The exit code is 4 if the kit lacks a wheel that every command needs.
    """
    from harness.assets.kit import make

    made = make.make(folder, size, python_version, print_note)
    rows = [[name, f"{number / 2**20:.2f} MiB"] for name, number in made.items.items()]
    lines = [f"{folder}: {made.bytes / 2**20:.1f} MiB of {size / 2**20:.0f} MiB, for Python {python_version}"]
    lines += align_columns(rows, right=[1])
    if made.left_out:
        lines += ["", "left out:", *align_columns([[name, why] for name, why in made.left_out.items()])]
    if made.lacks_needed:
        print_lines([*lines, "", f"no command starts without what this kit lacks: {', '.join(made.lacks_needed)}"])
        return Exit.INFRASTRUCTURE
    run = shlex.join(["bash", f"{folder.resolve().name}/run.sh", "--budget", "10m", "--out", "night"])
    print_lines([*lines, "", "next:", f"  1. Copy {folder} to the other machine.", f"  2. On that machine, run: {run}"])
    return Exit.PASS
