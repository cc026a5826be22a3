"""Answer whether a training run with a given rank and batch fits, and find what would make it fit. Imports no torch.

The answer has one row for each Method, at one rank, with each base and each optimizer. For a row that does not fit,
training with changed settings is predicted too: gradient checkpointing, a 4-bit base, an 8-bit optimizer, layer-wise
updates, several of these together, and smaller batches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from harness.console import print_note
from harness.errors import UsageError, plural
from harness.memory_model import fit
from harness.memory_model.fit import DOES_NOT_FIT, FitRequest
from harness.memory_model.fit_search import LATE, MAX_BATCH, FitSearch, Row, run_steps, step_implementation, tried_sizes
from harness.memory_model.largest_batch import largest_fitting
from harness.memory_model.messages import MethodCount, ModelCount, StepAnswer, StepRequest
from harness.methods.spec import methods

_PACKED = "nf4"
"""4-bit base that is tried in place of an unpacked base."""
_EIGHT_BIT = {"adamw": "adamw-8bit", "paged-adamw": "paged-adamw-8bit"}
"""Optimizer -> the optimizer with moments in 8 bits that replaces it."""
_STEP_ERROR, _FORMULA_ERROR = 0.03, 0.2
"""Largest relative errors of a simulated step and of a closed form in tests. Both leave out the allocator's waste, the
workspaces of kernels and the CUDA context."""
_DOUBT = 0.25
"""Assumed largest relative error of a closed form; in tests, it is at most 20 %. A closed form of at most 75 % of the
available memory surely fits, and one of more than 125 % surely does not."""


@dataclass(frozen=True)
class _Change:
    """A training run with changed settings that make it smaller, and its closed-form result."""

    settings: dict[str, Any]
    """Name of each changed setting (`checkpointing`, `base`, `optimizer` or `layerwise`) -> its new value."""
    request: FitRequest
    row: Row


def answer(request: FitRequest, counted: ModelCount, document: Mapping[str, Any], *, by_steps: bool) -> dict[str, Any]:
    """Return `document` with predictions in its rows, and with an answer: does the requested batch fit?

    request: a request with a batch. document: the closed-form results. by_steps: True to predict from training steps on
    fake tensors, False to predict by closed forms.

    The key `answer` of the result is `yes` if at least one row fits, `no` if none fits, and `unknown` if no row is
    known to fit and a prediction is missing. Each row gets `fits`, `needed_B`, `free_B`, and `margin_B`, the largest
    error of the prediction. A row that does not fit also gets `largest_batch` (0 if not even one text fits, None if it
    is unknown) and `changes`: the settings that were tried, each with `fits`, `needed_B` and `free_B`. Raises
    UsageError if `by_steps` is False and the model has no closed form.
    """
    if not by_steps and not document["activations_known"]:
        what = f"there is no closed form of the activations of {request.model.name}"
        raise UsageError(what, where="--formulas", hint="leave out --formulas")
    asked = _Question(request, counted, document, by_steps)
    rows = asked.answered()
    fits = [row["fits"] for row in rows if row["ledger"]]
    word = "yes" if True in fits else "unknown" if None in fits or not fits else "no"
    checked = any(row.get("peak_B") is not None for row in rows)
    return dict(document) | {"batch": request.batch, "answer": word, "checked": checked, "rows": rows}


class _Question:
    """Predictions for the rows of a request that has a batch, and for changes to the rows that do not fit."""

    def __init__(self, request: FitRequest, counted: ModelCount, document: Mapping[str, Any], by_steps: bool) -> None:
        self.request, self.counted, self.document, self.by_steps = request, counted, document, by_steps
        self.tokens, self.room, self.batch = int(document["tokens"]), int(document["memory_B"]), request.batch or 1
        self.search = FitSearch(request, counted, document)

    def answered(self) -> list[Row]:
        """Return all rows with their predictions."""
        rows = [dict(row) for row in self.document["rows"]]
        there = [n for n, row in enumerate(rows) if row["ledger"]]
        predicted, _ = self._predicted([(self.request, rows[n]) for n in there])
        for n, row in zip(there, predicted, strict=True):
            rows[n] = row
        misfits = [row for row in predicted if row["fits"] is False]
        changes = [self._changes(row) for row in misfits]
        by_formulas = [self._largest_by_formulas(row) for row in misfits]
        searches = [
            self.search.largest(row, "batch", self.tokens, first=first or 1, most=min(MAX_BATCH, self.batch))
            for row, first in zip(misfits, by_formulas, strict=True)
            if self.by_steps
        ]
        flat = [(one.request, one.row) for of_row in changes for one in of_row]
        found, answers = self._predicted(flat, searches)
        predictions = iter(found)
        for n, row in enumerate(misfits):
            row["largest_batch"] = self._largest(row, answers[n]) if self.by_steps else by_formulas[n]
            row["changes"] = [
                {"settings": one.settings} | {key: made[key] for key in ("fits", "needed_B", "free_B")}
                for one, made in zip(changes[n], predictions, strict=False)
            ]
        return rows

    def _predicted(
        self, rows: list[tuple[FitRequest, Row]], searches: Sequence[StepRequest] = ()
    ) -> tuple[list[Row], list[StepAnswer]]:
        """Return each row with its prediction, and the answer to each of `searches` (for the largest batch that fits).

        A prediction is the keys `fits`, `needed_B`, `free_B`, `margin_B` and `because`. If `by_steps` is True, it comes
        from one simulated training step, and `peak_B` is its peak; if the step gave no peak, `peak_B` is None. Otherwise
        it comes from the closed form, and there are no searches. rows: pairs (request, row).
        """
        if not self.by_steps:
            return [_judged(row, row["ledger"]["total_B"], self.room) for _, row in rows], []
        if rows or searches:
            of_searches = f", and looking for the largest batch of {plural(len(searches), 'row')}" if searches else ""
            print_note(f"simulating {plural(len(rows), 'training step')}{of_searches} (a few seconds each) ...")
        steps = [FitSearch(how, self.counted, self.document).step(row, self.batch, self.tokens) for how, row in rows]
        answers = run_steps([*steps, *searches])
        found = [self._by_step(row, one) for (_, row), one in zip(rows, answers, strict=False)]
        return found, answers[len(rows) :]

    def _by_step(self, row: Row, found: StepAnswer) -> Row:
        by = {"peak_B": None, "peak_by": step_implementation(row["method"]), "no_peak": found.get("no_peak", LATE)}
        if "peak_B" not in found:
            known = self.document["activations_known"]
            return _judged(row | by, row["ledger"]["total_B"] if known else None, self.room)
        peak = found["peak_B"] - row["ledger"]["host_B"]
        ledger = row["ledger"] | {"left_B": self.room - peak}
        return _judged(row | by | {"peak_B": peak, "no_peak": "", "ledger": ledger}, peak, self.room)

    def _changes(self, row: Row) -> list[_Change]:
        """Return the changes to try for a row: each setting alone, checkpointing with one other, and all together."""
        (one,) = (c for c in self.counted["methods"][row["method"]] if c["rank"] == row["rank"] and not c["error"])
        found: dict[str, Any] = {} if self.request.checkpointing else {"checkpointing": True}
        if row["base"] == "none" and _PACKED in one["weights"]:
            found["base"] = _PACKED
        if (eight := _EIGHT_BIT.get(row["optimizer"])) in one["optimizer"]:
            found["optimizer"] = eight
        if methods()[row["method"]].spec.trains_weights and not self.request.layerwise:
            found["layerwise"] = True
        first = list(found)[:1]
        names = [[name] for name in found] + [[*first, name] for name in list(found)[1:]] * ("checkpointing" in found)
        names += [list(found)] * (len(found) > 1 and [*found] not in names)
        changes = [self._change(row, one, {name: found[name] for name in some}) for some in names]
        return self._worth_a_step(changes) if self.by_steps and self.document["activations_known"] else changes

    def _worth_a_step(self, changes: list[_Change]) -> list[_Change]:
        """Return the changes for which a step is simulated.

        By its closed form, a change may surely fit, surely not fit, or neither. Changes that surely do not fit are left
        out. If a change surely fits, changes of more settings are left out too.
        """
        shares = [one.row["ledger"]["total_B"] / self.room for one in changes]
        enough = [len(one.settings) for one, share in zip(changes, shares, strict=True) if share <= 1 - _DOUBT]
        most = min(enough, default=len(changes))
        return [
            one for one, share in zip(changes, shares, strict=True)
            if share <= 1 + _DOUBT and len(one.settings) <= most
        ]  # fmt: skip

    def _change(self, row: Row, one: MethodCount, settings: dict[str, Any]) -> _Change:
        how = {key: value for key, value in settings.items() if key in ("checkpointing", "layerwise")}
        request = replace(self.request, **how)
        base, optimizer = (str(settings.get(key, row[key])) for key in ("base", "optimizer"))
        changed = fit.requested_row(request, self.counted, self.tokens, one, row["method"], base, optimizer)
        return _Change(settings, request, fit.row_document(changed))

    def _largest(self, row: Row, found: StepAnswer) -> int | None:
        """Return the largest batch of a row that fits, 0 if not even one text fits, or None if it is unknown."""
        sizes = tried_sizes(row, found)
        fits = largest_fitting(sizes, self.room)
        return fits if fits or 1 in sizes else None

    def _largest_by_formulas(self, row: Row) -> int:
        ledger = row["ledger"]
        lasting = sum(ledger[part] for part in ("weights_B", "adapter_B", "gradients_B", "optimizer_B"))
        a_text = ((ledger["activations_B"] or 0) + (ledger["logits_B"] or 0)) // self.batch
        if lasting + max(a_text, ledger["step_B"]) > self.room:
            return 0
        return min(self.batch, (self.room - lasting) // a_text) if a_text else self.batch


def _judged(row: Row, needed_B: int | None, room: int) -> Row:
    if needed_B is None:
        return row | {"fits": None, "needed_B": None, "free_B": None, "margin_B": None}
    fits, error = needed_B <= room, _STEP_ERROR if row.get("peak_B") is not None else _FORMULA_ERROR
    outcome = {"fits": fits, "needed_B": needed_B, "free_B": room - needed_B, "margin_B": round(error * needed_B)}
    return row | outcome | {"because": "" if fits else DOES_NOT_FIT}
