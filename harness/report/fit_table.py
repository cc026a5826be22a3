"""Text output of `fit`: a row for each Method, base and optimizer, then exceptions, then one line of explanation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from harness.analysis.grouping import group
from harness.console import align_columns
from harness.memory_model.size_units import MemorySize
from harness.report.formatting import short_count

_PARTS = ("weights", "adapter", "gradients", "optimizer", "activations", "logits", "total", "left")
_Row = Mapping[str, Any]
_Write = Callable[[_Row], str]


def lines(document: Mapping[str, Any]) -> list[str]:
    """Format a document of `fit` as lines of text."""
    size = MemorySize(document["memory_B"], document["unit"])
    possible = [row for row in document["rows"] if row["ledger"] is not None]
    refused = [f"  {row['method']}: {row['because']}" for row in document["rows"] if row["ledger"] is None]
    several = len({row["optimizer"] for row in document["rows"]} - {"-"}) > 1
    columns = _columns(document, possible, size, several)
    rows = [list(columns), *([write(row) for write in columns.values()] for row in possible)]
    exceptions = [
        *_left_out(document),
        *_experts(document["rows"]),
        *_without_step(document["rows"]),
        *(["not possible:", *dict.fromkeys(refused)] if refused else []),
    ]
    blocks = [_heading(document, size, several), align_columns(rows), exceptions, [_explanation(document, size)]]
    return [line for block in blocks if block for line in ("", *block)][1:]


def _columns(document: Mapping[str, Any], rows: Sequence[_Row], size: MemorySize, several: bool) -> dict[str, _Write]:
    """Return the columns of the table: heading -> function that returns the text of this column for a row."""
    checked, by_formula = document["checked"], document["activations_known"]
    parts = [part for part in _PARTS if by_formula or part not in ("activations", "logits", "total" * checked)]
    parts[-1:-1] = ["peak"] if checked else []
    parts += ["host"] if any(row["ledger"]["host_B"] for row in rows) else []
    columns: dict[str, _Write] = {"method": lambda row: row["method"], "base": lambda row: row["base"]}
    if several:
        columns["optimizer"] = lambda row: row["optimizer"]
    columns["rank"] = lambda row: str(row["rank"] or "-")
    if by_formula or checked:
        columns["batch"] = lambda row: "-" if row["batch"] is None else str(row["batch"])
        columns["longest"] = lambda row: "-" if row["longest"] is None else f"{row['longest']:,}"
    columns["trainable"] = lambda row: short_count(row["trainable"])
    return columns | {part: partial(_size, size, part) for part in parts}


def _left_out(document: Mapping[str, Any]) -> list[str]:
    """List the ranks that are not supported, one line for each Method that supports at least one rank."""
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
    """Return one line with the unit and with the memory that the columns leave out. `explain fit` has the details."""
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


def _size(size: MemorySize, part: str, row: _Row) -> str:
    number_B = row.get("peak_B") if part == "peak" else row["ledger"][f"{part}_B"]
    if number_B is None:
        return "-"
    return f"-{size.shown(-number_B)}" if number_B < 0 else size.shown(number_B)
