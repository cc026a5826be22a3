"""The command `claims`: recompute the claims of papers. Only its child processes import torch."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import click

from harness.claims.claim import Tier
from harness.cli import options
from harness.errors import Exit, UsageError


@click.command()
@click.argument("papers", nargs=-1, metavar="[PAPER]...")
@click.option(
    "--tier", "tiers", multiple=True, type=options.Choice(get_args(Tier)),
    help="Only claims that need this: exact (arithmetic or a small tensor), gpu-synthetic (a GPU and random weights) or "
    f"trained (training on data). {options.AGAIN}",
)  # fmt: skip
@click.option(
    "--id", "ids", multiple=True, metavar="ID", help=f"Only claims with an id that starts with ID. {options.AGAIN}"
)
@click.option(
    "--headlines",
    is_flag=True,
    help="Only claims that belong to a paper's headline. --html then writes the headlines' page.",
)
@click.option(
    "--file", "files", multiple=True, type=click.Path(path_type=Path), metavar="YAML",
    help=f"Claim file of your own. {options.AGAIN}",
)  # fmt: skip
@click.option(
    "--run", "runs", multiple=True, metavar="RUN",
    help=f"Decide claims by the Records of this run, before those of published runs. {options.AGAIN}",
)  # fmt: skip
@options.jobs
@click.option("--strict", is_flag=True, help="Exit with 3 if a claim is inconclusive or was not run.")
@click.option(
    "--show",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Compute nothing; show a document written by --json.",
)
@options.html
@options.as_json
def claims(
    papers: tuple[str, ...], tiers: tuple[Tier, ...], ids: tuple[str, ...], headlines: bool, files: tuple[Path, ...],
    runs: tuple[str, ...], jobs: int | None, strict: bool, show: Path | None, html: Path | None, as_json: bool,
) -> Exit:  # fmt: skip
    """Recompute the claims of papers.

    Without PAPER and --file, computes the claims of all papers. Prints for each claim its source, the printed value, our
    value and a verdict. `peft-harness explain claims` describes the format of a claim file. A claim that needs Records takes
    them from the newest complete run of its suite: first among the runs that --run names (a folder, an id, the start of an
    id, or `latest`), then among the published runs.

    \b
    Exit codes:
      1  a claim is not reproduced
      4  a claim could not be computed because of a failure
      5  no claim was computed
    """
    from harness.claims import claim_file, compute, consistency, document, selection, table
    from harness.process.signals import handle_termination
    from harness.records import environment, store
    from harness.report import claims_page
    from harness.report.html import page_path

    page = page_path(html, "--html") if html else None
    if show:
        if papers or files or runs:
            raise UsageError("computes nothing", where="--show", hint="remove PAPER, --file and --run")
        written, software = document.read(show)
        rows = selection.chosen(written, tiers, ids, headlines=headlines)
    else:
        read = claim_file.load([*claim_file.paths(papers or (() if files else claim_file.names())), *files])
        folders = [store.find_run(name).resolve() for name in runs]
        with handle_termination():  # without this, a child could outlive this process
            software = environment.describe().software
            wanted = selection.chosen(read, tiers, ids, headlines=headlines)
            judged = compute.judged(consistency.with_tables(wanted, read), jobs, folders)
            rows = [row for row in judged if row.id in {claim.id for claim in wanted}]
    if page:
        claims_page.write_page(rows, software, page, headlines=headlines)
    options.print_document(document.document(rows, software), as_json, lambda _: table.lines(rows))
    return selection.exit_of(rows, strict=strict)
