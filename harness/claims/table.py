"""The claim ledger, i.e. all judged claims, as text for a terminal. Imports no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from harness.claims.judge import ClaimVerdict, JudgedClaim
from harness.errors import plural

_WIDEST_HOW = 160
"""Number of characters after which a line of the table cuts off the arithmetic of a result. The JSON document and the
HTML page show it in full."""

NO_RULES = "This ledger is from an older version, which does not show rules looser than rounding."


def lines(rows: Sequence[JudgedClaim]) -> list[str]:
    """Return the judged claims as lines of text, one line per claim.

    Further lines with details follow a claim whose verdict is not `reproduced`.
    """
    found: list[str] = []
    paper = ""
    for row in rows:
        if row.paper != paper:
            paper = row.paper
            found += [""] * bool(found) + [f"{paper} ({row.version})"]
        found += _claim(row)
    footnote = ["", NO_RULES] * any(row.rule is None for row in rows)
    return [*found, *footnote, "", summary(rows)]


def summary(rows: Sequence[JudgedClaim]) -> str:
    """Return the number of claims per verdict, as text."""
    counts = Counter(row.verdict for row in rows)
    stand_ins = Counter(row.verdict for row in rows if row.stood_in)
    parts = ", ".join(
        f"{counts[verdict]} {verdict}{f' ({small} by a stand-in)' if (small := stand_ins[verdict]) else ''}"
        for verdict in ClaimVerdict
        if counts[verdict]
    )
    return f"{plural(len(rows), 'claim')}{': ' * bool(parts)}{parts}"


def _claim(row: JudgedClaim) -> Iterator[str]:
    got = f"; {row.got}" if row.got else ""
    yield f"  {row.verdict:<16}  {row.id}: printed {row.printed}{got}  [{row.source}]"
    indent = " " * 20
    if row.verdict is ClaimVerdict.REPRODUCED:
        if row.stood_in:
            yield f"{indent}{row.why}"
        return
    yield f"{indent}{row.sentence}"
    if row.under:
        yield f"{indent}under: {row.under}"
    if row.why:
        yield f"{indent}{row.why}"
    for one in row.tried:
        name = f"{one.under}: " if one.under else ""
        if one.ours:
            yield f"{indent}{name}{one.ours} from {_short(one.how)}"
    if row.note:
        yield f"{indent}{row.note}"


def _short(how: str) -> str:
    return how if len(how) <= _WIDEST_HOW else f"{how[: _WIDEST_HOW - 4]} ..."
