"""Colours and signs of verdicts and statuses."""

from __future__ import annotations

from harness.analysis.run_facts import CHANGED, UNGATED
from harness.analysis.verdict_kind import VerdictKind
from harness.conformance.findings.outcomes import CheckStatus
from harness.records.record import Status

TONES: dict[str, str] = {
    VerdictKind.PASS: "good",
    VerdictKind.FAIL: "bad",
    Status.OK: "good",
    Status.NONCONFORMING: "bad",
    Status.UNTRAINED: "bad",
    Status.SKIPPED: "quiet",
    CheckStatus.UNSUPPORTED: "quiet",
    CHANGED: "bad",
    UNGATED: "bad",
}
ICONS = {"good": "✓", "bad": "✗", "open": "?", "quiet": "–"}


def tone(word: str) -> str:
    """Return the name of the colour of a verdict or status: `open` if it is neither good nor bad."""
    return TONES.get(word, "open")


def icon(word: str) -> str:
    """Return the sign of a verdict or status, which shows its meaning without colour."""
    return ICONS[tone(word)]


def badge(word: str, colour: str = "") -> dict[str, str]:
    """Return a verdict or status with its colour and sign, for a template. colour: by default, the result of `tone`."""
    colour = colour or tone(word)
    return {"word": str(word), "tone": colour, "icon": ICONS[colour]}
