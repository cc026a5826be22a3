"""Text output of `fit`: one row per Method, base and optimizer, then exceptions, then one line of explanation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from harness.console import align_columns
from harness.memory_model.size_units import MemorySize
from harness.report.formatting import short_count

_PARTS = ("weights", "adapter", "gradients", "optimizer", "activations", "logits", "total", "left")


def as_text(document: Mapping[str, Any]) -> str:
    """Format a document of `fit` as text."""
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
        "trainable",
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
    exceptions = [
        *_left_out(document),
        *_experts(document["rows"]),
        *_without_step(document["rows"]),
        *(["not possible:", *dict.fromkeys(refused)] if refused else []),
    ]
    blocks = [_heading(document, size, several), align_columns(rows), exceptions, [_explanation(document, size)]]
    return "\n\n".join("\n".join(block) for block in blocks if block)


def _left_out(document: Mapping[str, Any]) -> list[str]:
    """List ranks that a Method does not support, although it supports others."""
    there = {row["method"] for row in document["rows"] if row["rank"] is not None}
    found: dict[str, list[dict[str, Any]]] = {}
    for one in document["left_out"]:
        if one["method"] in there:
            found.setdefault(one["method"], []).append(one)
    return [
        f"not tried of {method}: rank {', '.join(str(one['rank']) for one in several)}: {several[0]['because']}"
        for method, several in found.items()
    ]


def _heading(document: Mapping[str, Any], size: MemorySize, several: bool) -> list[str]:
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


def _explanation(document: Mapping[str, Any], size: MemorySize) -> str:
    """Return one line: the unit, and the memory that the columns leave out. The rest is in `explain fit`."""
    left_out = ["allocator waste", "kernel workspaces", "CUDA context"]
    if not document["checked"]:
        left_out.insert(0, "temporary tensors")
        if not document["activations_known"]:
            left_out.insert(0, "activations")
    return f"sizes in {size.unit}; not included: {', '.join(left_out)} (`peft-harness explain fit`)"


def _experts(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    found: dict[str, list[str]] = {}
    for row in rows:
        if row["ledger"] and row["untouched"] and row["method"] not in found.setdefault(row["untouched"], []):
            found[row["untouched"]].append(row["method"])
    return [f"{', '.join(names)}: {what}" for what, names in found.items()]


def _without_step(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """List the rows whose step could not be simulated, by reason."""
    found: dict[str, list[str]] = {}
    for row in rows:
        if row["ledger"] and row.get("no_peak"):
            found.setdefault(row["no_peak"], []).append(f"{row['method']} on {row['base']} by {row['optimizer']}")
    return [f"no training step simulated for {', '.join(names)}: {why}" for why, names in found.items()]


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
