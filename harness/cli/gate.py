"""The verbs `gate` and `baseline`: options only. What they do is imported when they do it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from harness.cli import options
from harness.errors import Exit

_file = click.Path(path_type=Path, dir_okay=False)


def _bytes(_: click.Context, __: click.Parameter, value: str | None) -> int | None:
    """Read a number of bytes, or a size with its unit."""
    if value is None:
        return None
    from harness.memory_model import size_units

    if value.isdecimal() and len(value) <= size_units.DIGITS:
        return int(value)
    try:
        return size_units.parse(value).number_B
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


@click.command()
@click.argument("run", required=False)
@click.option("--baseline", metavar="NAME", help="What `peft-harness baseline list` shows.")
@click.option(
    "--memory-bytes", callback=_bytes, metavar="SIZE",
    help="How much a training peak may grow, e.g. 4096 or 64MiB.  [counted on a CPU: 64KiB; of a process: 16MiB; a GPU: 0]",
)  # fmt: skip
@click.option(
    "--accuracy-points", type=click.FloatRange(0, 100), metavar="P", help="A drop that is still no worse.  [2]"
)
@click.option("--all", "everything", is_flag=True, help="Print rows that are the same in both too.")
@click.option("--junit", type=_file, metavar="FILE", help="Write a JUnit XML file.")
@click.option("--markdown", type=_file, metavar="FILE", help="Write a summary for a CI job, under 1 MiB.")
@click.option("--annotations", is_flag=True, help="Print GitHub's annotations.  [where GITHUB_ACTIONS is true]")
@click.option("--pairs", nargs=2, metavar="OLD NEW", help="Two revisions (`.`: as it stands), or two implementations.")
@click.option(
    "--repo", type=click.Path(path_type=Path), metavar="DIR",
    help="Of --pairs: the folder of your own package, whose revisions OLD and NEW are.  [the harness's]",
)  # fmt: skip
@click.option("--suite", metavar="SUITE", help="Of --pairs: whose Cells.  [sentinels]")
@options.cells("--only", "Of --pairs: Cells to keep, as of `run`.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), help="Of --pairs.  [auto]")
@click.option(
    "--cores", type=click.IntRange(1), metavar="N", help="Of --pairs: both sides get these.  [CPU: 1; GPU: all]"
)
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), metavar="DIR", help="Of --pairs: run folders.")
@click.option("--seed", type=click.IntRange(0), metavar="S", help="Of --pairs: fixes the order.  [drawn, and told]")
@click.option("--no-canary", is_flag=True, help="Of --pairs: run no Cell of OLD against itself.")
@click.option("--strict", is_flag=True, help="Exit with 3 if a question stays open.")
@options.as_json
def gate(run: str | None, baseline: str | None, pairs: tuple[str, str] | None, strict: bool, **told: Any) -> Exit:
    """Compare a run with a baseline, or two sides by pairs.

    \b
      gate RUN --baseline NAME    is anything larger, worse or wrong?
      gate --pairs OLD NEW        is anything slower?

    RUN is what `report` takes. Of every Cell: does it still compute its Method, does it still end well, is it there, and
    are its parameters, bytes, files and answers no worse? Times are shown and not judged: another session's are no
    standard. What is not the same around two Records (machine, driver, libraries, code) is named in the verdict.

    --pairs runs each Cell of a suite by both sides in turn, a process each, in an order fixed before the first: six pairs,
    and where these do not prove it the same, ten or twenty fresh ones that alone decide. It judges the step, each latency
    that the suite measures but those of the bare base, memory, parameters and outcomes. A Cell of OLD is run against itself
    besides, a canary: where these alarm too often the gate is closed.

    \b
    Exit codes, the first that holds:
      5  nothing compared: no Cell has a Record on both sides
      1  a regression, a Cell that the run does not plan, or a file that was
         changed after its run
      4  no regression, but the run did not come to a Cell, a Record that alone
         stands for its Cell cannot be read, the run did not finish, or the
         canaries closed the gate
      3  no regression, but a question left open or another environment
         (with --strict)
      0  else
    A file that cannot be read and takes no Cell away is named, and changes no
    code. `peft-harness explain gate` tells the rule of every kind of finding.
    """
    given = {name for name, value in told.items() if value is not None and value is not False} - {"as_json"}
    if pairs is None:
        return _against(run, baseline, strict, given, told)
    if run is not None or baseline is not None or given & _OF_BASELINES:
        wrong = [f"--{name.replace('_', '-')}" for name in sorted(given & _OF_BASELINES)]
        raise click.UsageError(f"--pairs runs both sides itself: leave out {', '.join(wrong) or 'RUN and --baseline'}")
    from harness.regression.outputs.files import Outputs
    from harness.regression.pairs import gate as gate_pairs

    outputs = Outputs(told["junit"], told["markdown"], told["annotations"])
    options = {name: told[name] for name in given & {"repo", "suite", "only", "device", "cores", "out", "seed"}}
    asked = gate_pairs.PairsRequest(*pairs, canary=not told["no_canary"], strict=strict, outputs=outputs, **options)
    return gate_pairs.gate(asked, told["as_json"])


_OF_BASELINES = {"memory_bytes", "accuracy_points", "everything"}
_OF_PAIRS = {"repo", "suite", "only", "device", "cores", "out", "seed", "no_canary"}


def _against(run: str | None, baseline: str | None, strict: bool, given: set[str], told: dict[str, Any]) -> Exit:
    if run is None or baseline is None:
        raise click.UsageError("give RUN and --baseline NAME, or --pairs OLD NEW")
    if wrong := sorted(given & _OF_PAIRS):
        raise click.UsageError(f"only --pairs takes --{wrong[0].replace('_', '-')}")
    from harness.analysis.comparison.baseline_rows import ACCURACY, Margins
    from harness.regression.baseline import gate as gate_baseline
    from harness.regression.outputs.files import Outputs

    points = told["accuracy_points"]
    margins = Margins(told["memory_bytes"], ACCURACY if points is None else points / 100)
    outputs = Outputs(told["junit"], told["markdown"], told["annotations"])
    return gate_baseline.gate(
        run, baseline, margins, outputs, as_json=told["as_json"], everything=told["everything"], strict=strict
    )


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
    from harness.regression.baseline import gate as gate_baseline

    return gate_baseline.promote(run, name, reason=reason, author=author, replace=replace)


@baseline.command("list")
@options.as_json
def list_(as_json: bool) -> Exit:
    """List the baselines there are."""
    from harness.regression.baseline import gate as gate_baseline

    return gate_baseline.list_(as_json)
