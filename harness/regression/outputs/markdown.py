"""Format the result of a regression gate as Markdown for a CI job's summary: the verdict, then rows by importance.

Rows beyond GitHub's size limit are left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from harness.analysis.comparison.baseline_rows import GateResult, RowKind
from harness.regression.outputs import formatting
from harness.regression.outputs.formatting import HEAD
from harness.report.formatting import escape_markdown
from harness.report.tones import icon

LIMIT_B = 1024 * 1024
"""Size limit of a job summary in bytes. GitHub does not show a larger summary at all."""
_ROOM_B = 1024
"""Bytes reserved for the sentence about omitted rows."""
_LONGEST = 20_000
"""Largest number of characters in one field. A reason may name hundreds of files."""


def render(result: GateResult, title: str, limit_B: int = LIMIT_B) -> bytes:  # B is the unit
    """Return the summary in UTF-8, smaller than `limit_B` bytes. If rows are left out, the last line counts them."""
    v = result.verdict
    text = [f"## {icon(v.word)} {_clean(title)}: {v.word.value}\n\n{_clean(v.reason)}\n\n"]
    used, left_out, total, open_table = len(text[0].encode()), 0, 0, ""
    for table, line in _lines(result):
        total += 1
        head = f"\n### {table}\n\n{_line(HEAD)}{_line(['---'] * len(HEAD))}" if table not in ("", open_table) else ""
        size = len(f"{head}{line}".encode())
        if left_out or used + size > limit_B - _ROOM_B:  # rows are in order of importance: after one omission, omit all
            left_out += 1
            continue
        text.append(head + line)
        used, open_table = used + size, table
    if left_out:
        text.append(f"\n{left_out} of {total} lines left out, to stay under 1 MiB: `--json` has all of them.\n")
    return "".join(text).encode()


def _lines(result: GateResult) -> Iterator[tuple[str, str]]:
    """Yield pairs: the title of a table, and one line of this table.

    Rows that need attention come first, for all kinds. Then come the other rows with different values. Lines about
    files come last, with an empty title.
    """
    rows = formatting.by_severity(row for row in result.rows if not row.same)
    for attention in (True, False):
        for kind in RowKind:
            for row in rows:
                if row.kind is kind and formatting.needs_attention(row) is attention:
                    title = kind.value if attention or not row.judged else f"{kind.value}, passed"
                    yield title, _line(formatting.fields(row))
    for why in (*result.unreadable, *result.changed):
        yield "", f"\n- {_clean(why)}\n"


def _line(fields: Iterable[str]) -> str:
    return f"| {' | '.join(field if field == '---' else _clean(field) for field in fields)} |\n"


def _clean(text: str) -> str:
    """Escape a text so that Markdown shows it unchanged on one line. Cut off a text that is too long."""
    short = text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"
    return escape_markdown(short)
