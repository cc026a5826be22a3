"""Format the result of a regression gate as annotations for GitHub: workflow commands, one per line."""

from __future__ import annotations

import os
from collections.abc import Sequence

from harness.analysis.comparison.baseline_rows import ComparisonRow, GateResult, RowKind
from harness.analysis.verdict_kind import VerdictKind
from harness.regression.outputs import formatting

_SHOWN = 10
"""Number of annotations of each level that GitHub shows per step. GitHub drops the rest silently."""


def is_job() -> bool:
    """Return whether this process runs in a job of GitHub Actions."""
    return os.environ.get("GITHUB_ACTIONS") == "true"


def lines(result: GateResult) -> list[str]:
    """Return the workflow commands.

    Failed rows and changed files become errors. Undecided or missing rows and unreadable files become warnings. GitHub
    shows only a few of each. If there are more, the last one says how many are left out.
    """
    failed, open_ = result.of(VerdictKind.FAIL), result.of(VerdictKind.NOT_RUN, VerdictKind.INCONCLUSIVE)
    found = _level("error", failed, [f"changed since its run: {what}" for what in result.changed])
    return found + _level("warning", open_, [f"unreadable: {why}" for why in result.unreadable])


def _level(level: str, rows: Sequence[ComparisonRow], files: Sequence[str]) -> list[str]:
    entries = [(row.kind.value, _sentence(row)) for row in rows] + [("files", what) for what in files]
    shown = entries if len(entries) <= _SHOWN else entries[: _SHOWN - 1]
    more = [("more", f"and {len(entries) - len(shown)} more; the table has all")] if len(entries) > len(shown) else []
    return [
        f"::{level} title={_property(f'peft-harness gate: {kind}')}::{_data(text)}" for kind, text in [*shown, *more]
    ]


def _sentence(row: ComparisonRow) -> str:
    if row.kind in (RowKind.ENVIRONMENT, RowKind.ASSETS):
        return f"{row.name}: {row.reason}"
    return f"{row.name}: {formatting.sentence(row, ' ')}"


def _data(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")
