"""The command `history`: store the results of nightly runs, and find changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from harness.cli import options
from harness.errors import Exit

_dir = click.option(
    "--dir", "folder", type=options.FOLDER, default=Path("results/history"), show_default=True, metavar="DIR",
    help="Folder of the history.",
)  # fmt: skip
_cell = options.cells("--cell", "Only these Cells, e.g. `method=lora,rank=8`; syntax of `peft-harness run --only`.")
_night = click.option("--night", required=True, metavar="DATE", help="First night of the new level, e.g. 2026-01-31.")


@click.group()
def history() -> None:
    """Store the results of nightly runs, and find what changed.

    `add` writes small files, which are meant to be committed to git; `detect` reads only these. Run the suite three
    times per night: each of these runs is a pass, and the median of the passes is used.
    """


@history.command(epilog="Example: peft-harness history add latest")
@click.argument("runs", nargs=-1, required=True, metavar="RUN...")
@click.option(
    "--night", metavar="DATE", help="Night of these runs.  [default: the UTC date on which each run started]"
)  # fmt: skip
@_dir
def add(runs: tuple[str, ...], night: str | None, folder: Path) -> Exit:
    """Add the results of runs to the history.

    RUN is a folder, an id, the start of an id, or `latest`; each run is one pass of its night. Stores step time, latencies,
    peak and counted bytes, parameters and accuracy of each Cell, but no times of a Cell that failed a check or waited for a
    CPU. Adding a run again stores only new numbers.

    \b
    Exit codes:
      1  a file was changed after its run, and left out
      4  a Record is missing or cannot be read, or the run has no hashes that
         would show a change
      5  there is nothing to add
    """
    from harness.regression.history import add as adding

    return adding.add(runs, folder, night)


@history.command()
@_cell
@click.option("--metric", metavar="M", help="Only this metric, e.g. step_s; `latency_s` selects all latencies.")
@click.option("--nights", "each_night", is_flag=True, help="Print one line per night.")
@_dir
@options.as_json
def show(cell: str | None, metric: str | None, each_night: bool, folder: Path, as_json: bool) -> Exit:
    """Print the series of the history.

    One line for each Cell, metric and place. A place is a machine with its driver, torch, Triton and number of threads.
    Exits with 4 if a file cannot be read, and with 5 if there is nothing to print.
    """
    from harness.regression.history import show as shown

    return shown.show(folder, cell, metric, each_night=each_night, as_json=as_json)


@history.command()
@_cell
@options.cells(
    "--sentinel", "Cells with code that does not change, so a change of their times shows a change of the machine."
)  # fmt: skip
@click.option("--strict", is_flag=True, help="Exit with 3 if a change is not confirmed.")
@_dir
@options.as_json
def detect(cell: str | None, sentinel: str | None, strict: bool, folder: Path, as_json: bool) -> Exit:
    """Find changes of level.

    A series has one value per night, for one metric of a Cell at one place. A place is a machine with its driver,
    torch, Triton and number of threads.

    Times: the value of a night is the median over its passes, divided by the night's anchor. The anchor shows how slow
    the whole machine was. For each series of step times at the place, take the night's value / the usual value, i.e.
    the median over all nights. The anchor is the median of these ratios. Latencies have an anchor of their own. An
    optimal segmentation splits the values of a series into levels. A change of level is at least 2 % and lasts three
    nights, so that one bad night is not a change. The anchor itself is compared with the sentinels, whose code does not
    change: the latencies of the bare base models and the Cells of --sentinel.

    Accuracy: the same without an anchor, for changes of at least one percentage point. Parameters and counted bytes:
    any change, on its first night. Peak memory: a change by more than 16 MiB and more than 1 %.

    \b
    Exit codes:
      1  more parameters or counted bytes, or another change for the worse that
         a line in confirmations.jsonl confirms (`history confirm` and `history
         settle` write it); `history reset` accepts the change
      3  with --strict: a change, worse or better, is neither confirmed nor refuted
      4  a Cell or a metric is no longer measured on the last night of its place
         (`history reset` accepts it), or a file of the history cannot be read
      5  nothing to compare: no series is long enough
      0  otherwise, also if changes wait for a confirmation; each names its command
    """
    from harness.regression.history import detect as detected

    return detected.detect(folder, cell, sentinel, as_json, strict)


@history.command()
@_cell
@click.option(
    "--most", type=click.IntRange(1), default=10, show_default=True, metavar="N",
    help="Number of changes to try, the largest first.",
)  # fmt: skip
@click.option(
    "--out", type=options.FOLDER, metavar="DIR",
    help="Folder for the run folders.  [default: results/runs/<date>-settle-<random>]",
)  # fmt: skip
@click.option(
    "--suite", type=click.Path(path_type=Path, dir_okay=False, exists=True), metavar="FILE",
    help="File of the nightly suite, if it is not part of peft-harness.",
)  # fmt: skip
@options.author()
@_dir
def settle(cell: str | None, most: int, out: Path | None, suite: Path | None, author: str | None, folder: Path) -> Exit:
    """Confirm or refute suspected changes by pairs of runs.

    Takes each unconfirmed change of a time, and each step time that was longer in the last night than before. Runs
    `gate --pairs` with the revisions before and after the change. Writes the verdict `regressed`, `improved` or
    `refuted` to the history, like `history confirm`; an undecided change stays open. The first comparison includes a
    canary, a revision against itself. If canaries raise the alarm too often on this machine, no verdict is written.

    \b
    Exit codes:
      4  pairs could not be run, or were interrupted
      3  a change is still undecided
      0  otherwise; `history detect` judges the confirmed changes
    """
    from harness.regression.history import verify

    return verify.verify(folder, cell, most, author, out, suite)


@history.command(epilog="Example: peft-harness history reset d8b5913f step_s --night 2026-01-31 --reason 'new driver'")
@click.argument("cell", metavar="CELL|*")
@click.argument("metric", metavar="METRIC|*")
@_night
@click.option("--reason", required=True, metavar="TEXT", help="Why the new level is right.")
@options.author()
@_dir
def reset(cell: str, metric: str, night: str, reason: str, author: str | None, folder: Path) -> Exit:
    """Accept the new level of a series.

    Detection in the series of CELL and METRIC starts again on the given night. CELL is a cell_id or the start of one; `*`
    means every Cell or metric. The decision is stored in resets.jsonl with its author, time and reason: commit it to git.
    """
    from harness.regression.history import decisions

    return decisions.print_decision(decisions.reset(folder, cell, metric, night, reason, author))


@history.command(
    epilog="Example: peft-harness history confirm d8b5913f step_s --night 2026-01-31 --verdict refuted --evidence 'pairs'"
)
@click.argument("cell", metavar="CELL|*")
@click.argument("metric", metavar="METRIC|*")
@_night
@click.option(
    "--verdict", required=True, type=options.Choice(["regressed", "improved", "refuted"]), help="What the test showed."
)
@click.option("--evidence", required=True, metavar="TEXT", help="Which test was run, and its result.")
@options.author()
@_dir
def confirm(cell: str, metric: str, night: str, verdict: Any, evidence: str, author: str | None, folder: Path) -> Exit:
    """Record the verdict on a change.

    Use this command after pairs of runs of both revisions have decided the change. The verdict is stored in
    confirmations.jsonl (commit it to git). It applies to a change in the series of CELL and METRIC, at most two nights
    before or after the given night.
    """
    from harness.regression.history import confirm_manually, decisions

    return decisions.print_decision(confirm_manually.confirm(folder, cell, metric, night, verdict, evidence, author))
