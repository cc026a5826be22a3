"""The claim ledger as one HTML page, in the style of the report of a run: headlines first, then paper by paper. No torch."""

from __future__ import annotations

import datetime
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from harness import store
from harness.claims.judging import MEANING, Judged, Verdict
from harness.report import html
from harness.report.facts import ICONS

TEMPLATE = "claims.html.j2"
_TONES = {
    Verdict.REPRODUCED: "good", Verdict.UNDER: "open", Verdict.NOT_REPRODUCED: "bad", Verdict.INCONCLUSIVE: "open",
    Verdict.NOT_RUN: "quiet",
}  # fmt: skip
_ICONS = {"quiet": "–", **ICONS}


def write_page(rows: Sequence[Judged], software: Mapping[str, str], out: Path) -> None:
    """Write the page to `out`, whole or not at all."""
    store.write_atomic(out, html.fill(TEMPLATE, build(rows, software)).encode(errors="backslashreplace"))


def build(rows: Sequence[Judged], software: Mapping[str, str]) -> dict[str, Any]:
    """Return what the page shows as one plain dict."""
    counts = Counter(row.verdict for row in rows)
    rows = sorted(rows, key=lambda row: row.version)  # the numbers of arXiv are in the order of time
    headlines: dict[str, list[Judged]] = {}
    papers: dict[str, list[Judged]] = {}
    for row in rows:
        papers.setdefault(row.paper, []).append(row)
        if row.headline:
            headlines.setdefault(row.headline, []).append(row)
    return {
        "counts": [_badge(verdict) | {"count": counts[verdict]} for verdict in Verdict if counts[verdict]],
        "meanings": [_badge(verdict) | {"meaning": meaning} for verdict, meaning in MEANING.items()],
        "total": len(rows),
        "headlines": [
            {"name": name, "rows": [_row(one) for one in sorted(several, key=_weight)]}
            for name, several in headlines.items()
        ],
        "findings": [
            _row(one) for kind in (Verdict.NOT_REPRODUCED, Verdict.UNDER) for one in rows if one.verdict is kind
        ],
        "papers": [
            {"name": name, "version": several[0].version, "rows": [_row(one) for one in several]}
            for name, several in papers.items()
        ],
        "software": [{"key": key, "value": value} for key, value in software.items()],
        "generated": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def _weight(row: Judged) -> int:
    """Put what was decided before what was not run."""
    return list(Verdict).index(row.verdict)


def _badge(verdict: Verdict) -> dict[str, Any]:
    tone = _TONES[verdict]
    return {"word": verdict.value, "tone": tone, "icon": _ICONS[tone]}


def _row(row: Judged) -> dict[str, Any]:
    return {
        "id": row.id,
        "sentence": row.sentence,
        "source": f"{row.version}, {row.source}",
        "section": row.source,
        "tier": row.tier,
        "printed": row.printed,
        "ours": row.ours or "—",
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
