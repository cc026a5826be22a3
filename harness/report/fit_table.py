"""Text output of `fit`: a row for each Method, base and optimizer, then exceptions, then one line of explanation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from harness.analysis.grouping import group
from harness.console import align_columns, terminal_width
from harness.memory_model.size_units import UNITS, MemorySize
from harness.report.formatting import short_count

_PARTS = ("weights", "adapter", "gradients", "optimizer", "activations", "logits")
_RESULTS = ("needed", "free", "host")
_SIZES = (*_PARTS, "other", *_RESULTS)
"""Columns of sizes. The parts and `other` add up to `needed`."""
_OPTIONAL = ("activations", "logits", "other", "host")
"""Columns that are left out if they have no values."""
_TEXTS = ("method", "base", "optimizer")
"""Columns that are aligned to the left."""
_Row = Mapping[str, Any]
_Write = Callable[[_Row], str]


def lines(document: Mapping[str, Any]) -> list[str]:
    """Format the JSON document of `fit` as lines of text."""
    size = MemorySize(document["memory_B"], document["unit"])
    possible = [row for row in document["rows"] if row["ledger"] is not None]
    refused = [f"  {row['method']}: {row['because']}" for row in document["rows"] if row["ledger"] is None]
    several = len({row["optimizer"] for row in document["rows"]} - {"-"}) > 1
    names = _names(document, possible, several)
    sizes = [column for column in zip(_SIZES, *(_sizes(row, size) for row in possible), strict=True) if _shown(column)]
    table, hidden = _table([list(column) for column in zip(*names, strict=True)], sizes)
    exceptions = [
        *_left_out(document),
        *_experts(document["rows"]),
        *_without_step(document["rows"]),
        *(["not possible:", *dict.fromkeys(refused)] if refused else []),
    ]
    explanations = [_explanation(document, size), *hidden]
    blocks = [_heading(document, size, several), table, exceptions, explanations]
    return [line for block in blocks if block for line in ("", *block)][1:]


def _names(document: Mapping[str, Any], rows: Sequence[_Row], several: bool) -> list[list[str]]:
    """Return the columns that name a row, from `method` to `trainable`. Each column starts with its heading."""
    columns: dict[str, _Write] = {"method": lambda row: row["method"], "base": lambda row: row["base"]}
    if several:
        columns["optimizer"] = lambda row: row["optimizer"]
    columns["rank"] = lambda row: str(row["rank"] or "-")
    if document["activations_known"] or document["checked"]:
        columns["batch"] = lambda row: str(row["batch"] or document.get("batch") or "-")
        if "answer" not in document:
            columns["longest"] = lambda row: "-" if row["longest"] is None else f"{row['longest']:,}"
    columns["trainable"] = lambda row: short_count(row["trainable"])
    return [[heading, *map(write, rows)] for heading, write in columns.items()]


def _sizes(row: _Row, size: MemorySize) -> list[str]:
    """Return the texts of the columns `_SIZES`. An unknown part is shown as a dash, and its bytes count as `other`.

    The sum of the shown parts is exactly `needed`, and the sum of `needed` and `free` is exactly the memory. So a part
    may be rounded up or down.
    """
    ledger, unit = row["ledger"], UNITS[size.unit]
    parts = [ledger[f"{part}_B"] for part in _PARTS]
    known = [part or 0 for part in parts]
    needed = size.number_B - ledger["left_B"]
    rounded, host = round_to_sum([*known, needed - sum(known)], unit), 100 * ledger["host_B"] // unit
    shown = [*rounded, *needed_and_free(needed, size), host]
    texts = [hundredths(number) for number in shown]
    return ["-" if n < len(parts) and parts[n] is None else text for n, text in enumerate(texts)]


def needed_and_free(needed_B: int, size: MemorySize) -> tuple[int, int]:
    """Return the needed memory, rounded up, and the memory that remains, in hundredths of `size.unit` (e.g. GiB).

    size: memory of the device.
    """
    unit = UNITS[size.unit]
    needed = -(-100 * needed_B // unit)
    return needed, 100 * size.number_B // unit - needed


def hundredths(number: int) -> str:
    """Format a number of hundredths, e.g. 123456 -> "1,234.56"."""
    return f"{number / 100:,.2f}"


def round_to_sum(parts: Sequence[int], unit: int) -> list[int]:
    """Round numbers of bytes to hundredths of a unit. The results add up to the sum of all parts, rounded up.

    Each number is rounded down. Then the numbers with the largest remainders are rounded up, until the sum is right.
    """
    rounded = [100 * part // unit for part in parts]
    missing = -(-100 * sum(parts) // unit) - sum(rounded)
    order = sorted(range(len(parts)), key=lambda n: 100 * parts[n] % unit, reverse=True)
    for n in order[:missing]:
        rounded[n] += 1
    return rounded


def _shown(column: Sequence[str]) -> bool:
    """Return whether a column of sizes is shown. An optional column is shown only if it has a value."""
    heading, *texts = column
    return heading not in _OPTIONAL or any(text not in ("-", "0.00") for text in texts)


def _table(names: Sequence[list[str]], sizes: Sequence[Sequence[str]]) -> tuple[list[str], list[str]]:
    """Return the lines of the table, and a line about the columns that a narrow terminal cannot show."""
    left, available = sum(heading in _TEXTS for heading in names[0]), terminal_width()
    lines: list[str] = []
    for columns in (sizes, [column for column in sizes if column[0] in _RESULTS]):
        rows = [[*row, *texts] for row, *texts in zip(names, *columns, strict=True)]
        lines = align_columns(rows, right=range(left, len(rows[0])))
        if available is None or max(map(len, lines)) <= available:
            hidden = len(sizes) - len(columns)
            return lines, [f"{hidden} columns with the parts of the memory need a wider terminal"] if hidden else []
    return lines, []


def _left_out(document: Mapping[str, Any]) -> list[str]:
    """List the ranks that are not supported, one line per Method. Leave out Methods that support no rank at all."""
    there = {row["method"] for row in document["rows"] if row["rank"] is not None}
    found = group((one["method"], one) for one in document["left_out"] if one["method"] in there)
    return [
        f"not tried for {method}: rank {', '.join(str(one['rank']) for one in several)}: {several[0]['because']}"
        for method, several in found.items()
    ]


def _heading(document: Mapping[str, Any], size: MemorySize, several: bool) -> list[str]:
    one = next((row["optimizer"] for row in document["rows"] if row["optimizer"] != "-"), "")
    options = ", gradient checkpointing" if document["gradient_checkpointing"] else ""
    options += ", layer-wise updates if the weights themselves train" if document["layerwise_updates"] else ""
    by = f", {one}" if one and not several else ""
    return [
        f"{document['model']} ({document['source']}): {document['parameters']:,} weights in {document['dtype']}",
        f"memory: {size.shown(size.number_B)} {size.unit} = {size.number_B:,} bytes; "
        f"texts of {document['tokens']} tokens{by}{options}",
        f"adapted: {', '.join(document['targets'])}",
    ]


def _explanation(document: Mapping[str, Any], size: MemorySize) -> str:
    """Return one line with the unit, and with the memory that the columns do not include."""
    left_out = ["allocator waste", "kernel workspaces", "CUDA context"]
    if not document["checked"]:
        left_out.insert(0, "temporary tensors")
        if not document["activations_known"]:
            left_out.insert(0, "activations")
    return f"sizes in {size.unit}; not included: {', '.join(left_out)} (`peft-harness explain fit`)"


def _experts(rows: Sequence[_Row]) -> list[str]:
    found = dict.fromkeys((row["untouched"], row["method"]) for row in rows if row["ledger"] and row["untouched"])
    return [f"{', '.join(names)}: {what}" for what, names in group(found).items()]


def _without_step(rows: Sequence[_Row]) -> list[str]:
    """List the rows whose training step could not be simulated, one line for each reason."""
    found = group(
        (row["no_peak"], f"{row['method']} on {row['base']} by {row['optimizer']}")
        for row in rows
        if row["ledger"] and row.get("no_peak")
    )
    return [f"no training step simulated for {', '.join(names)}: {why}" for why, names in found.items()]
