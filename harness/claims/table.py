"""The claim ledger as text for a terminal. No torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from harness.claims.judge import ClaimVerdict, JudgedClaim
from harness.errors import plural

_WIDEST_HOW = 160
"""Characters of arithmetic in a line; all of it stands in the JSON document and on the page."""

RULES_UNTOLD = (
    "This ledger is of an older version, and does not say which figures come out by a looser rule than rounding."
)


def as_text(rows: Sequence[JudgedClaim]) -> str:
    """Lay the ledger out: a line for each claim, and the arithmetic of those that do not plainly come out."""
    lines: list[str] = []
    paper = ""
    for row in rows:
        if row.paper != paper:
            paper = row.paper
            lines += [""] * bool(lines) + [f"{paper} ({row.version})"]
        lines += _claim(row)
    untold = ["", RULES_UNTOLD] * any(row.rule is None for row in rows)
    return "\n".join([*lines, *untold, "", summary(rows)])


def summary(rows: Sequence[JudgedClaim]) -> str:
    """Say how many claims got each verdict."""
    counts = Counter(row.verdict for row in rows)
    in_small = Counter(row.verdict for row in rows if row.stood_in)
    said = ", ".join(
        f"{counts[verdict]} {verdict}{f' ({small} by a stand-in)' if (small := in_small[verdict]) else ''}"
        for verdict in ClaimVerdict
        if counts[verdict]
    )
    return f"{plural(len(rows), 'claim')}{': ' * bool(said)}{said}"


def _claim(row: JudgedClaim) -> Iterator[str]:
    got = f"; {row.got}" if row.got else ""
    yield f"  {row.verdict:<16}  {row.id}: the paper prints {row.printed}{got}  [{row.source}]"
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
