"""The command `bench`: compare the speed of our kernels with that of other implementations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from harness.analysis.statistics.intervals import fewest_with_interval
from harness.bench.sizes import SHAPES
from harness.bench.steps import FORMER_NAMES, Backbone
from harness.cli import options
from harness.console import print_note
from harness.errors import Exit, UsageError


@click.command()
@click.option("--op", "operations", multiple=True, metavar="O", help=f"Time only this operation. {options.AGAIN}")
@click.option(
    "--step", "steps", multiple=True, metavar="S",
    help=f"Time a whole training step of this method, e.g. `lora` or `lora on nf4`; `all` for every one. {options.AGAIN}",
)  # fmt: skip
@click.option(
    "--vs", multiple=True, metavar="IMPLEMENTATION",
    help=f"Compare with this implementation only. {options.AGAIN}  [default: all others]",
)  # fmt: skip
@click.option(
    "--shapes", type=options.Choice(SHAPES), default="small", show_default=True,
    help="Sizes of the linear layers: small ones, or those of Llama-3-8B or Llama-3-70B.",
)  # fmt: skip
@click.option(
    "--layers", type=click.IntRange(1, 100), default=Backbone.layers, show_default=True,
    help="Layers of the model in a training step.",
)  # fmt: skip
@click.option(
    "--dtype", "dtypes", multiple=True, metavar="D",
    help=f"Dtype to time. {options.AGAIN}  [default: float32 on a CPU, bfloat16 on a GPU]",
)  # fmt: skip
@click.option(
    "--pairs", type=click.IntRange(fewest_with_interval(), 10_000), default=12, show_default=True,
    help=f"Pairs of samples, taken alternately from both implementations. A 95 % interval needs {fewest_with_interval()}.",
)  # fmt: skip
@click.option(
    "--patience", callback=options.finite_seconds, default=900.0, show_default=True, metavar="SECONDS",
    help="Kill a process that reports no result for this long.",
)  # fmt: skip
@click.option("--ceilings", is_flag=True, help="Measure the highest rates instead: copy, read and matrix products.")
@click.option(
    "--crossovers", is_flag=True,
    help="Measure instead the sizes up to which our fused kernels are faster, and the fastest tiles of their matrix "
    "products. --out writes the table that the kernels read on this card.",
)  # fmt: skip
@options.device
@click.option("--out", type=options.FOLDER, metavar="DIR", help="Also write one JSON file per benchmark.")
@click.option(
    "--export-pytest-benchmark", "export", type=options.FILE, metavar="FILE",
    help="Also write a file for `pytest-benchmark compare`.",
)  # fmt: skip
@options.as_json
def bench(
    operations: tuple[str, ...], steps: tuple[str, ...], vs: tuple[str, ...], shapes: str, layers: int,
    dtypes: tuple[str, ...], pairs: int, patience: float, ceilings: bool, crossovers: bool, device: Any,
    out: Path | None, export: Path | None, as_json: bool,
) -> Exit:  # fmt: skip
    """Compare the speed of `fused` with other implementations.

    Without --op and --step, times every operation that has benchmark sizes. Prints a speed only if both implementations
    pass the checks on the timed call. Ctrl-C, SIGTERM or SIGHUP stops the benchmarks: finished ones are saved and printed,
    and the exit code is 4.
    """
    if ceilings or crossovers:
        if (ceilings and crossovers) or operations or steps or vs or dtypes or export:
            what, where = "measures the card, and no operation", "--ceilings" if ceilings else "--crossovers"
            raise UsageError(what, where=where, hint="give only --device, --patience, --out and --json with it")
        from harness.bench import card

        return card.measure("ceilings" if ceilings else "crossovers", device, patience, as_json, out)
    from harness.bench import run
    from harness.bench.planning import BenchRequest

    for former in FORMER_NAMES.keys() & steps:
        print_note(f"--step {former}: this step is now called `{FORMER_NAMES[former]}`")
    names = [FORMER_NAMES.get(step, step) for step in steps]
    backbone = Backbone(layers=layers)
    wanted = BenchRequest(operations, vs, names, shapes, dtypes, pairs, device, backbone=backbone, patience=patience)
    return run.bench(wanted, as_json, out, export)
