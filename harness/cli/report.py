"""The command `report`: write the HTML report of runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from harness.cli import options
from harness.console import print_lines
from harness.errors import Exit, plural
from harness.records import collection

if TYPE_CHECKING:
    from harness.records.store import Run

_MOST_SERIOUS_FIRST = (Exit.FAIL, Exit.NOTHING_COMPARED, Exit.INFRASTRUCTURE, Exit.INCONCLUSIVE, Exit.PASS)
"""Exit codes, the most serious first. A finding is more serious than a missing Cell."""


@click.command(epilog="Example: peft-harness report latest")
@click.argument("runs", nargs=-1, required=True, metavar="RUN...")
@click.option(
    "-o",
    "--out",
    type=options.FILE,
    metavar="FILE",
    help="File to write.  [default: report.html in the folder of the run]",
)
@click.option(
    "--format", "form", type=options.Choice(["html", "markdown", "csv", "json"]), default="html", show_default=True,
    help="Other formats hold the answers and the recipes, and are printed, or written to --out.",
)  # fmt: skip
@click.option(
    "--svg", type=options.FOLDER, metavar="DIR",
    help="Also write each chart to this folder as two SVG files, light and dark, for a README or a paper.",
)  # fmt: skip
@options.strict
@collection.paused()
def report(runs: tuple[str, ...], out: Path | None, form: str, svg: Path | None, strict: bool) -> Exit:
    """Write the HTML report of runs.

    Also prints a summary of each run, except with another --format. RUN is a folder, an id, the start of an id, or
    `latest`. Several runs are compared with each other: the losses of their common Cells must be equal bit by bit. The
    exit code is that of the most serious verdict. The comparison counts as 1 if a difference has no known cause, and as
    5 if no Cell was repeated.
    """
    from harness.analysis.comparison import reproducibility
    from harness.analysis.run_facts import analyse_all
    from harness.records import files, store
    from harness.report import alerts, chart_files, html, reruns, side_by_side, terminal, text_formats

    read = [store.read_run(store.find_run(name)) for name in runs]
    analysed, again = analyse_all(read), reproducibility.possible_reruns(read)
    charts = [] if svg is None else chart_files.write_charts(analysed, svg)
    if form == "html":
        page = html.page_path(out or read[0].path / _page_name(read))
        html.write_report(analysed, page, again)
        for facts in analysed:
            print_lines(terminal.summary(facts))
    codes = [facts.verdict.exit_code(strict=strict) for facts in analysed]
    if form == "html" and len(read) > 1:
        print_lines(side_by_side.lines(analysed))
    if again is not None and form == "html":
        print_lines(reruns.lines(read, again))
    if again or len(read) > 1:
        codes.append(reproducibility.judge(again or (), strict=strict))
    if form == "html":
        print_lines([f"report: {page}", *([] if svg is None else [f"charts: {plural(len(charts), 'file')} in {svg}"])])
    else:
        for facts in analysed:
            print_lines([f"! {alert}" for alert in alerts.lines(facts)], err=True)
        text = text_formats.FORMATS[form](analysed)
        if out is None:
            print_lines(text.rstrip("\n").split("\n"))
        else:
            files.write_atomic(out, text.encode())
    return min(codes, key=_MOST_SERIOUS_FIRST.index)


def _page_name(runs: Sequence[Run]) -> str:
    """Return the file name of the page. The page of several runs gets another name than the page of the first run alone."""
    return "report.html" if len(runs) == 1 else f"report-with-{'-'.join(run.manifest.run for run in runs[1:])}.html"
