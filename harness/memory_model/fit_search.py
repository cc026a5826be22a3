"""The answers of `fit`, each held against steps without data, whose peaks say what fits. No torch.

The formulas leave out what exists for a moment; a step of code that runs, taken without data, has it all. It is that of
`fused`, the harness's own, or of the reference where `fused` does not offer the Method.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import cache
from typing import Any

from harness.cell.training.bypassed_layers import NO_EFFECT
from harness.memory_model import choices, counting_client, fit
from harness.memory_model.fit import DOES_NOT_FIT, FitRequest, config_at
from harness.memory_model.largest_batch import largest_fitting
from harness.methods.registry import discover
from harness.methods.spec import methods
from harness.records.record import Base, Cell, Evaluation, Training

OURS, _REFERENCE = "fused", "reference"
_LATE = "the steps before it took too long"
_OF_BATCH = ("activations_B", "logits_B")
_MOST_TEXTS = 2**16
"""Of a batch: more are not tried of a model that takes next to nothing for each."""
_GRAIN = 0.01
"""Of the longest text: how far above it a length may lie that is known not to fit."""

Row = dict[str, Any]


def search_by_steps(asked: FitRequest, counted: Mapping[str, Any], document: Mapping[str, Any]) -> dict[str, Any]:
    """Return the document of `fit.answer` with what fits by steps: batch, longest text, and the peak of the batch's step.

    peak_B: of the row's batch, or where none fits of a single text; None of a row for which nothing could be tried:
    `no_peak` says why, and the rest is the formulas'. peak_by: whose code's. The rank is that of the formulas, unless it
    does not fit, or theirs was that none does: then it is the largest of which one text fits.
    """
    rows = [
        row | {"peak_B": None, "peak_by": _whose(row["method"]), "no_peak": _untried(row)} for row in document["rows"]
    ]
    there = [n for n, row in enumerate(rows) if not row["no_peak"]]
    if there:
        print(f"taking steps without data for each of {len(there)} rows ...", file=sys.stderr)
    search = _Search(asked, counted, document)
    for n, row in zip(there, search.batches([rows[n] for n in there]), strict=True):
        rows[n] = row
    others = {n: ranks for n in there if (ranks := search.other_ranks(rows[n], document["rows"][n]))}
    for n, row in zip(others, search.reranked([rows[n] for n in others], list(others.values())), strict=True):
        rows[n] = row
    return dict(document) | {"checked": any(row["peak_B"] is not None for row in rows), "rows": rows}


@cache
def _whose(method: str) -> str:
    return OURS if OURS in discover().names("method", method) else _REFERENCE


def _untried(row: Mapping[str, Any]) -> str:
    return str(row["because"]) if row["ledger"] is None else ""


class _Search:
    """Questions to the process that takes steps, and what its answers make of rows. What is asked together shares it."""

    def __init__(self, asked: FitRequest, counted: Mapping[str, Any], document: Mapping[str, Any]) -> None:
        self.asked, self.counted, self.document = asked, counted, document
        self.room, self.tokens = int(document["memory_B"]), int(document["tokens"])

    def batches(self, rows: list[Row]) -> list[Row]:
        """Return the rows with the largest batch whose step fits, and the longest text of which one does."""
        most = self.counted["positions"]
        steps = [self._largest(row, "batch", self.tokens, first=row["batch"] or 1, most=_MOST_TEXTS) for row in rows]
        for row in rows:
            first = row["longest"] or self.tokens
            steps.append(self._largest(row, "max_tokens", first, first=first, most=most, grain=_GRAIN))
        answers = _answers(steps)
        settled = [self._settled(row, found) for row, found in zip(rows, answers, strict=False)]
        lengths = [
            largest_fitting(_tried(row, one), self.room) or None
            for row, one in zip(rows, answers[len(rows) :], strict=True)
        ]
        return [
            row if row["peak_B"] is None else row | {"longest": longest}
            for row, longest in zip(settled, lengths, strict=True)
        ]

    def other_ranks(self, row: Row, by_formulas: Row) -> list[int]:
        """Return the ranks that a row should be tried at too, as formulas and steps disagree about the one it has."""
        tried = [one["rank"] for one in self._ranks(row) if one["rank"] is not None]
        if row["peak_B"] is None or bool(row["because"]) == bool(by_formulas["because"]):
            return []
        return [rank for rank in tried if (rank < row["rank"] if row["because"] else rank > row["rank"])]

    def reranked(self, rows: list[Row], ranks: list[list[int]]) -> list[Row]:
        """Return the rows at the largest of these ranks of which one text fits, or, as it takes the least, at the smallest.

        A row that fits as it is stays where none of the others, which are larger, does.
        """
        pairs = [(n, self._at(rows[n], rank)) for n, several in enumerate(ranks) for rank in sorted(several)]
        answers = _answers([self._step(one, 1, self.tokens) for _, one in pairs])
        found: dict[int, Row] = {}
        for (n, one), answer in zip(pairs, answers, strict=True):
            if "peak_B" not in answer:
                continue
            fits = answer["peak_B"] - one["ledger"]["host_B"] <= self.room
            if fits or (rows[n]["because"] and n not in found):
                found[n] = one
        settled = dict(zip(found, self.batches(list(found.values())), strict=True))
        return [settled[n] if n in settled and settled[n]["peak_B"] is not None else row for n, row in enumerate(rows)]

    def _ranks(self, row: Row) -> list[dict[str, Any]]:
        return [one for one in self.counted["methods"][row["method"]] if not one["error"]]

    def _at(self, row: Row, rank: int) -> Row:
        of_rank = [one for one in self._ranks(row) if one["rank"] == rank]
        names = row["method"], row["base"], row["optimizer"]
        by_formulas = fit.row_document(fit.best_row(self.asked, self.counted, self.tokens, of_rank, *names))
        return row | by_formulas | {"peak_B": None, "no_peak": ""}

    def _largest(self, row: Row, of: str, tokens: int, **told: Any) -> dict[str, Any]:
        # What is paged lies in host memory, which on the CPU of a step without data is the device's.
        host = row["ledger"]["host_B"]
        about = {"of": of, "room": self.room + host, **told, "lasting": _lasting(row) + host}
        return self._step(row, 1, tokens) | {"largest": about}

    def _step(self, row: Row, batch: int, tokens: int) -> dict[str, Any]:
        """Return the question for a step of a row, over a base that `fused` packed, with a loss of every token."""
        info = methods()[row["method"]]
        targets = {"targets": self.document["targets"]} if "targets" in info.fields else {}
        packed = row["base"] not in ("none", choices.OWN)
        recipe = Training(
            steps=1, batch=batch, max_tokens=tokens, lr=1e-3, checkpointing=self.asked.checkpointing,
            layerwise=self.asked.layerwise and info.spec.trains_weights,
        )  # fmt: skip
        cell = Cell(
            model=self.asked.model.name,
            task="synthetic",
            method=row["method"],
            implementation=_whose(row["method"]),
            config=config_at(info, row["rank"]) | targets,
            base=Base(quantization=row["base"], implementation=OURS) if packed else Base(),
            optimizer="adamw" if row["optimizer"] == choices.OWN else row["optimizer"],
            dtype=self.document["dtype"],
            training=recipe,
            evaluation=Evaluation(items=0),
        )
        model = self.asked.model
        return {
            "cell": cell.model_dump(mode="json"), "config": model.config, "kind": model.kind, "answer": tokens
        }  # fmt: skip

    def _settled(self, row: Row, found: Mapping[str, Any]) -> Row:
        tried = _tried(row, found)
        if not tried:
            why = found.get("no_peak", _LATE)
            return row | {"no_peak": why} | ({"ledger": None, "because": why} if NO_EFFECT in why else {})
        fits = largest_fitting(tried, self.room)
        if not fits and 1 not in tried:
            return row | {"no_peak": f"no step of {min(tried)} texts or more fits, and of fewer none was taken"}
        batch, ledger = fits or 1, dict(row["ledger"])
        ledger["left_B"] = self.room - tried[batch]
        if row["batch"]:
            for part in _OF_BATCH:
                ledger[part] = ledger[part] // row["batch"] * batch
            ledger["total_B"] = _lasting(row) + max(sum(ledger[part] for part in _OF_BATCH), ledger["step_B"])
        else:
            ledger["total_B"] = None  # of formulas, which know no activations here
        by = _REFERENCE if _REFERENCE in found["peak_by"] else row["peak_by"]
        said = {"because": "" if fits else DOES_NOT_FIT, "peak_B": tried[batch], "peak_by": by}
        return row | {"batch": batch, "ledger": ledger} | said


def _answers(questions: list[dict[str, Any]]) -> list[dict[str, Any]]:
    answers = counting_client.run_requests(questions)
    if isinstance(answers, str):
        return [{"no_peak": answers}] * len(questions)
    return answers + [{}] * (len(questions) - len(answers))


def _tried(row: Row, found: Mapping[str, Any]) -> dict[int, int]:
    """Return the peaks on the device, by what they are of. JSON makes words of the numbers."""
    return {int(number): peak - row["ledger"]["host_B"] for number, peak in found.get("tried", {}).items()}


def _lasting(row: Row) -> int:
    return sum(int(row["ledger"][part]) for part in ("weights_B", "adapter_B", "gradients_B", "optimizer_B"))
