"""What `fit` prints for people: one row for each Method, base and optimizer, and what the prediction is worth."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from harness.conformance.tolerance_constants import FOOTPRINT_ACTIVATIONS, FOOTPRINT_LEDGER
from harness.console import align_columns
from harness.memory_model.size_units import UNITS, MemorySize
from harness.report.formatting import short_count

_PARTS = ("weights", "adapter", "gradients", "optimizer", "activations", "logits", "total", "left")
_WIDTH = 110


def as_text(document: Mapping[str, Any]) -> str:
    """Lay the document of `fit.answer` out."""
    size = MemorySize(document["memory_B"], document["unit"])
    checked, by_formula = document["checked"], document["activations_known"]
    known = by_formula or checked
    shown = [part for part in _PARTS if by_formula or part not in ("activations", "logits", "total" * checked)]
    shown[-1:-1] = ["peak"] if checked else []
    shown += ["host"] if any(row["ledger"] and row["ledger"]["host_B"] for row in document["rows"]) else []
    several = len({row["optimizer"] for row in document["rows"]} - {"-"}) > 1
    head = [
        "method",
        "base",
        *(["optimizer"] if several else []),
        "rank",
        *(["batch", "longest"] if known else []),
        "trains",
        *shown,
    ]
    rows, refused = [head], []
    for row in document["rows"]:
        name = [row["method"], row["base"], *([row["optimizer"]] if several else [])]
        if row["ledger"] is None:
            refused.append(f"  {row['method']}: {row['because']}")
            continue
        at = [
            str(row["rank"] or "-"),
            *([_batch(row), _tokens(row["longest"])] if known else []),
        ]
        rows.append([*name, *at, short_count(row["trainable"]), *(_size(size, row, part) for part in shown)])
    lines = [
        *_question(document, size, several),
        "",
        *align_columns(rows),
        *(["", *left_out] if (left_out := _left_out(document)) else []),
        *(["", "not possible:", *dict.fromkeys(refused)] if refused else []),
    ]
    return "\n".join([*lines, "", *_worth(document, size)])


def _left_out(document: Mapping[str, Any]) -> list[str]:
    """Say which ranks a Method cannot have that has rows at others."""
    there = {row["method"] for row in document["rows"] if row["rank"] is not None}
    found: dict[str, list[dict[str, Any]]] = {}
    for one in document["left_out"]:
        if one["method"] in there:
            found.setdefault(one["method"], []).append(one)
    return [
        f"not tried of {method}: rank {', '.join(str(one['rank']) for one in several)}: {several[0]['because']}"
        for method, several in found.items()
    ]


def _question(document: Mapping[str, Any], size: MemorySize, several: bool) -> list[str]:
    one = next((row["optimizer"] for row in document["rows"] if row["optimizer"] != "-"), "")
    keeps = ", gradient checkpointing" if document["gradient_checkpointing"] else ""
    keeps += ", layer-wise updates where the weights themselves train" if document["layerwise_updates"] else ""
    by = f", {one}" if one and not several else ""
    return [
        f"{document['model']} ({document['source']}): {document['parameters']:,} weights in {document['dtype']}",
        f"memory: {size.shown(size.number_B)} {size.unit} = {size.number_B:,} bytes; "
        f"texts of {document['tokens']} tokens{by}{keeps}",
        f"adapted: {', '.join(document['targets'])}",
    ]


def _worth(document: Mapping[str, Any], size: MemorySize) -> list[str]:
    """Say how to read the table, that it is a prediction, what is left out, and how far off it was."""
    by_formula, checked = document["activations_known"], document["checked"]
    largest = "the largest rank x batch that fits" if by_formula or checked else "the largest rank that fits"
    said = [
        f"Sizes in {size.unit} ({UNITS[size.unit]:,} bytes). Each row is {largest}; a row with a negative `left` does not "
        "fit, and shows the least that it takes."
        + (" longest: tokens of one text alone, at that rank, no more than the model reads." * (by_formula or checked)),
        "This is a prediction from shapes: nothing was trained. It leaves out what the allocator keeps and wastes, the "
        "workspace of kernels, the CUDA context (hundreds of MiB) and other programs: leave them room.",
    ]
    said += _untouched(document["rows"])
    said += _of_steps(document["rows"])
    if by_formula:
        said.append(
            f"How far off formulas were: weights, adapter, gradients and optimizer within {FOOTPRINT_LEDGER:.0%} of the "
            f"ledgers of real Cells, activations within {FOOTPRINT_ACTIVATIONS:.0%} of what autograd saved in small Llamas "
            "for the references (both are tests). Libraries may keep more: hf-peft in 16 bits casts what adapters read to "
            "float32. On a GPU nothing has been measured. `peft-harness explain activations` tells what is counted."
        )
    elif not checked:
        said.append(
            "Activations are not predicted: there is a formula for Llama-like models only. `left` is what they may take. "
            f"The rest was within {FOOTPRINT_LEDGER:.0%} of the ledgers of real Cells (a test)."
        )
    if not checked:
        said.append("Temporary tensors are left out too: without --formulas a training step tells of them.")
    return [line for text in said for line in textwrap.wrap(text, _WIDTH)]


def _untouched(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    found: dict[str, list[str]] = {}
    for row in rows:
        if row["ledger"] and row["untouched"] and row["method"] not in found.setdefault(row["untouched"], []):
            found[row["untouched"]].append(row["method"])
    return [f"Of {', '.join(names)}: {what}." for what, names in found.items()]


def _of_steps(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    by: dict[str, list[str]] = {}
    for row in rows:
        if row.get("peak_B") is not None and row["method"] not in by.setdefault(row["peak_by"], []):
            by[row["peak_by"]].append(row["method"])
    whose = "; ".join(f"`{name}` of {', '.join(several)}" for name, several in by.items())
    unchecked: dict[str, list[str]] = {}
    for row in rows:
        if row["ledger"] and row.get("no_peak"):
            name = f"{row['method']} on {row['base']} by {row['optimizer']}"
            unchecked.setdefault(row["no_peak"], []).append(name)
    how = [
        f"peak: the most that tensors take at one time in a training step, taken without data by code for a CPU ({whose}). "
        f"It was within {FOOTPRINT_LEDGER:.0%} of what steps of small models took (a test). It says which batch and which "
        "length fit, and `left` is beside it; `total` and the choice among ranks that fit are those of formulas."
    ]
    return (how if by else []) + [f"Not checked: {', '.join(rows)}; {why}." for why, rows in unchecked.items()]


def _batch(row: Mapping[str, Any]) -> str:
    return "-" if row["batch"] is None else str(row["batch"])


def _tokens(number: int | None) -> str:
    return "-" if number is None else f"{number:,}"


def _size(size: MemorySize, row: Mapping[str, Any], part: str) -> str:
    peak, ledger = row.get("peak_B"), row["ledger"]
    if part == "peak":
        return "-" if peak is None else size.shown(peak)
    if part == "left":
        return _left(size, ledger["left_B"])
    return "-" if ledger[f"{part}_B"] is None else size.shown(ledger[f"{part}_B"])


def _left(size: MemorySize, number_B: int) -> str:
    return f"-{size.shown(-number_B)}" if number_B < 0 else size.shown(number_B)
