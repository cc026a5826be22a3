"""The command `run`: run the Cells of a suite, and report the results."""

from __future__ import annotations

from typing import Any

import click

from harness.cli import options
from harness.errors import Exit


class _RunCommand(click.Command):
    """The command `run`. The options of the executors are added when the command line is parsed, not on import."""

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """Return the options of the command, including those of all executors."""
        from harness.runner import executors

        if not any(parameter.name == "executor" for parameter in self.params):
            found = executors.summaries()
            names, about = [name for name, _, _ in found], [about for _, about, _ in found if about]
            more = [option for _, _, option in found if option]
            self.params += [
                click.Option(
                    ["--executor"], type=options.Choice(names), default="local", show_default=True,
                    help=" ".join(["Where Cells run.", *about]),
                ),
                *(
                    click.Option([f"--{o.name}"], multiple=True, metavar=o.metavar, help=f"{o.help} {options.AGAIN}")
                    for o in more
                ),
            ]  # fmt: skip
        return super().get_params(ctx)


@options.only
@click.command(cls=_RunCommand, epilog="Example: peft-harness run quick")
@click.argument("suite")
@click.option("--out", type=options.PATH, metavar="DIR", help="Run folder.  [default: results/runs/<run id>]")
@click.option("--resume", metavar="RUN", help="Continue this run; Cells that have an ok Record are not run again.")
@options.device
@click.option(
    "--timeout", callback=options.finite_seconds, default=3600.0, show_default=True, metavar="SECONDS",
    help="Stop a Cell that takes longer than this.",
)  # fmt: skip
@options.strict
@click.option(
    "--own-gates", is_flag=True,
    help="Let every Cell take its own parity gate and check its own merged weights, instead of reusing earlier results.",
)  # fmt: skip
@click.option(
    "--jobs", type=click.IntRange(1, 10_000), metavar="N",
    help="Cells to run at the same time.  [default: 1 with local; else as many as the cluster has room for]",
)  # fmt: skip
def run(suite: str, only: str | None, executor: str, jobs: int | None, **rest: Any) -> Exit:
    """Run a suite and report it.

    SUITE is a name (see `peft-harness list suites`) or a .yaml file. Each Cell runs in its own process. With --jobs above
    1, the Cells that run at the same time share the CPU cores equally, and each has a GPU to itself. Ctrl-C, SIGTERM or
    SIGHUP stops the run: finished Cells are saved and reported, and the exit code is 4.
    """
    from harness.runner import executors
    from harness.runner.run import run_suite

    values = {name: rest.pop(name) for name in executors.option_names()}
    return run_suite(suite, only=only, executor=executors.choose(executor, jobs, values), **rest)
