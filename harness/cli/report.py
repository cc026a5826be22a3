"""The command `report`."""

from __future__ import annotations

from pathlib import Path

import click

from harness.cli import options
from harness.console import print_lines
from harness.errors import Exit

_MOST_SERIOUS_FIRST = (Exit.FAIL, Exit.NOTHING_COMPARED, Exit.INFRASTRUCTURE, Exit.INCONCLUSIVE, Exit.PASS)
"""Exit codes, the most serious first. A finding is more serious than a missing Cell; see `analysis.verdict`."""


@click.command()
@click.argument("runs", nargs=-1, required=True, metavar="RUN...")
@click.option(
    "-o", "--out", type=options.FILE, metavar="FILE", help="Page to write.  [default: report.html in the first run]"
)
@options.strict
def report(runs: tuple[str, ...], out: Path | None, strict: bool) -> Exit:
    """Write the HTML report of runs.

    Also prints a summary of each run. RUN is a folder, an id, the start of an id, or `latest`. Several runs are compared
    with each other: the losses of their common Cells must be equal bit by bit. The exit code is that of the most serious
    verdict; 1 for a difference without a known cause, 5 if no Cell was repeated.
    """
    from harness.analysis.comparison import reproducibility
    from harness.analysis.run_facts import analyse_all
    from harness.records import store
    from harness.report import html, reruns, terminal

    read = [store.read_run(store.find_run(name)) for name in runs]
    page = html.page_path(out or read[0].path / "report.html")
    analysed, again = analyse_all(read), reproducibility.possible_reruns(read)
    html.write_report(analysed, page, again)
    for facts in analysed:
        print_lines(terminal.summary(facts))
    codes = [facts.verdict.exit_code(strict=strict) for facts in analysed]
    if again is not None:
        print_lines(reruns.lines(read, again))
    if again or len(read) > 1:
        codes.append(reproducibility.judge(again or (), strict=strict))
    print_lines([f"report: {page}"])
    return min(codes, key=_MOST_SERIOUS_FIRST.index)
