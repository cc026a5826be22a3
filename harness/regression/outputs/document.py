"""Format the result of a regression gate as one JSON document.

A row compares one property of a Cell or of the run, such as a peak of memory, with the baseline. The document has every
row, even those that the terminal leaves out, and says what each kind of row means.
"""

from __future__ import annotations

from typing import Any

from harness.analysis.comparison.against_baseline import BaselineVerdict
from harness.analysis.comparison.baseline_rows import COUNTED_PEAK_B, MEANING, PROCESS_PEAK_B, PROCESS_SHARE
from harness.records.store import Run
from harness.regression.baseline.store import Baseline

SCHEMA = 1


def document(result: BaselineVerdict, baseline: Baseline, run: Run) -> dict[str, Any]:
    """Return the JSON document of `gate RUN --baseline NAME --json`, in bytes, seconds and shares from 0 to 1."""
    chosen_B = result.margins.memory_B
    return {
        "schema": SCHEMA, "run": run.manifest.run, "baseline": baseline.document(),
        "verdict": result.verdict.word, "reason": result.verdict.reason, "exit": result.exit,
        "compared": result.compared, "cells": result.cells,
        "margins": {
            "memory_B": chosen_B, "counted_peak_B": COUNTED_PEAK_B if chosen_B is None else chosen_B,
            "process_peak_B": PROCESS_PEAK_B if chosen_B is None else chosen_B,
            "process_share": PROCESS_SHARE if chosen_B is None else 0.0, "accuracy": result.margins.accuracy,
        },
        "rows": [{**vars(row), "judged": row.judged, "delta": row.delta} for row in result.rows],
        "unreadable": result.unreadable, "changed": result.changed, "notes": result.notes, "kinds": MEANING,
    }  # fmt: skip
