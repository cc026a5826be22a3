"""Find what fits from the peaks of training steps on fake tensors. The search starts from closed-form results.

Imports no torch.

Closed-form estimates leave out temporary tensors. A step on fake tensors includes all of them. The step runs the code
of `fused`, or of the reference if `fused` does not implement the Method.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from harness.cell.training.bypassed_layers import NO_EFFECT
from harness.console import print_note
from harness.errors import plural
from harness.memory_model import counting_client, fit
from harness.memory_model.fit import DOES_NOT_FIT, FitRequest, config_at
from harness.memory_model.largest_batch import largest_fitting
from harness.memory_model.ledger import OWN
from harness.memory_model.messages import MethodCount, ModelCount, SearchOptions, StepAnswer, StepRequest
from harness.methods.registry import discover
from harness.methods.spec import methods
from harness.records.record import Base, Cell, Evaluation, Training

OURS, _REFERENCE = "fused", "reference"
LATE = "the steps before it took too long"
_BATCH_PARTS = ("activations_B", "logits_B")
"""Parts of the ledger that grow with the batch."""
MAX_BATCH = 2**16
"""Largest batch to try."""
_GRAIN = 0.01
"""Relative tolerance of the longest text that fits. The search ends if a text that is longer by this share does not
fit."""

Row = dict[str, Any]


def search_by_steps(request: FitRequest, counted: ModelCount, document: Mapping[str, Any]) -> dict[str, Any]:
    """Return `document`, the closed-form results, with batch, longest text and peak of each row from steps on fake
    tensors.

    The key `peak_B` of a row is the peak in bytes of a step with the row's batch, or with one text if no text fits.
    `peak_by` is the code that took the step. If no step could be taken, `peak_B` is None, `no_peak` has the reason, and
    the rest of the row is unchanged. If steps and closed form disagree about whether the row's rank fits, the row gets
    the largest rank at which one text fits.
    """
    rows = [
        row
        | {
            "peak_B": None,
            "peak_by": step_implementation(row["method"]),
            "no_peak": "" if row["ledger"] else row["because"],
        }
        for row in document["rows"]
    ]
    there = [n for n, row in enumerate(rows) if not row["no_peak"]]
    if there:
        count = plural(len(there), "row")
        print_note(f"simulating training steps for {count} (several steps each, a few seconds per row) ...")
    search = FitSearch(request, counted, document)
    for n, row in zip(there, search.batches([rows[n] for n in there]), strict=True):
        rows[n] = row
    others = {n: ranks for n in there if (ranks := search.other_ranks(rows[n], document["rows"][n]))}
    for n, row in zip(others, search.reranked([rows[n] for n in others], list(others.values())), strict=True):
        rows[n] = row
    return dict(document) | {"checked": any(row["peak_B"] is not None for row in rows), "rows": rows}


@cache
def step_implementation(method: str) -> str:
    """Return the Implementation that takes a Method's steps: `fused` if it supports the Method, else `reference`."""
    return OURS if OURS in discover().names("method", method) else _REFERENCE


class FitSearch:
    """A search for the largest batch, text length and rank that fit, in every row. Child processes take the steps."""

    def __init__(self, request: FitRequest, counted: ModelCount, document: Mapping[str, Any]) -> None:
        self.request, self.counted, self.document = request, counted, document
        self.room, self.tokens = int(document["memory_B"]), int(document["tokens"])

    def batches(self, rows: list[Row]) -> list[Row]:
        """Return each row with the largest batch that fits, and with the longest text that fits alone."""
        most = self.counted["positions"]
        steps = [self.largest(row, "batch", self.tokens, first=row["batch"] or 1, most=MAX_BATCH) for row in rows]
        for row in rows:
            first = row["longest"] or self.tokens
            steps.append(self.largest(row, "max_tokens", first, first=first, most=most, grain=_GRAIN))
        answers = run_steps(steps)
        updated = [self._updated(row, found) for row, found in zip(rows, answers, strict=False)]
        lengths = [
            largest_fitting(tried_sizes(row, one), self.room) or None
            for row, one in zip(rows, answers[len(rows) :], strict=True)
        ]
        return [
            row if row["peak_B"] is None else row | {"longest": longest}
            for row, longest in zip(updated, lengths, strict=True)
        ]

    def other_ranks(self, row: Row, by_formulas: Row) -> list[int]:
        """Return other ranks to try for a row: lower ranks if its rank does not fit, else higher ranks.

        The list is empty if steps and closed form agree about whether the row's rank fits. by_formulas: the row's
        closed-form result.
        """
        tried = [one["rank"] for one in self._ranks(row) if one["rank"] is not None]
        if row["peak_B"] is None or bool(row["because"]) == bool(by_formulas["because"]):
            return []
        return [rank for rank in tried if (rank < row["rank"] if row["because"] else rank > row["rank"])]

    def reranked(self, rows: list[Row], ranks: list[list[int]]) -> list[Row]:
        """Return the rows, each with the largest of its `ranks` at which one text fits.

        If one text fits at none of these ranks, the result depends on the row. A row that fits stays as it is. A row
        that does not fit gets the smallest of these ranks.
        """
        pairs = [(n, self._at(rows[n], rank)) for n, of_row in enumerate(ranks) for rank in sorted(of_row)]
        answers = run_steps([self.step(one, 1, self.tokens) for _, one in pairs])
        found: dict[int, Row] = {}
        for (n, one), answer in zip(pairs, answers, strict=True):
            if "peak_B" not in answer:
                continue
            fits = answer["peak_B"] - one["ledger"]["host_B"] <= self.room
            if fits or (rows[n]["because"] and n not in found):
                found[n] = one
        updated = dict(zip(found, self.batches(list(found.values())), strict=True))
        return [updated[n] if n in updated and updated[n]["peak_B"] is not None else row for n, row in enumerate(rows)]

    def _ranks(self, row: Row) -> list[MethodCount]:
        return [one for one in self.counted["methods"][row["method"]] if not one["error"]]

    def _at(self, row: Row, rank: int) -> Row:
        of_rank = [one for one in self._ranks(row) if one["rank"] == rank]
        names = row["method"], row["base"], row["optimizer"]
        by_formulas = fit.row_document(fit.best_row(self.request, self.counted, self.tokens, of_rank, *names))
        return row | by_formulas | {"peak_B": None, "no_peak": ""}

    def largest(
        self, row: Row, of: str, tokens: int, *, first: int, most: int | None, grain: float = 0.0
    ) -> StepRequest:
        """Return the request for a search for the largest batch or text of a row.

        of: `batch` or `max_tokens`, the size that is searched. first, most: first and largest size to try. grain:
        relative tolerance of the result.
        """
        # Paged states are in host memory. In a step on a CPU, this memory is also the device's memory.
        host = row["ledger"]["host_B"]
        options: SearchOptions = {
            "of": of, "room": self.room + host, "first": first, "most": most, "grain": grain,
            "lasting": _lasting(row) + host,
        }  # fmt: skip
        return {**self.step(row, 1, tokens), "largest": options}

    def step(self, row: Row, batch: int, tokens: int) -> StepRequest:
        """Return the request for a training step with a row's Method, rank, base and optimizer.

        Every token has a loss. A 4-bit base uses the Implementation `fused`.
        """
        info = methods()[row["method"]]
        targets = {"targets": self.document["targets"]} if "targets" in info.fields else {}
        packed = row["base"] not in ("none", OWN)
        recipe = Training(
            steps=1, batch=batch, max_tokens=tokens, lr=1e-3, checkpointing=self.request.checkpointing,
            layerwise=self.request.layerwise and info.spec.trains_weights,
        )  # fmt: skip
        cell = Cell(
            model=self.request.model.name,
            task="synthetic",
            method=row["method"],
            implementation=step_implementation(row["method"]),
            config=config_at(info, row["rank"]) | targets,
            base=Base(quantization=row["base"], implementation=OURS) if packed else Base(),
            optimizer="adamw" if row["optimizer"] == OWN else row["optimizer"],
            dtype=self.document["dtype"],
            training=recipe,
            evaluation=Evaluation(items=0),
        )
        model = self.request.model
        return {
            "cell": cell.model_dump(mode="json"), "config": model.config, "kind": model.kind, "loss_tokens": tokens
        }  # fmt: skip

    def _updated(self, row: Row, found: StepAnswer) -> Row:
        tried = tried_sizes(row, found)
        if not tried:
            why = found.get("no_peak", LATE)
            return row | {"no_peak": why} | ({"ledger": None, "because": why} if NO_EFFECT in why else {})
        fits = largest_fitting(tried, self.room)
        if not fits and 1 not in tried:
            return row | {"no_peak": f"no step with {min(tried)} texts or more fits, and none with fewer was taken"}
        batch, ledger = fits or 1, dict(row["ledger"])
        ledger["left_B"] = self.room - tried[batch]
        if row["batch"]:
            for part in _BATCH_PARTS:
                ledger[part] = ledger[part] // row["batch"] * batch
            ledger["total_B"] = _lasting(row) + max(sum(ledger[part] for part in _BATCH_PARTS), ledger["step_B"])
        else:
            ledger["total_B"] = None  # the closed form lacks activations
        by = _REFERENCE if _REFERENCE in found["peak_by"] else row["peak_by"]
        outcome = {"because": "" if fits else DOES_NOT_FIT, "peak_B": tried[batch], "peak_by": by}
        return row | {"batch": batch, "ledger": ledger} | outcome


def run_steps(requests: list[StepRequest]) -> list[StepAnswer]:
    """Return the answer to each request. An answer is empty if the time ran out before its step.

    If the child process fails, each answer has only the reason.
    """
    answers = counting_client.answer_requests(requests)
    if isinstance(answers, str):
        return [{"no_peak": answers}] * len(requests)
    return [{} if answer is None else answer for answer in answers]


def tried_sizes(row: Row, found: StepAnswer) -> dict[int, int]:
    """Map each batch or text length that was tried to the peak in device memory, in bytes.

    found: answer to the search of the row. The sizes in it are strings, because it comes from JSON.
    """
    return {int(number): peak - row["ledger"]["host_B"] for number, peak in found.get("tried", {}).items()}


def _lasting(row: Row) -> int:
    return sum(int(row["ledger"][part]) for part in ("weights_B", "adapter_B", "gradients_B", "optimizer_B"))
