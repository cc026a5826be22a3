"""The command `peft-harness`: verbs and options only. stdout is data, stderr is talk.

Imports are inside the verbs, so that `--help` answers at once. Errors come out here, by `last_words`.
"""

from __future__ import annotations

import io
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from harness.cli import gate as gate_verbs
from harness.cli import options
from harness.cli.claims import claims
from harness.cli.history import history
from harness.console import bug, fail, say, silence
from harness.errors import Exit, HarnessError, UsageError

_KINDS = ("methods", "implementations", "suites", "models", "tasks", "checks", "claims", "measures")


def _finite(_: click.Context, __: click.Parameter, value: float) -> float:
    """Refuse what click's FloatRange lets through: neither NaN nor infinity is a time that can be waited for."""
    if not 0 < value < math.inf:
        raise click.BadParameter(f"{value:g} is not a number of seconds above 0, e.g. 3600")
    return value


class _Verbs(click.Group):
    def invoke(self, ctx: click.Context) -> Any:
        """Run a verb; click itself would exit with 1, a finding, when the reader of stdout has left."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            silence()
            return Exit.INFRASTRUCTURE


@click.group(
    cls=_Verbs,
    commands=[gate_verbs.gate, gate_verbs.baseline, history, claims],
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(package_name="peft-harness", message="%(prog)s %(version)s")
def verbs() -> None:
    """Conformance and benchmarking of parameter-efficient fine-tuning: is it the same thing, what does it cost, what
    does it score?

    \b
    Exit codes:
      0  pass                        3  inconclusive (with --strict)
      1  a finding                   4  not measured, interrupted, or the machine failed
      2  wrong use, invalid suite    5  nothing was measured or compared
    `peft-harness explain 4` says more, for every code.
    """


@verbs.command("list")
@click.argument("kinds", nargs=-1, type=click.Choice(_KINDS), metavar=f"[{'|'.join(_KINDS)}]...")
@options.as_json
def list_(kinds: tuple[str, ...], as_json: bool) -> Exit:
    """List what a suite can name.

    Everything, or only the kinds given.
    """
    from harness.cli.listing import as_text, listing

    document = listing(kinds)
    say(json.dumps(document, indent=1) if as_json else as_text(document))
    return Exit.PASS


@options.only
@verbs.command()
@click.argument("suite")
@options.as_json
def plan(suite: str, only: str | None, as_json: bool) -> Exit:
    """Check a suite and print its Cells.

    Trains nothing. SUITE is a name or a .yaml file. Memory is predicted from the models' shapes, where these are here.
    Times are those of the newest Record of the same Cell in results/runs; nothing is guessed.
    """
    from harness.cli import plan as planning
    from harness.suites import expand, loader, model_checks

    read = loader.load(suite)
    cells = expand.only(read.plan, only) if only is not None else read.plan
    model_checks.refuse(read, cells)
    document = planning.planning(read, cells, predicted=planning.predictions(read, cells))
    say(json.dumps(document, indent=1) if as_json else planning.as_text(document))
    return Exit.PASS


@verbs.command()
@click.argument("model")
@click.option("--memory", required=True, metavar="SIZE", help="Of the device, e.g. 24GiB or 24GB: these are two sizes.")
@click.option("--method", "methods", multiple=True, metavar="M", help="Only this method; may be given again.")
@click.option("--base", "bases", multiple=True, metavar="B", help="none, nf4 or nf4-dq; may be given again.  [all]")
@click.option(
    "--optimizer", "optimizers", multiple=True, metavar="O",
    help="adamw, adamw-8bit, paged-adamw or paged-adamw-8bit; may be given again.  [adamw]",
)  # fmt: skip
@click.option(
    "--target", "targets", multiple=True, metavar="LAYER", help="[every linear layer but the output's]; again."
)
@click.option("--rank", "ranks", multiple=True, type=int, metavar="R", help="[1, 2, 4 ... 256]; may be given again.")
@click.option("--tokens", type=int, metavar="N", help="Of each text.  [512, or what the model reads]")
@click.option("--dtype", default="bfloat16", show_default=True, metavar="D", help="Of weights and adapter.")
@click.option("--checkpointing", is_flag=True, help="Keep only the inputs of blocks, and compute them again.")
@click.option("--layerwise", is_flag=True, help="Layer-wise updates, by methods that train the model's own weights.")
@click.option("--formulas", is_flag=True, help="By formulas alone: in seconds, and some rows a fifth off.")
@options.as_json
def fit(
    model: str, memory: str, methods: tuple[str, ...], bases: tuple[str, ...], optimizers: tuple[str, ...],
    targets: tuple[str, ...], ranks: tuple[int, ...], tokens: int | None, dtype: str, checkpointing: bool, layerwise: bool,
    formulas: bool, as_json: bool,
) -> Exit:  # fmt: skip
    """Predict what fits into a memory.

    For each method and base, the largest rank x batch, and what its memory is made of. Nothing is trained or fetched: what
    fits is told by training steps on tensors without data, of code that runs.
    MODEL is a shape of the papers (llama-7b ... llama-65b, llama-3-8b, llama-3-70b, gpt-3-175b-shape), a name that
    `peft-harness list models` shows, a folder with config.json, or a repository in the hub's cache.
    """
    from harness.memory_model import fit as fitted
    from harness.memory_model import fit_checks
    from harness.report import fit_table

    asked = fitted.ask(
        model, memory, methods, bases=bases, optimizers=optimizers, targets=targets, ranks=ranks, tokens=tokens,
        dtype=dtype, checkpointing=checkpointing, layerwise=layerwise,
    )  # fmt: skip
    counted = fitted.counts(asked)
    document = fitted.answer(asked, counted)
    if not formulas:
        document = fit_checks.checked(asked, counted, document)
    say(json.dumps(document, indent=1) if as_json else fit_table.as_text(document))
    return Exit.PASS


@options.only
@verbs.command()
@click.argument("suite")
@click.option("--out", type=click.Path(path_type=Path), metavar="DIR", help="Run folder [results/runs/<run>].")
@click.option("--resume", metavar="RUN", help="Go on with this run; Cells with an ok Record are not run again.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option(
    "--timeout", callback=_finite, default=3600.0, show_default=True, metavar="SECONDS", help="For each Cell."
)
@click.option("--strict", is_flag=True, help="Exit with 3 if a question stays open.")
@click.option("--executor", type=click.Choice(["local", "ray", "slurm"]), default="local", show_default=True)
@click.option(
    "--jobs", type=click.IntRange(1, 10_000), metavar="N", help="Cells at a time.  [local: 1; else: what there is]"
)
@click.option("--slurm", multiple=True, metavar="KEY=VALUE", help="An option of sbatch, e.g. gres=gpu:1; again.")
def run(suite: str, only: str | None, executor: str, jobs: int | None, slurm: tuple[str, ...], **asked: Any) -> Exit:
    """Run a suite and report it.

    SUITE is a name or a .yaml file. Each Cell runs in a process of its own; of several at a time (--jobs), each has its
    share of the cores, or a GPU for itself. Ray is found by RAY_ADDRESS; without it one is started here. Ctrl-C, SIGTERM
    or SIGHUP keeps what was finished, reports it and exits with 4.
    """
    from harness.runner import executors
    from harness.runner.run import run_suite

    return run_suite(suite, only=only, executor=executors.choose(executor, jobs, slurm), **asked)


@verbs.command()
@click.argument("runs", nargs=-1, required=True, metavar="RUN...")
@click.option("-o", "--out", type=click.Path(path_type=Path, dir_okay=False), help="[report.html in the first run]")
@click.option("--strict", is_flag=True, help="Exit with 3 if a question stays open.")
def report(runs: tuple[str, ...], out: Path | None, strict: bool) -> Exit:
    """Write the HTML report of runs.

    Prints their summaries. RUN is a folder, an id, the start of an id, or `latest`. Of several runs it compares the
    losses of the Cells that they share, bit by bit. Exits with the most serious verdict, of a run or of that comparison:
    1 for a difference without a named cause, 5 if no Cell was repeated.
    """
    from harness.analysis import verdict
    from harness.analysis.comparison import reproducibility
    from harness.records import store
    from harness.report import html, reruns, terminal

    read = [store.read_run(store.find_run(name)) for name in runs]
    page = html.page_path(out or read[0].path / "report.html")
    html.write_report(read, page)
    for one in read:
        say("\n".join(terminal.summary(one)))
    codes = [verdict.judge(one, strict=strict).exit for one in read]
    if reruns.asked(read):
        say("\n".join(reruns.lines(read)))
    again = reproducibility.reruns(read)
    if again or len(read) > 1:
        codes.append(reproducibility.judge(again, strict=strict))
    say(f"report: {page}")
    return min(codes, key=_SERIOUS.index)


@verbs.command()
@click.argument("runs", nargs=-1, required=True, metavar="RUN...")
@click.option("--format", "form", type=click.Choice(["parquet", "csv"]), required=True)
@click.option("--out", type=click.Path(path_type=Path), metavar="DIR", help="[export-FORMAT in the first run]")
def export(runs: tuple[str, ...], form: Any, out: Path | None) -> Exit:
    """Write the numbers of runs as tables.

    RUN is what `report` takes. The tables are cells, samples, items and checks, a file each, and columns, which says what
    theirs mean. DIR must be empty or new. Names what had to be left out, and then exits with 1 (changed after its run) or
    4 (unreadable, missing); with 5 where there is nothing to export. `harness.load` gives the same tables to a notebook.
    """
    from harness.cli import export as command

    return command.export(runs, form, out)


@verbs.command()
@click.argument("implementations", nargs=-1)
@click.option("--method", "methods", multiple=True, metavar="M", help="Only this method; may be given again.")
@click.option("--op", "operations", multiple=True, metavar="O", help="Only this operation; may be given again.")
@click.option("--dtype", "dtypes", multiple=True, metavar="D", help="Only this dtype; may be given again.")
@click.option("--full", is_flag=True, help="Every config x shape x layer, instead of each at least once.")
@click.option(
    "--drawn",
    type=click.IntRange(0, 100_000),
    default=0,
    metavar="N",
    help="Besides, N cases of each suite with ranks and shapes drawn at random ...",
)
@click.option("--seed", type=click.IntRange(0), metavar="S", help="... by this seed.  [0]")
@click.option("--jobs", type=click.IntRange(1, 256), help="Processes at a time.  [the cores, at most 8]")
@click.option(
    "--patience",
    callback=_finite,
    default=120.0,
    show_default=True,
    metavar="SECONDS",
    help="Without a result for so long, an implementation hangs.",
)
@click.option(
    "--junit", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE", help="Write a JUnit XML file."
)
@click.option("--html", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE", help="Write a page.")
@click.option("--self-test", is_flag=True, help="Check the checks instead: does each planted fault show?")
@options.as_json
def check(
    implementations: tuple[str, ...],
    methods: tuple[str, ...],
    operations: tuple[str, ...],
    dtypes: tuple[str, ...],
    full: bool,
    drawn: int,
    seed: int | None,
    jobs: int | None,
    patience: float,
    junit: Path | None,
    html: Path | None,
    self_test: bool,
    as_json: bool,
) -> Exit:
    """Check implementations against the reference.

    All of them on all that this machine can run, if nothing is named. The reference is computed in float64. Each
    plug-in runs in a process of its own; one that crashes or hangs is a failure, and the rest goes on. Ctrl-C or
    SIGTERM prints what was found so far and exits with 4, as does an implementation named here that cannot be tried.
    """
    if self_test:
        if implementations or methods or operations or dtypes or full or drawn or seed is not None or junit or html:
            raise UsageError(
                "--self-test tries every planted fault and only prints",
                where="--self-test",
                hint="leave everything else out but --json",
            )
        from harness.conformance import self_test as planted

        return planted.check(as_json)
    from harness.cli import check as command
    from harness.conformance.case_selection import CaseSelection

    if seed is not None and not drawn:
        raise UsageError("--seed draws nothing", where="--seed", hint="say how many cases are to be drawn: --drawn 50")
    breadth = CaseSelection(full, drawn, seed or 0)
    asked = command.CheckRequest(implementations, methods, operations, dtypes, breadth, jobs, patience)
    return command.check(asked, as_json, junit, html)


@verbs.command()
@click.option("--op", "operations", multiple=True, metavar="O", help="Only this operation; may be given again.")
@click.option("--step", "steps", multiple=True, metavar="S", help="A training step, e.g. `lora`, or `all`; again.")
@click.option("--vs", multiple=True, metavar="IMPLEMENTATION", help="Whom to compare with; may be given again.")
@click.option("--shapes", type=click.Choice(["small", "8b", "70b"]), default="small", show_default=True)
@click.option("--dtype", "dtypes", multiple=True, metavar="D", help="[float32; bfloat16 on a GPU]; may be given again.")
@click.option("--pairs", type=click.IntRange(5, 10_000), default=12, show_default=True, help="Of samples, in turn.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option(
    "--out", type=click.Path(path_type=Path, file_okay=False), metavar="DIR", help="Write a JSON file per benchmark."
)
@click.option(
    "--export-pytest-benchmark", "export", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE",
    help="Write what `pytest-benchmark compare` reads.",
)  # fmt: skip
@options.as_json
def bench(
    operations: tuple[str, ...],
    steps: tuple[str, ...],
    vs: tuple[str, ...],
    shapes: str,
    dtypes: tuple[str, ...],
    pairs: int,
    device: Any,
    out: Path | None,
    export: Path | None,
    as_json: bool,
) -> Exit:
    """Time `fused` against the others.

    Every operation that has sizes, if nothing is named; `--step` times whole training steps instead. Both programs must
    first pass the checks on the very call that is timed, or no speed is printed. The shapes are the linear layers of
    Llama-3-8B and 70B, or small ones. Ctrl-C, SIGTERM or SIGHUP keeps and prints what was measured and exits with 4.
    """
    from harness.bench.planning import BenchRequest
    from harness.cli import bench as command

    return command.bench(BenchRequest(operations, vs, steps, shapes, dtypes, pairs, device), as_json, out, export)


@verbs.command()
@options.as_json
def doctor(as_json: bool) -> Exit:
    """Say what can run here, and why not."""
    from harness.cli import doctor as doctor_

    return doctor_.report(as_json)


@verbs.command()
@click.argument("name")
def explain(name: str) -> Exit:
    """Explain a name.

    A method, a key of its config, an operation, a check, a known defect, a claim, a measure, an error, an exit code, a
    status, a part of what `fit` predicts, or a word of the README. `peft-harness explain claims` shows how a claim
    file is written.
    """
    from harness.cli.explain import explain as explained

    say(explained(name))
    return Exit.PASS


# A finding stands whatever else is missing; see analysis.verdict.
_SERIOUS = (Exit.FAIL, Exit.NOTHING_COMPARED, Exit.INFRASTRUCTURE, Exit.INCONCLUSIVE, Exit.PASS)


def launch(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    sys.excepthook = bug  # Python's own would exit with 1, which says that something was found
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # an ASCII terminal is no reason to crash
    try:
        code = int(verbs.main(args=argv, prog_name="peft-harness", standalone_mode=False) or 0)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        code = Exit.USAGE
    except click.Abort:  # Ctrl-C
        code = fail(HarnessError("interrupted", hint="what was finished is kept"))
    except click.UsageError as error:
        path = error.ctx.command_path if error.ctx and error.ctx.parent else "peft-harness"  # e.g. of `history add`
        verb = path.removeprefix("peft-harness").strip()
        hint = f"see `{path} --help`"
        said = " ".join(error.format_message().split())  # click lists choices on lines of their own
        code = fail(UsageError(said, where=verb, hint=hint))
    except HarnessError as error:
        code = fail(error)
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        silence()
    return code
