"""The command `baseline`: copy runs to results/baselines, for comparison with later runs, and list the copies."""

from __future__ import annotations

import click

from harness.cli import options
from harness.errors import Exit


@click.group()
def baseline() -> None:
    """Manage the runs that later runs are compared with.

    A baseline is a copy of a run in results/baselines. Commit it to git.
    """


@baseline.command(epilog="Example: peft-harness baseline promote latest main --reason 'first release'")
@click.argument("run")
@click.argument("name")
@click.option("--reason", required=True, metavar="TEXT", help="Why later runs are compared with this one.")
@options.author(default="")
@click.option("--replace", is_flag=True, help="Replace an existing baseline of this name.")
def promote(run: str, name: str, reason: str, author: str, replace: bool) -> Exit:
    """Make a run a baseline.

    RUN is a folder, an id, the start of an id, or `latest`. Copies its run.json, Records and footer.json, and writes
    baseline.json with the author, the date, the origin and the reason.

    Refuses, with all reasons: a Record made from uncommitted changes, a run without a footer, a run that was changed after
    its end, a Cell that did not end ok or failed a check in any attempt, and an existing NAME.
    """
    from harness.regression.baseline import gate

    return gate.promote(run, name, reason=reason, author=author, replace=replace)


@baseline.command("list")
@options.as_json
def list_(as_json: bool) -> Exit:
    """List the baselines."""
    from harness.regression.baseline import gate

    return gate.list_(as_json)
