"""`peft-harness claims`. No torch: child processes compute."""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_args

import click

from harness.claims.claim import Tier
from harness.cli import options
from harness.console import say
from harness.errors import Exit, UsageError


@click.command()
@click.argument("papers", nargs=-1, metavar="[PAPER]...")
@click.option("--tier", "tiers", multiple=True, type=click.Choice(get_args(Tier)), help="[all of them]; again.")
@click.option("--id", "ids", multiple=True, metavar="ID", help="Only claims whose id begins so; may be given again.")
@click.option("--headlines", is_flag=True, help="Only the papers' headlines; --html then writes their own page.")
@click.option(
    "--file", "files", multiple=True, type=click.Path(path_type=Path), metavar="YAML", help="Your own; again."
)
@click.option("--run", "runs", multiple=True, metavar="RUN", help="Its Records decide before published ones; again.")
@click.option("--jobs", type=click.IntRange(1, 256), help="Processes at a time.  [the cores, at most 8]")
@click.option("--strict", is_flag=True, help="Exit with 3 if a claim is inconclusive or was not run.")
@click.option(
    "--show",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Compute nothing, check nothing: show what --json wrote.",
)
@click.option("--html", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE", help="Write a page.")
@options.as_json
def claims(
    papers: tuple[str, ...], tiers: tuple[Tier, ...], ids: tuple[str, ...], headlines: bool, files: tuple[Path, ...],
    runs: tuple[str, ...], jobs: int | None, strict: bool, show: Path | None, html: Path | None, as_json: bool,
) -> Exit:  # fmt: skip
    """Compute again what papers claim.

    All papers, if neither PAPER nor --file is given. Each claim has its source, what is printed, what we get and a
    verdict; `peft-harness explain claims` shows how a file of them is written. Claims that need Records take those of the
    newest complete run of their suite: of those that --run names (a folder, an id, the start of an id, or `latest`), else
    of the published ones. Exits with 1 if a claim is not reproduced, with 4 if one could not be computed that should have
    been, with 5 if none was computed.
    """
    from harness.claims import claim_file, compute, document, selection, table
    from harness.process.termination import handle_termination
    from harness.records import environment, store
    from harness.report import claims_page
    from harness.report.html import page_path

    page = page_path(html, "--html") if html else None
    if show:
        if papers or files or runs:
            raise UsageError("--show computes nothing", where="--show", hint="leave PAPER, --file and --run out")
        written, software = document.read(show)
        rows = selection.chosen(written, tiers, ids, headlines=headlines)
    else:
        read = claim_file.load([*claim_file.paths(papers or (() if files else claim_file.names())), *files])
        folders = [store.find_run(name).resolve() for name in runs]
        with handle_termination():  # or a child would outlive this process
            software = environment.describe().software
            rows = compute.judged(selection.chosen(read, tiers, ids, headlines=headlines), jobs, folders)
    if page:
        claims_page.write_page(rows, software, page, headlines=headlines)
    say(json.dumps(document.document(rows, software), indent=1) if as_json else table.as_text(rows))
    return selection.exit_of(rows, strict=strict)
