"""Text output of `fit`: one row per Method, base and optimizer, then notes on the accuracy of the prediction."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from harness.analysis.grouping import group
from harness.conformance.tolerance_constants import FOOTPRINT_ACTIVATIONS, FOOTPRINT_LEDGER
from harness.console import align_columns
from harness.memory_model.size_units import UNITS, MemorySize
from harness.report.formatting import short_count

_PARTS = ("weights", "adapter", "gradients", "optimizer", "activations", "logits", "total", "left")
_WIDTH = 110
_Row = Mapping[str, Any]
_Write = Callable[[_Row], str]


def as_text(document: Mapping[str, Any]) -> str:
    """Format a document of `fit` as text."""
    size = MemorySize(document["memory_B"], document["unit"])
    possible = [row for row in document["rows"] if row["ledger"] is not None]
    refused = [f"  {row['method']}: {row['because']}" for row in document["rows"] if row["ledger"] is None]
    several = len({row["optimizer"] for row in document["rows"]} - {"-"}) > 1
    columns = _columns(document, possible, size, several)
    lines = [
        *_heading(document, size, several),
        "",
        *align_columns([list(columns), *([write(row) for write in columns.values()] for row in possible)]),
        *(["", *left_out] if (left_out := _left_out(document)) else []),
        *(["", "not possible:", *dict.fromkeys(refused)] if refused else []),
    ]
    return "\n".join([*lines, "", *_notes(document, size)])


def _columns(document: Mapping[str, Any], rows: Sequence[_Row], size: MemorySize, several: bool) -> dict[str, _Write]:
    """Return the columns of the table: for each heading, a function that writes the field of a row."""
    checked, by_formula = document["checked"], document["activations_known"]
    parts = [part for part in _PARTS if by_formula or part not in ("activations", "logits", "total" * checked)]
    parts[-1:-1] = ["peak"] if checked else []
    parts += ["host"] if any(row["ledger"]["host_B"] for row in rows) else []
    columns: dict[str, _Write] = {"method": lambda row: row["method"], "base": lambda row: row["base"]}
    if several:
        columns["optimizer"] = lambda row: row["optimizer"]
    columns["rank"] = lambda row: str(row["rank"] or "-")
    if by_formula or checked:
        columns["batch"] = lambda row: _number(row["batch"])
        columns["longest"] = lambda row: _number(row["longest"])
    columns["trains"] = lambda row: short_count(row["trainable"])
    return columns | {part: partial(_size, size, part) for part in parts}


def _left_out(document: Mapping[str, Any]) -> list[str]:
    """List ranks that a Method does not support, although it supports others."""
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


def _notes(document: Mapping[str, Any], size: MemorySize) -> list[str]:
    """Return the notes below the table: unit, accuracy, and rows with an exception."""
    by_formula, checked, rows = document["activations_known"], document["checked"], document["rows"]
    notes = [
        f"Sizes in {size.unit} ({UNITS[size.unit]:,} bytes); a row with a negative `left` does not fit. The prediction "
        "leaves out allocator overhead, kernel workspaces and CUDA context: see `peft-harness explain fit`.",
        *_untouched(rows),
        *_steps(rows),
    ]
    if by_formula:
        notes.append(
            f"Accuracy in tests: weights, adapter, gradients and optimizer within {FOOTPRINT_LEDGER:.0%} of the ledgers of "
            f"real Cells, activations within {FOOTPRINT_ACTIVATIONS:.0%} of the tensors that autograd saves in small Llamas."
        )
    elif not checked:
        notes.append(
            "Activations are not predicted, since the closed form only covers Llama-like models. They need part of `left`."
        )
    if not checked:
        notes.append("Temporary tensors are not included; run without --formulas to include them.")
    return [line for text in notes for line in textwrap.wrap(text, _WIDTH)]


def _untouched(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    found = dict.fromkeys((row["untouched"], row["method"]) for row in rows if row["ledger"] and row["untouched"])
    return [f"{', '.join(names)}: {what}." for what, names in group(found).items()]


def _steps(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return notes on the implementations of the steps, and on rows without a step."""
    by = group(dict.fromkeys((row["peak_by"], row["method"]) for row in rows if row.get("peak_B") is not None))
    code = "; ".join(f"`{name}` of {', '.join(several)}" for name, several in by.items())
    without_step = group(
        (row["no_peak"], f"{row['method']} on {row['base']} by {row['optimizer']}")
        for row in rows
        if row["ledger"] and row.get("no_peak")
    )
    notes = [
        f"peak: a training step on fake tensors ({code}), within {FOOTPRINT_LEDGER:.0%} of measured steps of small models."
    ]
    return (notes if by else []) + [f"Not checked: {', '.join(names)}; {why}." for why, names in without_step.items()]


def _number(number: int | None) -> str:
    return "-" if number is None else f"{number:,}"


def _size(size: MemorySize, part: str, row: _Row) -> str:
    number_B = row.get("peak_B") if part == "peak" else row["ledger"][f"{part}_B"]
    if number_B is None:
        return "-"
    return f"-{size.shown(-number_B)}" if number_B < 0 else size.shown(number_B)
