"""`bench --ceilings` and `bench --crossovers`: measure a GPU, here called a card.

A ceiling is the highest rate of the card, e.g. in bytes per second. A crossover is the size up to which a fused kernel
is faster than another way to compute an Operation. A tile is the part of a matrix product that one program of a kernel
computes. A worker process measures, and sends each number at once. If a kernel hangs, the earlier numbers are therefore
not lost. This module imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from harness.bench import files
from harness.bench.gpu import no_gpu, refuse_interpreter
from harness.console import align_columns, print_json, print_lines, print_note
from harness.errors import Exit, HarnessError, plural
from harness.kernels.card_tables import CROSSOVERS, TILES
from harness.process.signals import handle_termination
from harness.process.worker_pool import WorkerPool
from harness.records.environment import describe, threads

What = Literal["ceilings", "crossovers"]


@dataclass
class CardReport:
    """The measurements of one card or of the CPU."""

    what: What
    device: str
    environment: dict[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)
    """One dict per measurement, in order.

    Each ceiling has `name`, `value` and `unit`. With `--crossovers`, the rows of `harness.bench.tiles.measure` come
    first, and then the rows of `harness.bench.crossovers.measure`.
    """
    table: dict[str, Any] = field(default_factory=dict)
    """The card's crossovers and tiles, in the form that `harness.kernels` reads. Empty with `--ceilings`.

    Operations and dtypes whose measurement is not complete are missing.
    """
    file: str = ""
    """File name for `table`. Empty if `table` is empty."""
    card: str = ""
    """Name of the card, or empty for a CPU."""
    failed: str = ""
    """Reason why the worker ended early, or empty if it did not."""
    traceback: str = ""

    @property
    def is_rehearsal(self) -> bool:
        """True if Triton's interpreter ran the kernels. The times then say nothing about a card."""
        return self.what == "crossovers" and self.device == "cpu"

    @property
    def exit(self) -> Exit:
        """The exit code: 4 if the worker failed, 5 if nothing was measured, else 0."""
        if self.failed:
            return Exit.INFRASTRUCTURE
        return Exit.PASS if self.rows else Exit.NOTHING_COMPARED

    def document(self) -> dict[str, Any]:
        """Return the document that `--json` prints."""
        start = {"schema": files.SCHEMA, "kind": self.what, "exit": int(self.exit)}
        found = {"found": findings(self.table)} if self.what == "crossovers" else {}
        return {**start, **vars(self), "is_rehearsal": self.is_rehearsal, **found}

    def lines(self) -> list[str]:
        """Return the numbers as a table of text."""
        place = self.card or "the CPU"
        if self.what == "ceilings":
            table = [[row["name"], rate(row["value"], row["unit"])] for row in self.rows]
            return [f"highest rates of {place}:", *align_columns(table)]
        note = ["a rehearsal: Triton's interpreter ran the kernels, and these times mean nothing"] * self.is_rehearsal
        rows = align_columns([COLUMNS, *map(fields, self.rows)])
        return [f"fused kernels compared with other ways, on {place}:", *rows, *findings(self.table), *note]


COLUMNS = [
    "operation",
    "weight",
    "size",
    "case",
    "A: fused, or default tile",
    "B: other way, or chosen tile",
    "A / B",
]
"""Titles of the columns of the printed table of crossovers and tiles."""


def fields(row: dict[str, Any]) -> list[str]:
    """Return the texts of a row of crossovers or tiles, one for each of `COLUMNS`."""
    ratio = f"{row['ratio']:.2f}"
    if row["operation"] == "tile":
        default, chosen = (short_tile(row[name]) for name in ("default", "tile"))
        other = "none is faster" if chosen == default else chosen
        return ["tile", f"{row['N']}x{row['K']}", f"rows {row['M']}", row["dtype"], default, other, ratio]
    name = CROSSOVERS[row["operation"]]
    size, times = (
        f"{name.replace('_', ' ')} {row[name]}",
        (f"{1e6 * row[way]:,.1f} us" for way in ("fused_s", "other_s")),
    )
    return [row["operation"], f"{row['E']}x{row['D']}", size, row["case"], *times, ratio]


def short_tile(tile: dict[str, int]) -> str:
    """Return a tile as text, such as `128x256x64, 8 warps, 3 stages`."""
    return f"{tile['m']}x{tile['n']}x{tile['k']}, {tile['warps']} warps, {tile['stages']} stages"


def findings(table: dict[str, Any]) -> list[str]:
    """Return one line per section of a card's table.

    The lines show the crossovers of each Operation, and the number of tiles that differ from the default.
    """
    said = []
    for operation, size in CROSSOVERS.items():
        if operation in table:
            said.append(
                f"{operation}: {', '.join(_limit(row['E'], row[size], size) for row in table[operation]['rows'])}"
            )
    if TILES in table:
        changed, shapes = len(table[TILES]["rows"]), plural(table[TILES]["shapes"], "shape")
        said.append(f"tiles: for {changed} of {shapes} another tile is faster than the default")
    return said


def _limit(E: int, most: int | None, size: str) -> str:
    """Return a crossover as text, such as `fused up to rank 63 if E >= 4096`.

    E: number of output features. most: largest size at which the fused kernel is used; None for no limit. size: name of
    this size, e.g. `rank`.
    """
    one = f"rank {most}" if size == "rank" else f"{most} {size.replace('_', ' ')}"
    limit = "never fused" if most == 0 else "always fused" if most is None else f"fused up to {one}"
    return f"{limit} if E >= {E}"


def rate(value: float, unit: str) -> str:
    """Format a rate: bytes per second in GB/s, FLOP/s in TFLOP/s."""
    return f"{value / 1e9:,.0f} GB/s" if unit == "B/s" else f"{value / 1e12:.3g} T{unit}"


def measure(
    what: What, device: Literal["auto", "cpu", "cuda"], patience: float, as_json: bool, out: Path | None
) -> Exit:
    """Measure the GPU or the CPU, print the numbers, and return the exit code.

    patience: the worker is killed if it sends nothing for this many seconds. out: folder for the result files, which
    are a JSON file with all numbers and, for a GPU, the table that `harness.kernels` reads. Raises HarnessError if a
    GPU was requested and there is none. Raises UsageError under Triton's interpreter.
    """
    refuse_interpreter()
    why = no_gpu() if device != "cpu" else "a CPU was requested"
    if device == "cuda" and why:
        raise HarnessError(why, where="--device cuda", hint="without it, the CPU is measured")
    place = "cpu" if why else "cuda"
    report = CardReport(what, place, describe(threads()).model_dump(mode="json"))
    with handle_termination():
        try:
            for event in WorkerPool().events("harness.bench.card_worker", {"what": what, "device": place}, patience):
                _add(report, event)
        except KeyboardInterrupt:
            report.failed = "interrupted"
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        files.write(out / f"{what}.json", report.document())
        if report.table and report.card:
            files.write(out / report.file, report.table)
    if as_json:
        print_json(report.document())
    else:
        print_lines(report.lines())
    if report.failed:
        print_note(f"stopped: {report.failed}")
    return report.exit


def _add(report: CardReport, event: dict[str, Any]) -> None:
    if "row" in event:
        report.rows.append(event["row"])
    elif "card" in event:
        report.card = event["card"]
    elif "table" in event:
        report.file, report.table = event["file"], event["table"]
    elif "failed" in event:
        report.failed, report.traceback = event["failed"], event["traceback"]
    elif "died" in event:
        report.failed = report.failed or event["died"]
