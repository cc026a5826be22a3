"""The command `run`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from harness.cli import options
from harness.errors import Exit


@options.only
@click.command()
@click.argument("suite")
@click.option(
    "--out", type=click.Path(path_type=Path), metavar="DIR", help="Run folder.  [default: results/runs/<run id>]"
)
@click.option("--resume", metavar="RUN", help="Continue this run; Cells that have an ok Record are not run again.")
@options.device
@click.option(
    "--timeout", callback=options.finite_seconds, default=3600.0, show_default=True, metavar="SECONDS",
    help="Stop a Cell that takes longer than this.",
)  # fmt: skip
@options.strict
@click.option(
    "--executor", type=click.Choice(["local", "ray", "slurm"]), default="local", show_default=True,
    help="Where Cells run. ray connects to RAY_ADDRESS, or starts Ray on this machine.",
)  # fmt: skip
@click.option(
    "--jobs", type=click.IntRange(1, 10_000), metavar="N",
    help="Cells to run at the same time.  [default: 1 with local; else as many as the cluster has room for]",
)  # fmt: skip
@click.option(
    "--slurm", multiple=True, metavar="KEY=VALUE", help=f"Option to pass on to sbatch, e.g. gres=gpu:1. {options.AGAIN}"
)
def run(suite: str, only: str | None, executor: str, jobs: int | None, slurm: tuple[str, ...], **rest: Any) -> Exit:
    """Run a suite and report it.

    SUITE is a name (see `peft-harness list suites`) or a .yaml file. Each Cell runs in its own process. With --jobs above
    1, the Cells that run at the same time share the CPU cores equally, and each has a GPU to itself. Ctrl-C, SIGTERM or
    SIGHUP stops the run: finished Cells are kept and reported, and the exit code is 4.
    """
    from harness.runner import executors
    from harness.runner.run import run_suite

    return run_suite(suite, only=only, executor=executors.choose(executor, jobs, slurm), **rest)
