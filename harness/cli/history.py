"""The verb `history` and the verbs under it: options only.

Imports are inside the verbs, so that `--help` answers at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from harness.cli import options
from harness.errors import Exit

_dir = click.option(
    "--dir", "folder", type=click.Path(path_type=Path, file_okay=False), default=Path("results/history"), show_default=True,
    metavar="DIR", help="Where the history is kept.",
)  # fmt: skip
_cell = options.cells("--cell", "Cells, as `--only` of `run` names them, e.g. `method=lora,rank=8`.")
_author = click.option("--author", metavar="NAME", help="Who decides this.  [git's user]")
_night = click.option("--night", required=True, metavar="DATE", help="The first night of the new level.")


@click.group()
def history() -> None:
    """Keep runs night by night and say what changed.

    Three passes over the same suite make a good night: each Cell's median counts. `add` writes small files that are meant
    to be committed; `detect` reads nothing else.
    """


@history.command()
@click.argument("runs", nargs=-1, required=True, metavar="RUN...")
@click.option("--night", metavar="DATE", help="Of all these runs.  [each run's own: the date in UTC when it began]")
@_dir
def add(runs: tuple[str, ...], night: str | None, folder: Path) -> Exit:
    """Keep the numbers of runs.

    RUN is what `report` takes; each is a pass of its night. A run that is added again changes nothing, or adds what it
    has more since. Kept are step time, latencies, peak and counted bytes, parameters and accuracy of every Cell; no time
    of a Cell that failed a check, or that waited for its CPU. Names what had to be left out, and then exits with 1
    (changed after its run) or 4 (unreadable, missing, no hashes that would show a change); with 5 where there is nothing
    to add.
    """
    from harness.regression.history import add as adding

    return adding.add(runs, folder, night)


@history.command()
@_cell
@click.option("--metric", metavar="M", help="Only this metric, e.g. step_s, or `latency_s` for all latencies.")
@click.option("--nights", "each_night", is_flag=True, help="A line per night.")
@_dir
@options.as_json
def show(cell: str | None, metric: str | None, each_night: bool, folder: Path, as_json: bool) -> Exit:
    """Show the series.

    A line for each Cell, metric and place; a place is a machine with its driver, torch, Triton and threads. Judges nothing.
    Exits with 4 where a file could not be read, with 5 where there is nothing to show.
    """
    from harness.regression.history import show as shown

    return shown.show(folder, cell, metric, each_night=each_night, as_json=as_json)


@history.command()
@_cell
@options.cells("--sentinel", "Cells that nobody changes: they tell the machine from what is under test.")
@click.option("--strict", is_flag=True, help="Exit with 3 if a change is not confirmed.")
@_dir
@options.as_json
def detect(cell: str | None, sentinel: str | None, strict: bool, folder: Path, as_json: bool) -> Exit:
    """Find changes of level.

    Times: each night's median over its passes, divided by the night's anchor (the median over all series of value / usual
    value), then an optimal segmentation; told from 2 % and three nights on, so a lone bad night is none. The anchor is
    watched too, beside the bare base models' latencies and the Cells of --sentinel. Accuracy: the same without an anchor,
    from one point on. Bytes and parameters: any change on its first night; a peak from 16 MiB and 1 % on. Series of
    different places are never joined, and what differs is named.

    \b
    Exit codes:
      1  a change for the worse that stands: counted, or confirmed by a committed
         record (`history confirm`); `history reset` accepts it
      3  with --strict: a change, worse or better, that nobody confirmed or refuted
      4  a Cell, or a metric of one, is measured no more: it ends otherwise, or is
         not there on the last night of its place (`history reset` accepts it);
         or a file of the history could not be read; the rest was judged
      5  nothing to compare: no series is long enough
      0  else, also with changes that await confirmation: each says how to get it
    """
    from harness.regression.history import detect as detected

    return detected.detect(folder, cell, sentinel, as_json, strict)


@history.command()
@_cell
@click.option(
    "--most", type=click.IntRange(1), default=10, show_default=True, metavar="N", help="Of the largest changes."
)
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), metavar="DIR", help="Run folders.")
@click.option(
    "--suite",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    metavar="FILE",
    help="The nights' suite, where it is your own.",
)
@_author
@_dir
def settle(cell: str | None, most: int, out: Path | None, suite: Path | None, author: str | None, folder: Path) -> Exit:
    """Try by pairs what `detect` suspects.

    For each step time whose last night lies above its level, and each change of a time that nobody confirmed, runs `gate
    --pairs` with the revisions of before and after, and writes what they say down, as `confirm` does: `regressed`,
    `improved` or `refuted`. What pairs leave open stays open. The first pairs bring a canary, a revision against itself;
    where canaries alarm too often, nothing is written down.

    \b
    Exit codes:
      4  pairs could not be run, or somebody ended them
      3  pairs left a change open
      0  else; `detect` judges what was confirmed
    """
    from harness.regression.history import verify as settling

    return settling.settle(folder, cell, most, author, out, suite)


@history.command()
@click.argument("cell", metavar="CELL|*")
@click.argument("metric", metavar="METRIC|*")
@_night
@click.option("--reason", required=True, metavar="TEXT", help="Why this level is right.")
@_author
@_dir
def reset(cell: str, metric: str, night: str, reason: str, author: str | None, folder: Path) -> Exit:
    """Accept a level.

    Detection of that series begins anew on that night. CELL is (the start of) a cell_id. The decision is a line of
    resets.jsonl with its author, its time and its reason: commit it.
    """
    from harness.regression.history import decisions

    _said(decisions.reset(folder, cell, metric, night, reason, author))
    return Exit.PASS


@history.command()
@click.argument("cell", metavar="CELL|*")
@click.argument("metric", metavar="METRIC|*")
@_night
@click.option("--verdict", required=True, type=click.Choice(["regressed", "improved", "refuted"]))
@click.option("--evidence", required=True, metavar="TEXT", help="What was run and what it said.")
@_author
@_dir
def confirm(cell: str, metric: str, night: str, verdict: Any, evidence: str, author: str | None, folder: Path) -> Exit:
    """Write down what became of a change.

    After pairs of runs of both revisions have decided it. A line of confirmations.jsonl: commit it. It holds for a change
    of that series up to two nights away.
    """
    from harness.regression.history import confirm_manually

    _said(confirm_manually.confirm(folder, cell, metric, night, verdict, evidence, author))
    return Exit.PASS


def _said(line: dict[str, Any]) -> None:
    from harness.console import say

    say(f"{line['cell']} {line['metric']} from {line['night']} on, by {line['author']}: {line['reason']}")
