"""The command `night`: run as many checks and measurements on a GPU as a time budget allows."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import click

from harness.cli import options
from harness.errors import Exit

_UNITS = {"s": 1.0, "": 1.0, "m": 60.0, "h": 3600.0}


def _seconds(_: click.Context, __: click.Parameter, value: str | None) -> float | None:
    """Return the seconds in `value`: a number, or a number with the unit s, m or h. Without a value, return None."""
    if value is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", value.strip())
    if found is None or not 0 < (seconds := float(found[1]) * _UNITS[found[2]]) < math.inf:
        raise click.BadParameter(f"`{value}` is no time above 0; write e.g. 90s, 10m or 1h")
    return seconds


@click.command()
@click.option(
    "--budget", callback=_seconds, metavar="TIME",
    help="Time for the whole night, e.g. 90s, 25m or 1h; a number alone is seconds. A part that does not fit is not "
    "run.  [default: 10m; 12m with --device cpu]",
)  # fmt: skip
@click.option(
    "--only",
    multiple=True,
    metavar="PART",
    help="Run only the part with this name. If there is none, run all parts whose names start with it. "
    + options.AGAIN,
)
@click.option(
    "--real", type=options.FILE, metavar="FILE",
    help="Suite with a real model for the part matrix-real, instead of `sentinels`.",
)  # fmt: skip
@options.device
@click.option(
    "--out", type=options.FOLDER, metavar="DIR", help="Folder for the results.  [default: results/runs/<night>]"
)
@options.as_json
def night(
    budget: float | None, only: tuple[str, ...], real: Path | None, device: Any, out: Path | None, as_json: bool
) -> Exit:
    """Find out within minutes whether the harness is right and fast on a card.

    Runs, most valuable first: checks of all GPU kernels in every dtype, the ceilings (highest rates) of the card, operations
    and training steps beside other libraries, the papers' claims about hardware, a matrix of all methods, and a comparison
    of equal runs. Each part (one command) is a process of its own, so that a kernel that hangs or crashes ends only its
    part. Results are written at once, and the page index.html shows them at any time. One part compares the matrix with
    the baseline of the card. Ctrl-C ends the run, and keeps what was measured. At the end, `next:` lists the commands
    to run then.

    \b
      peft-harness night                        on a GPU, ten minutes
      peft-harness night --budget 25m           more parts
      peft-harness night --device cpu           a rehearsal: small shapes, Triton's interpreter
      peft-harness night --only step-dora       one part

    The exit code is 1 if a check or a Cell fails or the baseline shows a regression, 4 if a part failed, the run was
    interrupted or there is no GPU, and 5 if nothing was measured.
    """
    from harness.regression.night.run import NightRequest
    from harness.regression.night.run import night as run

    return run(NightRequest(budget, device, out, only, real=real), as_json)
