"""HTML page of the claim ledger, by paper or of the headlines, in the style of a run's report. No torch."""

from __future__ import annotations

import datetime
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.claims.judge import MEANING, ClaimVerdict, JudgedClaim
from harness.records import files
from harness.report import html
from harness.report.tones import ICONS

LEDGER = "claims.html.j2"
HEADLINES = "headlines.html.j2"
_WAYS = ("by arithmetic", "on a GPU", "by a rehearsal", "by training")
"""Columns: the ways to decide a claim."""
_TONES = {
    ClaimVerdict.REPRODUCED: "good",
    ClaimVerdict.UNDER: "open",
    ClaimVerdict.NOT_REPRODUCED: "bad",
    ClaimVerdict.INCONCLUSIVE: "open",
    ClaimVerdict.NOT_RUN: "quiet",
}
_ICONS = {"quiet": "–", **ICONS}


def write_page(rows: Sequence[JudgedClaim], software: Mapping[str, str], out: Path, *, headlines: bool = False) -> None:
    """Write the page to `out`, whole or not at all. headlines: only the headlines instead of the whole ledger."""
    filled = html.fill(HEADLINES if headlines else LEDGER, build(rows, software))
    files.write_atomic(out, filled.encode(errors="backslashreplace"))


def build(rows: Sequence[JudgedClaim], software: Mapping[str, str]) -> dict[str, Any]:
    """Return the content of the page as one plain dict."""
    rows = sorted(rows, key=lambda row: row.version)  # arXiv numbers are chronological
    headlines: dict[str, list[JudgedClaim]] = {}
    papers: dict[str, list[JudgedClaim]] = {}
    for row in rows:
        papers.setdefault(row.paper, []).append(row)
        if row.headline:
            headlines.setdefault(row.headline, []).append(row)
    return {
        "counts": _counted(rows),
        "meanings": [_badge(verdict) | {"meaning": meaning} for verdict, meaning in MEANING.items()],
        "total": len(rows),
        "headlines": [
            {
                "name": name,
                "rows": [_row(one) for one in sorted(several, key=_weight)],
                "ways": [_counted([one for one in several if _way(one) == way]) for way in _WAYS],
            }
            for name, several in headlines.items()
        ],
        "ways": _WAYS,
        "findings": [
            _row(one)
            for kind in (ClaimVerdict.NOT_REPRODUCED, ClaimVerdict.UNDER)
            for one in rows
            if one.verdict is kind
        ],
        "papers": [
            {"name": name, "version": several[0].version, "rows": [_row(one) for one in several]}
            for name, several in papers.items()
        ],
        "software": [{"key": key, "value": value} for key, value in software.items()],
        "generated": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def _weight(row: JudgedClaim) -> int:
    """Sort decided claims before those that were not run."""
    return list(ClaimVerdict).index(row.verdict)


def _way(row: JudgedClaim) -> str:
    if row.tier == "trained":
        return _WAYS[3]
    if row.tier == "exact":
        return _WAYS[0]
    return _WAYS[2] if row.scale else _WAYS[1]


def _counted(rows: Sequence[JudgedClaim]) -> list[dict[str, Any]]:
    counts = Counter(row.verdict for row in rows)
    return [_badge(verdict) | {"count": counts[verdict]} for verdict in ClaimVerdict if counts[verdict]]


def _badge(verdict: ClaimVerdict) -> dict[str, Any]:
    tone = _TONES[verdict]
    return {"word": verdict.value, "tone": tone, "icon": _ICONS[tone]}


def _row(row: JudgedClaim) -> dict[str, Any]:
    return {
        "id": row.id,
        "sentence": row.sentence,
        "source": f"{row.version}, {row.source}",
        "section": row.source,
        "tier": row.tier,
        "printed": row.printed,
        "ours": row.ours or "—",
        "rule": "not said" if row.rule is None else row.rule,
        "got": row.got or "not computed here",
        "badge": _badge(row.verdict),
        "under": row.under,
        "why": row.why,
        "note": row.note,
        "readings": [
            {
                "under": one.under or "as stated",
                "ours": one.ours or "—",
                "how": one.how or one.missing,
                "measure": one.measure,
            }
            for one in row.tried
        ],
    }
