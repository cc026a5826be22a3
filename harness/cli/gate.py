"""The command `gate`: find regressions, by `gate RUN --baseline NAME` or by `gate --pairs OLD NEW`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from harness.cli import options
from harness.errors import Exit

_C = TypeVar("_C", bound=Callable[..., Any])


class _OptionOf(click.Option):
    """An option that belongs to one form of the command `gate`.

    form: the option that selects this form, `--baseline` or `--pairs`.
    """

    def __init__(self, *args: Any, form: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.form = form
        self.help = f"(with {form}) {self.help}"


def _option(form: str, *names: str, **settings: Any) -> Callable[[_C], _C]:
    return click.option(*names, cls=_OptionOf, form=form, **settings)


def _variables(_: click.Context, __: click.Parameter, values: tuple[str, ...]) -> tuple[str, ...]:
    if wrong := [value for value in values if "=" not in value.lstrip("=")]:
        raise click.BadParameter(f"{wrong[0]!r} is not NAME=VALUE")
    return values


def _bytes(_: click.Context, __: click.Parameter, value: str | None) -> int | None:
    """Return the size that an option gives, in bytes. Without a value, return None.

    value: a number of bytes, or a number with a unit.
    """
    if value is None:
        return None
    from harness.memory_model import size_units

    if value.isdecimal() and len(value) <= size_units.DIGITS:
        return int(value)
    try:
        return size_units.parse_size(value).number_B
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


@click.command()
@click.argument("run", required=False)
@click.option(
    "--baseline",
    metavar="NAME",
    help="Compare RUN with this baseline (see `peft-harness baseline list`) or with the folder of another run.",
)
@_option(
    "--baseline", "--memory-bytes", callback=_bytes, metavar="SIZE",
    help="Allowed growth of the peak of training, e.g. 4096 or 64MiB.  [default: 64KiB if tensors are counted on a CPU, "
    "16MiB for a process, 0 on a GPU]",
)  # fmt: skip
@_option(
    "--baseline", "--accuracy-points", type=click.FloatRange(0, 100), default=2.0, show_default=True, metavar="P",
    help="Allowed drop of the accuracy, in percentage points.",
)  # fmt: skip
@_option("--baseline", "--all", "all_rows", is_flag=True, help="Also print rows that are equal in both runs.")
@options.junit
@click.option(
    "--markdown", type=options.FILE, metavar="FILE", help="Also write a Markdown summary for a CI job, below 1 MiB."
)
@click.option(
    "--annotations", is_flag=True, help="Also print GitHub annotations.  [default: only if GITHUB_ACTIONS is true]"
)
@click.option(
    "--pairs", nargs=2, metavar="OLD NEW",
    help="Compare two git revisions (`.`: the checkout as it stands) or two implementations.",
)  # fmt: skip
@_option(
    "--pairs", "--repo", type=click.Path(path_type=Path), metavar="DIR",
    help="Folder of your own package; OLD and NEW are then its revisions.  [default: the checkout of peft-harness]",
)  # fmt: skip
@_option(
    "--pairs", "--suite", default="sentinels", show_default=True, metavar="SUITE", help="Suite with the Cells to run."
)
@_option(
    "--pairs", "--only", multiple=True, metavar="EXPR", callback=options.join,
    help="Use only these Cells; the syntax is that of `peft-harness run --only`.",
)  # fmt: skip
@_option(
    "--pairs", "--device", type=options.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True,
    help="Device to run on.",
)  # fmt: skip
@_option(
    "--pairs", "--cores", type=click.IntRange(1), metavar="N",
    help="CPU cores that each side may use.  [default: 1 on a CPU; all if there is a GPU]",
)  # fmt: skip
@_option(
    "--pairs", "--out", type=options.FOLDER, metavar="DIR",
    help="Folder for the run folders and pairs.json.  [default: results/runs/<date>-pairs-<random>]",
)  # fmt: skip
@_option(
    "--pairs", "--seed", type=click.IntRange(0), metavar="S",
    help="Random seed of the order of the runs.  [default: random, and printed]",
)  # fmt: skip
@_option(
    "--pairs", "--old-variable", "old_variables", multiple=True, metavar="NAME=VALUE", callback=_variables,
    help=f"Environment variable of OLD's processes, e.g. for `--pairs . .`. {options.AGAIN}",
)  # fmt: skip
@_option(
    "--pairs", "--new-variable", "new_variables", multiple=True, metavar="NAME=VALUE", callback=_variables,
    help=f"Environment variable of NEW's processes. {options.AGAIN}",
)  # fmt: skip
@_option("--pairs", "--no-canary", is_flag=True, help="Do not run a Cell of OLD against itself.")
@_option(
    "--pairs", "--no-fresh", is_flag=True,
    help="Run no new pairs. The gate then cannot report a slow-down: a time is either proven unchanged by the first six "
    "pairs, or inconclusive.",
)  # fmt: skip
@options.strict
@options.as_json
@click.pass_context
def gate(
    ctx: click.Context, /, run: str | None, baseline: str | None, pairs: tuple[str, str] | None, junit: Path | None,
    markdown: Path | None, annotations: bool, strict: bool, as_json: bool, **rest: Any,
) -> Exit:  # fmt: skip
    """Compare a run with a baseline, or two versions by pairs of runs.

    \b
      gate RUN --baseline NAME    Is anything larger, worse or wrong?
      gate --pairs OLD NEW        Is anything slower?

    With --baseline, RUN is a folder, an id, the start of an id, or `latest`. Compares the checks, outcome, parameters,
    bytes, files and answers of each Cell. Times are shown but not judged, because two sessions on one machine differ too
    much. The verdict names differences of the environment: machine, driver, libraries, code.

    With --pairs, both sides run each Cell of a suite alternately, each time in its own process, in a random order that is
    fixed beforehand. Each Cell gets six pairs. If these do not prove its times unchanged, ten or twenty further pairs
    run, and only these decide. The gate judges the training step, each latency that the suite measures (except those
    of the bare base model), memory, parameters and outcomes. A Cell of OLD also runs against itself, as a canary: if
    canaries raise the alarm too often on this machine, the gate judges no times.

    \b
    Exit codes; the first that applies counts:
      5  nothing compared: no Cell has a Record on both sides
      1  a regression, a Cell that is not in the plan of the run, or a file that
         was changed after its run
      4  no regression, but a Cell was not run, the only Record of a Cell cannot
         be read, the run did not finish, or canaries raise the alarm too often
      3  no regression, but a question is undecided or the environment differs
         (with --strict)
      0  otherwise
    An unreadable file that no Cell depends on is reported but does not change
    the exit code. `peft-harness explain gate` describes every kind of finding.
    """
    form = "--pairs" if pairs else "--baseline"
    _refuse_options_of_other_form(ctx, form)
    if pairs and (run is not None or baseline is not None):
        raise click.UsageError("--pairs runs both sides itself: remove RUN and --baseline")
    from harness.regression.outputs.files import Outputs

    outputs = Outputs(junit, markdown, annotations)
    mine = {name: rest[name] for name in _options_of(ctx, form)}
    if pairs:
        from harness.regression.pairs import gate as gate_pairs
        from harness.regression.pairs.request import PairsRequest

        canary, fresh = not mine.pop("no_canary"), not mine.pop("no_fresh")
        request = PairsRequest(*pairs, **mine, canary=canary, fresh=fresh, strict=strict, outputs=outputs)
        return gate_pairs.gate(request, as_json).exit
    if run is None or baseline is None:
        raise click.UsageError("give RUN and --baseline NAME, or --pairs OLD NEW")
    from harness.analysis.comparison.baseline_rows import Margins
    from harness.regression.baseline import gate as gate_baseline

    margins = Margins(mine["memory_bytes"], mine["accuracy_points"] / 100)
    return gate_baseline.gate(
        run, baseline, margins, outputs, as_json=as_json, all_rows=mine["all_rows"], strict=strict
    )


def _options_of(ctx: click.Context, form: str) -> list[str]:
    return [str(p.name) for p in ctx.command.params if isinstance(p, _OptionOf) and p.form == form]


def _refuse_options_of_other_form(ctx: click.Context, form: str) -> None:
    for option in ctx.command.params:
        given = ctx.get_parameter_source(str(option.name)) is ParameterSource.COMMANDLINE
        if isinstance(option, _OptionOf) and option.form != form and given:
            raise click.UsageError(f"{option.opts[0]} needs {option.form}")
