"""The verbs `gate` and `baseline`: options only. What they do is imported when they do it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from harness.errors import Exit

_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
_file = click.Path(path_type=Path, dir_okay=False)


def _bytes(_: click.Context, __: click.Parameter, value: str | None) -> int | None:
    """Read a number of bytes, or a size with its unit."""
    if value is None or value.isdecimal():
        return None if value is None else int(value)
    from harness.footprint import sizes

    try:
        return sizes.parse(value).number_B
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


@click.command()
@click.argument("run")
@click.option("--baseline", required=True, metavar="NAME", help="What `peft-harness baseline list` shows.")
@click.option(
    "--memory-bytes", callback=_bytes, metavar="SIZE",
    help="How much a training peak may grow, e.g. 4096 or 64MiB.  [a process: 16MiB; a GPU: 0]",
)  # fmt: skip
@click.option(
    "--accuracy-points", type=click.FloatRange(0, 100), default=2.0, show_default=True, metavar="P",
    help="A drop that is still no worse.",
)  # fmt: skip
@click.option("--strict", is_flag=True, help="Exit with 3 if a question stays open.")
@click.option("--all", "everything", is_flag=True, help="Print rows that are the same in both too.")
@click.option("--junit", type=_file, metavar="FILE", help="Write a JUnit XML file.")
@click.option("--markdown", type=_file, metavar="FILE", help="Write a summary for a CI job, under 1 MiB.")
@click.option("--annotations", is_flag=True, help="Print GitHub's annotations.  [where GITHUB_ACTIONS is true]")
@_json
def gate(
    run: str, baseline: str, memory_bytes: int | None, accuracy_points: float, strict: bool, **told: Any
) -> Exit:  # fmt: skip
    """Compare a run with a baseline.

    RUN is what `report` takes. Of every Cell: does it still compute its Method, does it still end well, is it there, and
    are its parameters, bytes, files and answers no worse? Times are shown and not judged: another session's are no
    standard. What is not the same around two Records (machine, driver, libraries, code) is named in the verdict.

    \b
    Exit codes, the first that holds:
      5  nothing compared: no Cell has a Record on both sides
      1  a regression, a Cell that the run does not plan, or a file that was
         changed after its run
      4  no regression, but the run did not come to a Cell, a Record that alone
         stands for its Cell cannot be read, or the run did not finish
      3  no regression, but a question left open or another environment
         (with --strict)
      0  else
    A file that cannot be read and takes no Cell away is named, and changes no
    code. `peft-harness explain gate` tells the rule of every kind of finding.
    """
    from harness.analysis.baseline_rows import Margins
    from harness.gate import command

    margins = Margins(memory_bytes, accuracy_points / 100)
    return command.gate(run, baseline, margins, command.Output(**told), strict=strict)


@click.group()
def baseline() -> None:
    """Keep runs to compare with.

    A baseline is a run in results/baselines, to be committed.
    """


@baseline.command()
@click.argument("run")
@click.argument("name")
@click.option("--reason", required=True, metavar="TEXT", help="Why others are to be compared with this run.")
@click.option("--author", default="", metavar="WHO", help="[as git knows you]")
@click.option("--replace", is_flag=True, help="Let it take the place of the baseline of this name.")
def promote(run: str, name: str, reason: str, author: str, replace: bool) -> Exit:
    """Make a run a baseline.

    Refuses, with all reasons at once: uncommitted changes in the tree that a Record was made from, a run without its
    footer, one that was changed after it ended, a Cell that did not end ok or failed a check in any attempt, and a NAME
    that is taken. Copies run.json, the Records and the footer, and writes who, when, from what and why into baseline.json.
    """
    from harness.gate import command

    return command.promote(run, name, reason=reason, author=author, replace=replace)


@baseline.command("list")
@_json
def list_(as_json: bool) -> Exit:
    """List the baselines there are."""
    from harness.gate import command

    return command.list_(as_json)
