"""The command `check`: test implementations, adapter files, loops and model servers against the reference."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import click

from harness.cli import options
from harness.cli.env import index, index_options
from harness.errors import Exit, UsageError
from harness.resources import user_path


@click.command()
@click.argument("implementations", nargs=-1)
@click.option("--method", "methods", multiple=True, metavar="M", help=f"Check only this method. {options.AGAIN}")
@click.option("--op", "operations", multiple=True, metavar="O", help=f"Check only this operation. {options.AGAIN}")
@click.option("--dtype", "dtypes", multiple=True, metavar="D", help=f"Check only this dtype. {options.AGAIN}")
@click.option(
    "--case", metavar="TEXT",
    help="Check only cases whose name and dtype contain this text, e.g. 'rank=160 bfloat16'.",
)  # fmt: skip
@click.option(
    "--check", "checks", multiple=True, metavar="C", help=f"Run only this check, e.g. gradient. {options.AGAIN}"
)
@click.option(
    "--full", is_flag=True,
    help="Check every combination of config, shape and layer, and all of --wide.  [default: each one at least once]",
)  # fmt: skip
@click.option(
    "--wide", is_flag=True,
    help="Run all checks in every example, including other ways to call a layer, random sequences of calls, and NaN. Also "
    "check a fixed sample of pairs of settings.",
)  # fmt: skip
@click.option(
    "--drawn", type=click.IntRange(0, 100_000), default=0, show_default=True, metavar="N",
    help="Also check N random cases per parity suite, and all of --wide; reduce each failure to a small case.",
)  # fmt: skip
@click.option("--seed", type=click.IntRange(0), metavar="S", help="Random seed of --drawn.  [default: 0]")
@click.option(
    "--shard", callback=options.shard, default="1/1", metavar="K/N",
    help="Check only the cases of shard K of N, e.g. 2/4. Each case is in exactly one shard, so shards 1/N to N/N together "
    "try every case. No shard reports a known defect that no longer shows.",
)  # fmt: skip
@click.option(
    "--base-model", metavar="[NAME=]FOLDER",
    help="For an adapter file: the folder of its base model.  [default: base_model_name_or_path, if it is a folder] With "
    "--served: also its name on the server.",
)  # fmt: skip
@click.option(
    "--device", type=options.Choice(["cpu", "cuda"]), default="cpu", show_default=True,
    help="Device of the tensors. On cuda, `fused` runs its Triton kernels.",
)  # fmt: skip
@options.jobs
@click.option(
    "--patience", callback=options.finite_seconds, default=120.0, show_default=True, metavar="SECONDS",
    help="Stop an implementation, or a request to a server, that gives no result for this long.",
)  # fmt: skip
@click.option(
    "--served", metavar="URL",
    help="Check a model server with the OpenAI completions API instead, e.g. http://127.0.0.1:8000.",
)  # fmt: skip
@click.option(
    "--adapter", "adapters", multiple=True, metavar="[NAME=]DIR",
    help=f"With --served: folder of an adapter, and its name on the server.  [default: the folder's name] {options.AGAIN}",
)  # fmt: skip
@click.option(
    "--concurrency", type=click.IntRange(1, 256), metavar="N",
    help="With --served: largest number of requests at the same time.  [default: 8]",
)  # fmt: skip
@click.option(
    "--echo", is_flag=True, help="With --served: also compare the log-probabilities of the prompts' own tokens."
)
@click.option(
    "--with", "environments", multiple=True, metavar="ENVIRONMENT",
    help="Check in the environment with this version, e.g. peft==0.19.1, or of this name (`env list`). Repeat it to compare "
    "versions.",
)  # fmt: skip
@click.option(
    "--loop", metavar="LOOP",
    help="Check a training loop instead, e.g. `trl`: compare its SFTTrainer with the harness's own loop, and find the "
    "settings that change training.",
)  # fmt: skip
@index_options
@options.junit
@options.html
@click.option(
    "--self-test", is_flag=True,
    help="Test the checks themselves, or with --loop those of loops: each planted fault must be detected.",
)  # fmt: skip
@click.option(
    "--mutants", type=click.IntRange(0), is_flag=False, flag_value=0, metavar="[N]",
    help="With --self-test: instead of planted faults, try N random changes of the reference and of our kernels; without N, "
    "try all changes.",
)  # fmt: skip
@click.option(
    "--power", is_flag=True,
    help="With --self-test: print the smallest wrong scaling and the fewest extra roundings that each check notices.",
)  # fmt: skip
@options.as_json
def check(
    implementations: tuple[str, ...], methods: tuple[str, ...], operations: tuple[str, ...], dtypes: tuple[str, ...],
    case: str | None, checks: tuple[str, ...], full: bool, wide: bool, drawn: int, seed: int | None, shard: tuple[int, int],
    base_model: str | None,
    device: Literal["cpu", "cuda"], jobs: int | None, patience: float,
    served: str | None, adapters: tuple[str, ...], concurrency: int | None, echo: bool, environments: tuple[str, ...],
    loop: str | None, offline: bool, find_links: tuple[str, ...], junit: Path | None, html: Path | None, self_test: bool,
    mutants: int | None, power: bool, as_json: bool,
) -> Exit:  # fmt: skip
    """Check implementations against the reference, or judge one adapter file or a model server.

    IMPLEMENTATIONS are names, or the path of one adapter: a folder with adapter_config.json, or its
    adapter_model.safetensors. The file is judged without running a loader. If it conforms to a base, the logits of HF peft,
    or of the loaders that are named beside the path, are compared with those of the reference.

    Without arguments, checks every implementation that this machine can run; the reference only if an option chooses cases
    or dtypes, or if no other implementation remains. The reference is computed in float64. Each plug-in runs in its own
    process: a crash or a hang counts as a failure, and the other plug-ins continue. The exit code is 1 if a check fails or
    a plug-in cannot be imported, and 4 if no check of a named IMPLEMENTATION can run. Ctrl-C or SIGTERM prints the results
    so far and exits with 4. With --with, the same checks run once per environment, and the output shows which results
    differ. An environment that does not exist is made first.
    """
    if device == "cuda" and (served or loop or self_test or any(map(_is_adapter_path, implementations))):
        raise UsageError("applies to implementations only", where="--device", hint="leave it out")
    if (offline or find_links) and not environments:
        option = "--offline" if offline else "--find-links"
        raise UsageError("has no effect without --with", where=option, hint="add --with LIBRARY==VERSION")
    is_part = shard != (1, 1)
    selection = (checks, case is not None, full, wide, drawn, is_part)
    if loop is not None:
        names = (implementations, methods, operations, dtypes, served, adapters, base_model)
        if any(
            (
                *names,
                *selection,
                jobs,
                echo,
                concurrency,
                power,
                seed is not None,
                mutants is not None,
                len(environments) > 1,
                self_test and any((environments, junit, html)),
            )
        ):
            raise UsageError(
                "checks a training loop, not an implementation", where="--loop",
                hint="it takes one --with, --offline, --find-links, --patience, --html, --junit and --json; or --self-test "
                "and --json",
            )  # fmt: skip
        if self_test:
            from harness.cell.loop_checks import self_test as of_loops

            return of_loops.check(as_json)
        from harness.cli import check_loop

        return check_loop.check(loop, "".join(environments), index(offline, find_links), patience, as_json, junit, html)
    if served is not None:
        of_implementations = (
            implementations,
            methods,
            operations,
            *selection,
            jobs,
            environments,
            junit,
            html,
        )
        if any(of_implementations) or self_test or power or mutants is not None:
            raise UsageError(
                "checks a server, not an implementation", where="--served",
                hint="it takes --adapter, --base-model, --dtype, --concurrency, --echo, --patience, --seed and --json",
            )  # fmt: skip
        if not adapters or base_model is None:
            raise UsageError(
                "needs --adapter and --base-model", where="--served",
                hint="--adapter DIR --base-model FOLDER with what the server loads",
            )  # fmt: skip
        from harness.cli import check_served

        return check_served.check(
            check_served.ServedRequest(
                served, adapters, base_model, dtypes, concurrency or 8, patience, echo, seed or 0
            ),
            as_json,
        )
    for option, value in (("--adapter", adapters), ("--concurrency", concurrency), ("--echo", echo)):
        if value:
            raise UsageError("has no effect without --served", where=option, hint="add --served URL")
    for option, given in (("--mutants", mutants is not None), ("--power", power)):
        if given and not self_test:
            raise UsageError("has no effect without --self-test", where=option, hint="add --self-test")
    if self_test:
        if any((implementations, dtypes, *selection, junit, html, environments)):
            raise UsageError(
                "tests the checks, not an implementation", where="--self-test",
                hint="remove all options but --json; --mutants and --power also take --method, --op and --jobs",
            )  # fmt: skip
        targets = (*methods, *operations)
        if power:
            if mutants is not None or seed is not None:
                raise UsageError("makes no random choices", where="--power", hint="remove --mutants and --seed")
            from harness.conformance import power as measurement

            return measurement.check(jobs, targets, as_json)
        if mutants is None:
            if targets or seed is not None:
                raise UsageError(
                    "tries every planted fault", where="--self-test",
                    hint="add --mutants, or remove all options but --json",
                )  # fmt: skip
            from harness.conformance import self_test as planted

            return planted.check(as_json)
        from harness.conformance.mutants import run

        return run.check(mutants or None, seed or 0, jobs, targets, as_json)
    for name in implementations:
        if name.endswith(".py"):
            raise UsageError(
                "is a Python file, not an implementation",
                where=name,
                hint="decorate a function in it with @conformance of harness.testing and run pytest, or register the "
                "function with @implements and an entry point (`peft-harness explain plug-in`)",
            )
    if paths := [one for one in implementations if _is_adapter_path(one)]:
        unfit = {
            "--method": methods, "--op": operations, "--dtype": dtypes, "--case": case is not None,
            "--check": checks, "--full": full, "--wide": wide, "--drawn": drawn, "--seed": seed is not None,
            "--shard": is_part, "--with": environments, "--html": html, "a second path": paths[1:],
        }  # fmt: skip
        for option in (name for name, value in unfit.items() if value):
            raise UsageError(
                "does not apply to an adapter file",
                where=option,
                hint="it takes names of loaders, --base-model, --patience, --json and --junit",
            )
        from harness.cli import adapter
        from harness.records.files import refuse_unwritable

        refuse_unwritable({"--junit": junit})
        loaders = [one for one in implementations if one not in paths]
        folder = None if base_model is None else user_path(base_model)
        return adapter.check(user_path(paths[0]), folder, loaders, patience, as_json, junit)
    if base_model is not None:
        raise UsageError(
            "has no effect without the path of an adapter", where="--base-model", hint="add the path, or --served URL"
        )
    from harness.cli import check_run as command
    from harness.conformance.case_selection import CaseSelection

    if seed is not None and not drawn:
        raise UsageError(
            "has no effect without --drawn", where="--seed", hint="add the number of cases, e.g. --drawn 50"
        )
    if case == "":
        raise UsageError(
            "is empty, and so would select every case", where="--case", hint="e.g. --case 'rank=160 bfloat16'"
        )
    if is_part and drawn:
        raise UsageError(
            "has no effect on --drawn", where="--shard", hint="leave it out, and give each machine a --seed"
        )
    breadth = CaseSelection(full, drawn, seed or 0, wide, case or "", checks, shard=shard)
    request = command.CheckRequest(
        implementations,
        methods,
        operations,
        dtypes,
        breadth,
        jobs,
        patience,
        environments,
        device,
        index(offline, find_links),
    )
    return command.check(request, as_json, junit, html)


def _is_adapter_path(argument: str) -> bool:
    """Return whether an argument is the path of an adapter, and not the name of an implementation.

    A path contains a slash, ends with .safetensors, or is a folder that holds an adapter.
    """
    files = (Path(argument) / name for name in ("adapter_config.json", "adapter_model.safetensors"))
    return "/" in argument or argument.endswith(".safetensors") or any(file.is_file() for file in files)
