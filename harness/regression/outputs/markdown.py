"""Format a gate as Markdown for the summary of a CI job: the verdict, then the worst rows, up to the limit of GitHub."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from harness.analysis.comparison.baseline_rows import FindingKind, Findings
from harness.regression.outputs import formatting
from harness.regression.outputs.formatting import HEAD
from harness.report.tones import icon

LIMIT_B = 1024 * 1024
"""Size limit of GitHub; a larger summary is not shown at all."""
_ROOM_B = 1024
"""Space reserved for the sentence about omitted rows."""
_LONGEST = 20_000
"""Characters of one field: a reason may name hundreds of files."""
_SPECIAL = re.compile(r"([\\`*_\[\]<>|~#])")


def render(findings: Findings, title: str, limit_B: int = LIMIT_B) -> bytes:  # B is the unit
    """Return the summary in UTF-8, smaller than `limit_B` bytes; its last line has the number of rows left out."""
    v = findings.verdict
    text = [f"## {icon(v.word)} {_clean(title)}: {v.word.value}\n\n{_clean(v.reason)}\n\n"]
    used, left_out, total = len(text[0].encode()), 0, 0
    room = limit_B - _ROOM_B
    open_kind = ""
    for kind, line in _lines(findings):
        total += 1
        head = "" if kind == open_kind else f"\n### {kind}\n\n{_line(HEAD)}{_line(['---'] * len(HEAD))}"
        size = len((head + line).encode())
        if left_out or used + size > room:  # sorted by importance: after one omission, omit all
            left_out += 1
            continue
        text.append(head + line)
        used, open_kind = used + size, kind
    for why in (*findings.unreadable, *findings.changed):
        line = f"\n- {_clean(why)}\n"
        total += 1
        if left_out or used + len(line.encode()) > room:
            left_out += 1
            continue
        text.append(line)
        used += len(line.encode())
    if left_out:
        text.append(f"\n{left_out} of {total} lines left out, to stay under 1 MiB: `--json` has all of them.\n")
    return "".join(text).encode()


def _lines(findings: Findings) -> Iterator[tuple[str, str]]:
    """Yield each line with the title of its table: rows of all kinds that need attention, then other differences."""
    rows = [row for row in findings.rows if not row.same]
    for loud in (True, False):
        for kind in FindingKind:
            mine = [row for row in rows if row.kind is kind and formatting.loud(row) is loud]
            for row in sorted(mine, key=lambda row: formatting.ORDER.index(row.word)):
                yield _title(kind, loud), _line(formatting.fields(row))


def _title(kind: FindingKind, loud: bool) -> str:
    return (
        kind.value
        if loud
        else f"{kind.value}, passed"
        if kind not in (FindingKind.TIME, FindingKind.NEW)
        else kind.value
    )


def _line(fields: Iterable[str]) -> str:
    return f"| {' | '.join(field if field == '---' else _clean(field) for field in fields)} |\n"


def _clean(text: str) -> str:
    """Escape text so that Markdown shows it unchanged, on one line."""
    short = text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"
    return _SPECIAL.sub(r"\\\1", " ".join(short.split()))
