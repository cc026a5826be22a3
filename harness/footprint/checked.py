"""The answers of `fit`, each held against a step without data, whose peak says which batch fits. No torch.

The formulas leave out what exists for a moment; a step of code that runs, taken without data, has it all. It is that of
`fused`, the harness's own, or of the reference where `fused` does not offer the Method.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import cache
from typing import Any

from harness.footprint import asking, choices
from harness.footprint.fit import DOES_NOT_FIT, Asked, config_at
from harness.methods import methods
from harness.records import Base, Cell, Evaluation, Training
from harness.registry import discover

OURS = "fused"
_ROUNDS = 8
"""Batches that are tried of a row at most; three mostly do: what a text takes, what fits, and that one more does not."""
_OF_BATCH = ("activations_B", "logits_B")


def checked(asked: Asked, document: Mapping[str, Any]) -> dict[str, Any]:
    """Return the document of `fit.answer` with the largest batch of each row whose step fits, and that step's peak.

    peak_B: of the row's batch, or where none fits of the smallest that was tried; None of a row for which nothing could be
    tried: `no_peak` says why, and its batch is the formulas'. peak_by: whose code's. Ranks stay those that the formulas
    chose; `longest` stays theirs.
    """
    rows = [
        dict(row) | {"peak_B": None, "peak_by": _whose(row["method"]), "no_peak": _untried(row)}
        for row in document["rows"]
    ]
    tried: dict[int, dict[int, int]] = {n: {} for n, row in enumerate(rows) if not row["no_peak"]}
    if tried:
        print(f"taking a step without data for each of {len(tried)} rows ...", file=sys.stderr)
    room = document["memory_B"]
    for _ in range(_ROUNDS):
        batches = {n: batch for n in tried if (batch := _next(rows[n], tried[n], room)) is not None}
        if not batches:
            break
        steps = [_step(asked, document, rows[n], batch) for n, batch in batches.items()]
        answers = asking.ask(steps)
        for at, (n, batch) in enumerate(batches.items()):
            found = {"no_peak": answers} if isinstance(answers, str) else answers[at] if at < len(answers) else {}
            if (peak := found.get("peak_B")) is None:
                rows[n]["no_peak"] = found.get("no_peak") or "the steps before it took too long"
                del tried[n]
            else:
                tried[n][batch] = peak - rows[n]["ledger"]["host_B"]
    settled = [_settled(row, tried[n], room) if tried.get(n) else row for n, row in enumerate(rows)]
    return dict(document) | {"checked": any(row["peak_B"] is not None for row in settled), "rows": settled}


@cache
def _whose(method: str) -> str:
    return OURS if OURS in discover().names("method", method) else "reference"


def _untried(row: Mapping[str, Any]) -> str:
    if row["ledger"] is None:
        return str(row["because"])
    return "" if row["batch"] else "no formula says which batch to try"


def _next(row: Mapping[str, Any], tried: Mapping[int, int], room: int) -> int | None:
    """Return the batch to try next; None where one is known to fit and the next larger one not to, or none to fit."""
    if not tried:
        return int(row["batch"])
    fits = max((batch for batch, peak in tried.items() if peak <= room), default=0)
    fails = min((batch for batch, peak in tried.items() if peak > room), default=None)
    if fails == fits + 1:
        return None
    (low, least), (high, most) = sorted([(0, _lasting(row)), *tried.items()])[-2:]
    a_text = (most - least) // (high - low)  # less than nothing where the formula was far too high
    guess = high + (room - most) // a_text if a_text > 0 else 2 * high
    return max(fits + 1, guess if fails is None else min(guess, fails - 1))


def _lasting(row: Mapping[str, Any]) -> int:
    return sum(int(row["ledger"][part]) for part in ("weights_B", "adapter_B", "gradients_B", "optimizer_B"))


def _step(asked: Asked, document: Mapping[str, Any], row: Mapping[str, Any], batch: int) -> dict[str, Any]:
    """Return the question for a step of a row, over a base that `fused` packed, with a loss of every token."""
    info = methods()[row["method"]]
    tokens, targets = document["tokens"], {"targets": document["targets"]}
    config = config_at(info, row["rank"]) | (targets if "targets" in info.fields else {})
    packed = row["base"] not in ("none", choices.OWN)
    layerwise = asked.layerwise and info.trains_weights
    cell = Cell(
        model=asked.model.name,
        task="synthetic",
        method=row["method"],
        implementation=row["peak_by"],
        config=config,
        base=Base(quantization=row["base"], implementation=OURS) if packed else Base(),
        optimizer="adamw" if row["optimizer"] == choices.OWN else row["optimizer"],
        dtype=document["dtype"],
        training=Training(
            steps=1, batch=batch, max_tokens=tokens, lr=1e-3, checkpointing=asked.checkpointing, layerwise=layerwise
        ),
        evaluation=Evaluation(items=0),
    )
    return {
        "cell": cell.model_dump(mode="json"), "config": asked.model.config, "kind": asked.model.kind, "answer": tokens
    }  # fmt: skip


def _settled(row: Mapping[str, Any], tried: Mapping[int, int], room: int) -> dict[str, Any]:
    fitting = [batch for batch, peak in tried.items() if peak <= room]
    batch = max(fitting) if fitting else min(tried)
    ledger = dict(row["ledger"])
    for part in _OF_BATCH:
        ledger[part] = ledger[part] // row["batch"] * batch
    ledger["total_B"] = _lasting(row) + max(sum(ledger[part] for part in _OF_BATCH), ledger["step_B"])
    ledger["left_B"] = room - ledger["total_B"]
    because = "" if fitting else DOES_NOT_FIT
    return dict(row) | {"batch": batch, "because": because, "ledger": ledger, "peak_B": tried[batch]}
