"""The command `import`: evaluate an adapter that another program trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from harness.cli import options
from harness.errors import Exit, UsageError
from harness.resources import user_path


@click.command("import", epilog="Example: peft-harness import ./outputs --task movie-sentiment")
@click.argument("folder")
@click.option(
    "--model", metavar="MODEL",
    help="The base: a folder, or a name of `list models`.  [default: base_model_name_or_path, if it is a folder]",
)  # fmt: skip
@click.option("--task", metavar="TASK", help="Task to score: a name or a .yaml file.  [default: nothing is scored]")
@click.option("--checkpoint", type=click.IntRange(0), metavar="N", help="Import checkpoint-N.  [default: the last]")
@click.option(
    "--items", type=click.IntRange(1), default=100, show_default=True, metavar="N", help="Test items to score."
)
@click.option(
    "--max-tokens",
    type=click.IntRange(4),
    default=64,
    show_default=True,
    metavar="N",
    help="Tokens to which longer texts are cut.",
)
@click.option(
    "--dtype", type=options.Choice(["float32", "bfloat16", "float16", "float64"]), default="float32", show_default=True,
    help="Dtype of the base.",
)  # fmt: skip
@click.option(
    "--beside",
    metavar="SUITE",
    help="Also run this suite, so that one table shows both; its first Cell sets model, task and items.",
)
@click.option("--only", metavar="EXPR", help="With --beside: run only the Cells that EXPR selects, as for `run`.")
@click.option("--out", type=options.PATH, metavar="DIR", help="Run folder.  [default: results/runs/<run id>]")
@options.device
@click.option(
    "--timeout", callback=options.finite_seconds, default=3600.0, show_default=True, metavar="SECONDS",
    help="Stop a Cell that takes longer than this.",
)  # fmt: skip
def import_(folder: str, out: Path | None, device: Any, timeout: float, **request: Any) -> Exit:
    """Evaluate an adapter that another program trained.

    FOLDER is what trl, Axolotl, LLaMA-Factory, ms-swift or Unsloth left: adapter_config.json and
    adapter_model.safetensors, in FOLDER or in its checkpoint-N, and trainer_state.json. Pickles are never opened.

    The file is judged first; if it does not conform, the exit code is 1. Then it is loaded by hf-peft, its logits are
    compared with those of the reference, and it is evaluated as a Cell of a new run, which `report` marks as imported.
    """
    from harness.runner.import_run import ImportRequest, import_run

    if request["only"] and not request["beside"]:
        raise UsageError("has no effect without --beside", where="--only", hint="add --beside SUITE")
    return import_run(ImportRequest(user_path(folder), **request), out=out, device=device, timeout=timeout)
