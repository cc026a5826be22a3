"""HTML page with the verdicts on all claims by paper, or only on the headline claims. This module imports no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.analysis.grouping import group
from harness.claims.judge import MEANING, ClaimVerdict, JudgedClaim
from harness.report import html
from harness.report.formatting import DASH, Field, field
from harness.report.table_model import Table, column, grouped
from harness.report.tones import badge

LEDGER = "claims.html.j2"
HEADLINES = "headlines.html.j2"
_WAYS = ("by arithmetic", "on a GPU", "by a rehearsal", "by training")
"""Columns in the table of the headline claims: the ways in which a claim can be decided."""
_COLUMNS: Sequence[tuple[str, str, str, str]] = (
    ("Verdict", "whether our number is the printed one; see Terms below", "verdict", ""),
    ("Statement", "the claim as one sentence", "sentence", "wrap"),
    ("Printed", "the number or the words of the paper", "printed", "narrow"),
    ("Our number", "the number that was computed here", "ours", "narrow"),
    ("Rule other than rounding", "when our number counts as the printed one, if not by rounding", "rule", "narrow"),
    ("Convention or reason", "what the verdict depends on, or why there is none", "under_or_why", "wrap"),
    ("Source", "place in the paper", "section", ""),
    ("Tier", "what the claim needs; see Terms below", "tier", ""),
    ("Arithmetic", "how our number was computed", "how", "wrap code"),
)
"""Columns in the tables of claims: (heading, explanation, key of the text in a row, style)."""
_TONES = {ClaimVerdict.REPRODUCED: "good", ClaimVerdict.NOT_REPRODUCED: "bad", ClaimVerdict.NOT_RUN: "quiet"}


def write_page(rows: Sequence[JudgedClaim], software: Mapping[str, str], out: Path, *, headlines: bool = False) -> None:
    """Write the page to `out`. If this fails, `out` stays as it was. headlines: write only the headline claims."""
    html.write_page(html.fill(HEADLINES if headlines else LEDGER, build(rows, software)), out)


def build(rows: Sequence[JudgedClaim], software: Mapping[str, str]) -> dict[str, Any]:
    """Return the content of the page as one dict of plain values."""
    rows = sorted(rows, key=lambda row: row.version)  # numbers of arXiv papers are chronological
    papers = group((row.paper, row) for row in rows)
    headlines = group((row.headline, row) for row in rows if row.headline)
    findings = [
        row
        for verdict in (ClaimVerdict.NOT_REPRODUCED, ClaimVerdict.MIXED, ClaimVerdict.UNDER)
        for row in rows
        if row.verdict is verdict
    ]
    return {
        "counts": _counts(rows),
        "meanings": [_badge(verdict) | {"meaning": meaning} for verdict, meaning in MEANING.items()],
        "total": len(rows),
        "headlines": [
            {
                "name": name,
                "rows": [_row(one) for one in sorted(claims, key=lambda row: list(ClaimVerdict).index(row.verdict))],
                "ways": [_counts([one for one in claims if _way(one) == way]) for way in _WAYS],
            }
            for name, claims in headlines.items()
        ],
        "ways": _WAYS,
        "findings": [_row(one) for one in findings],
        "papers": [
            {"name": name, "version": claims[0].version, "table": _table(name, [_row(one) for one in claims])}
            for name, claims in papers.items()
        ],
        "software": software,
    }


def _table(paper: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    """Return the table of the claims of one paper."""
    columns = [column(label, title, number=False) for label, title, *_ in _COLUMNS]
    shown = [
        {"name": row["id"], "title": "", "anchor": row["id"], "record": "", "href": "", "fields": _fields(row)}
        for row in rows
    ]
    return grouped(
        f"table-{paper}",
        f"Claims of {paper}",
        columns,
        [("", shown)],
        first="Claim",
        file=f"claims-{paper}",
        example="Table 2",
    )


def _fields(row: Mapping[str, Any]) -> list[Field]:
    verdict = row["badge"]
    return [
        field(f"{verdict['icon']} {verdict['word']}", verdict["word"], tone=verdict["tone"]),
        *(field(row[key], row[key], tone=style) for *_, key, style in _COLUMNS[1:]),
    ]


def _way(row: JudgedClaim) -> str:
    if row.tier != "gpu-synthetic":
        return "by arithmetic" if row.tier == "exact" else "by training"
    return "by a rehearsal" if row.scale else "on a GPU"


def _counts(rows: Sequence[JudgedClaim]) -> list[dict[str, Any]]:
    counts = Counter(row.verdict for row in rows)
    return [{**_badge(verdict), "count": counts[verdict]} for verdict in ClaimVerdict if counts[verdict]]


def _badge(verdict: ClaimVerdict) -> dict[str, str]:
    return badge(verdict, _TONES.get(verdict, "open"))


def _row(row: JudgedClaim) -> dict[str, Any]:
    readings = [
        {"under": one.under or "as stated", "ours": one.ours or DASH, "how": one.how or one.missing}
        for one in row.tried
    ]
    return row.model_dump() | {
        "source": f"{row.version}, {row.source}",
        "section": row.source,
        "ours": row.ours or DASH,
        "rule": "not recorded" if row.rule is None else row.rule,
        "got": row.got or "not computed here",
        "under_or_why": "; ".join(filter(None, [row.under, row.why])),
        "how": readings[0]["how"] if readings else "",
        "badge": _badge(row.verdict),
        "readings": readings,
    }
