"""What `fit` prints for people: one row for each Method, base and optimizer, and what the prediction is worth."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from harness.footprint.sizes import UNITS, Size
from harness.listing import aligned
from harness.report.display import short_count
from harness.tolerances import FOOTPRINT_ACTIVATIONS, FOOTPRINT_LEDGER

_PARTS = ("weights", "adapter", "gradients", "optimizer", "activations", "logits", "total", "left")
_WIDTH = 110


def as_text(document: Mapping[str, Any]) -> str:
    """Lay the document of `fit.answer` out."""
    size = Size(document["memory_B"], document["unit"])
    known = document["activations_known"]
    shown = [part for part in _PARTS if known or part not in ("activations", "logits")]
    shown[-1:-1] = ["peak"] if document.get("checked") else []
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
        fits = not row["because"]
        at = [
            str(row["rank"] or "-"),
            *([str(row["batch"]), _tokens(row["longest"]) if fits else "-"] if known else []),
        ]
        rows.append([*name, *at, short_count(row["trainable"]), *(_size(size, row, part) for part in shown)])
    lines = [
        *_question(document, size, several),
        "",
        *aligned(rows),
        *(["", "not possible:", *refused] if refused else []),
    ]
    return "\n".join([*lines, "", *_worth(document, size)])


def _question(document: Mapping[str, Any], size: Size, several: bool) -> list[str]:
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


def _worth(document: Mapping[str, Any], size: Size) -> list[str]:
    """Say how to read the table, that it is a prediction, what is left out, and how far off it was."""
    known = document["activations_known"]
    largest = "the largest rank x batch that fits" if known else "the largest rank that fits"
    said = [
        f"Sizes in {size.unit} ({UNITS[size.unit]:,} bytes). Each row is {largest}; a row with a negative `left` does not "
        "fit, and shows the least that it takes."
        + (" longest: tokens of one text alone, at that rank, no more than the model reads." if known else ""),
        "This is a prediction from shapes: nothing was run. It leaves out what the allocator keeps and wastes, the "
        "workspace of kernels, temporary tensors, the CUDA context (hundreds of MiB) and other programs: leave them room.",
    ]
    said += _of_steps(document["rows"])
    if known:
        said.append(
            f"How far off it was: weights, adapter, gradients and optimizer within {FOOTPRINT_LEDGER:.0%} of the ledgers of "
            f"real Cells, activations within {FOOTPRINT_ACTIVATIONS:.0%} of what autograd saved in small Llamas for the "
            "references (both are tests). Libraries may keep more: hf-peft in 16 bits casts what adapters read to float32. "
            "A whole process is larger, by what is left out. On a GPU nothing has been measured. `peft-harness explain "
            "activations` tells what is counted."
        )
    else:
        said.append(
            "Activations are not predicted: there is a formula for Llama-like models only. `left` is what they may take. "
            f"The rest was within {FOOTPRINT_LEDGER:.0%} of the ledgers of real Cells (a test)."
        )
    return [line for text in said for line in textwrap.wrap(text, _WIDTH)]


def _of_steps(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    by: dict[str, list[str]] = {}
    for row in rows:
        if row.get("peak_B") is not None and row["method"] not in by.setdefault(row["peak_by"], []):
            by[row["peak_by"]].append(row["method"])
    whose = "; ".join(f"`{name}` of {', '.join(several)}" for name, several in by.items())
    untried = [row for row in rows if row["ledger"] and row.get("no_peak")]
    how = [
        f"peak: the most that tensors take at one time in a training step, taken without data by code for a CPU ({whose}). "
        "The batch of a row with a peak is the largest whose step fits, and its `left` is beside the peak; `total`, "
        "`longest` and the choice of ranks are those of formulas."
    ]
    return (how if by else []) + [
        f"Not checked: {row['method']} on {row['base']}; {row['no_peak']}." for row in untried
    ]


def _tokens(number: int) -> str:
    return f"{number:,}"


def _size(size: Size, row: Mapping[str, Any], part: str) -> str:
    peak, ledger = row.get("peak_B"), row["ledger"]
    if part == "peak":
        return "-" if peak is None else size.shown(peak)
    if part == "left":
        return _left(size, ledger["left_B"] if peak is None else ledger["total_B"] + ledger["left_B"] - peak)
    return size.shown(ledger[f"{part}_B"])


def _left(size: Size, number_B: int) -> str:
    return f"-{size.shown(-number_B)}" if number_B < 0 else size.shown(number_B)
