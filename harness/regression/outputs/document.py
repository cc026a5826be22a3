"""Format a gate as one JSON document, with equal rows and the meaning of the kinds."""

from __future__ import annotations

from typing import Any

from harness.analysis.comparison.against_baseline import Against
from harness.analysis.comparison.baseline_rows import (
    COUNTED_PEAK_B,
    MEANING,
    PROCESS_PEAK_B,
    PROCESS_SHARE,
    ComparisonRow,
)
from harness.records.store import Run
from harness.regression.baseline.store import Baseline

SCHEMA = 1


def document(against: Against, baseline: Baseline, run: Run) -> dict[str, Any]:
    """Return the document of `--json`: bytes, seconds and shares of 1."""
    provenance = baseline.provenance
    return {
        "schema": SCHEMA,
        "run": run.manifest.run,
        "baseline": {"name": baseline.name, "path": str(baseline.path), "why": baseline.why}
        | ({} if provenance is None else provenance.model_dump(mode="json", by_alias=True)),
        "verdict": against.verdict.word.value,
        "reason": against.verdict.reason,
        "exit": int(against.exit),
        "compared": against.compared,
        "cells": against.cells,
        "margins": {
            "memory_B": against.margins.memory_B,
            "counted_peak_B": COUNTED_PEAK_B if against.margins.memory_B is None else against.margins.memory_B,
            "process_peak_B": PROCESS_PEAK_B if against.margins.memory_B is None else against.margins.memory_B,
            "process_share": PROCESS_SHARE if against.margins.memory_B is None else 0.0,
            "accuracy": against.margins.accuracy,
        },
        "rows": [_row(row) for row in against.rows],
        "unreadable": list(against.unreadable),
        "changed": list(against.changed),
        "notes": list(against.notes),
        "kinds": {kind.value: meaning for kind, meaning in MEANING.items()},
    }


def _row(row: ComparisonRow) -> dict[str, Any]:
    return {
        "kind": row.kind.value,
        "word": row.word.value,
        "judged": row.judged,
        "name": row.name,
        "cells": list(row.cells),
        "what": row.what,
        "unit": row.unit,
        "base": row.base,
        "new": row.new,
        "delta": row.delta,
        "interval": None if row.interval is None else list(row.interval),
        "reason": row.reason,
        "records": list(row.records),
    }
