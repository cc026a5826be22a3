"""HTML page of a nightly run: verdict, next steps, its parts (commands of peft-harness), failures and numbers."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from harness.errors import first_names, plural
from harness.regression.night import summary
from harness.regression.night.results import PartResult, PartTable, PlannedPart
from harness.report import html
from harness.report.formatting import field, unmeasured
from harness.report.formatting import seconds as duration
from harness.report.table_model import column, grouped
from harness.report.tones import badge

if TYPE_CHECKING:
    from harness.regression.night.run import NightRun

TEMPLATE = "night.html.j2"
_TONES = {"ok": "good", "finding": "bad", "failed": "bad", "cut": "open", "not-run": "quiet", "waiting": "quiet"}
_LONG = 40
"""Number of characters above which the text of a table field is wrapped."""
_LONGEST = 180
"""Largest number of characters of a failure at the top of the page. Longer texts are shortened."""
_MOST_SHOWN = 3
"""Number of failures of a part that are visible before the reader opens the rest."""
_MOST_NAMED = 5
"""The top of the page names at most this many parts for each status, and shows failures of at most this many parts."""
_PAGES = {"check.html": "checks", "claims.html": "claims", "report.html": "report", "log.txt": "log"}


def render(night: NightRun, waiting: Sequence[PlannedPart]) -> str:
    """Return the page as HTML. waiting: the parts that have not ended yet."""
    return html.fill(TEMPLATE, build(night, waiting))


def build(night: NightRun, waiting: Sequence[PlannedPart]) -> dict[str, Any]:
    """Return the content of the page as one dict of plain values."""
    manifest, counts = night.manifest, Counter(one.status for one in night.results)
    here = manifest.environment
    word, tone = _verdict(night, bool(waiting))
    return {
        "place": manifest.card or here.machine.get("cpu", "a CPU"), "is_rehearsal": manifest.device == "cpu",
        "night": manifest.night, "started": manifest.started, "budget": duration(manifest.budget_s),
        "verdict": badge(word, tone) | {"exit": f"exit code {int(night.exit)}"}, "reason": _reason(night, waiting),
        "wrong": _wrong(night.results),
        "counts": [badge(status, _TONES[status]) | {"count": count} for status, count in counts.items()],
        "next": summary.next_steps(night), "parts": _parts(night.results, waiting),
        "failed": [_failed(one) for one in night.results if one.failures],
        "numbers": [_numbers(one, one.table) for one in night.results if one.table is not None and one.table.rows],
        "environment": {**here.machine, **here.software, "code": here.code_version}, "notes": manifest.notes,
        "left_out": _left_out(night),
    }  # fmt: skip


def _verdict(night: NightRun, is_running: bool) -> tuple[str, str]:
    """Return the verdict of the nightly run in a few words, and the name of its colour."""
    words = {
        0: ("pass, but parts are left out", "open") if night.left_out else ("pass", "good"),
        1: ("findings", "bad"),
        4: ("interrupted" if night.interrupted else "incomplete", "open"),
        5: ("nothing measured", "quiet"),
    }
    return ("running", "open") if is_running and not night.interrupted else words[int(night.exit)]


def _reason(night: NightRun, waiting: Sequence[PlannedPart]) -> str:
    """Return the reason for the verdict: no GPU, or else the parts that are not ok and a missing baseline."""
    if night.missing:
        return f"nothing was run: {night.missing}"
    names: dict[str, list[str]] = {}
    for one in night.results:
        if one.status != "ok":
            names.setdefault(one.status, []).append(one.name)
    said = [f"{status}: {first_names(names[status], _MOST_NAMED)}" for status in _TONES if status in names]
    said += [f"waiting: {plural(len(waiting), 'part')}"] if waiting else []
    failures = [one.name for one in night.results if one.status == "ok" and one.failures]
    said += [f"failures that are no finding: {first_names(failures, _MOST_NAMED)}"] if failures else []
    ran = "the part" if len(night.results) == 1 else f"all {len(night.results)} parts"
    said = said or [f"{ran} ran, and found nothing wrong"]
    return "; ".join(filter(None, [*said, night.without_baseline]))


def _wrong(results: Sequence[PartResult]) -> list[dict[str, str]]:
    """Return the first parts with failures, each with its first failure in one line."""
    failed = [one for one in results if one.failures][:_MOST_NAMED]
    texts = [dict.fromkeys([one.because, one.failures[0].what]) for one in failed]
    return [
        {"name": one.name, "what": textwrap.shorten(": ".join(filter(None, text)), _LONGEST, placeholder=" …")}
        for one, text in zip(failed, texts, strict=True)
    ]


def _left_out(night: NightRun) -> str:
    """Return a sentence that names the parts left out for lack of time or by an interruption; empty if none."""
    why = "by the interruption" if night.interrupted else "for lack of time"
    return f"Left out {why}: {', '.join(night.left_out)}." if night.left_out else ""


def _parts(results: Sequence[PartResult], waiting: Sequence[PlannedPart]) -> dict[str, Any]:
    columns = [
        column("Status", number=False), column("Result", number=False), column("Took"),
        column("CPU", "processor seconds of all its processes"), column("Estimate", "time planned for the part"),
        column("At most", "time after which the part is ended, so that later parts are reached"),
        column("Command", number=False),
    ]  # fmt: skip
    rows = [*map(_ended, results), *(_row(one, "waiting", "", [None, None], one.limit_s or None) for one in waiting)]
    return grouped("parts-table", "Parts of the night", columns, [("", rows)], file="night-parts", first="Part", by="")


def _ended(one: PartResult) -> dict[str, Any]:
    result = "; ".join(filter(None, [one.summary, one.because]))
    row = _row(one, one.status, result, [one.seconds, one.cpu_s], one.limit_s)
    if one.table is not None and one.table.rows:
        return row | {"anchor": "", "href": f"#{one.name}"}
    return row | ({"anchor": "", "href": f"#failed-{one.name}"} if one.failures else {})


def _row(
    part: PartResult | PlannedPart, status: str, result: str, took_s: Sequence[float | None], limit_s: float | None
) -> dict[str, Any]:
    """Return the row of a part in the table of parts. took_s: wall time and processor time of the part, in seconds."""
    mark = badge(status, _TONES[status])
    return {
        "name": part.name, "title": part.title, "anchor": f"part-{part.name}", "record": "", "href": "",
        "fields": [
            field(f"{mark['icon']} {status}", status, tone=mark["tone"]), field(result, result, tone="wrap"),
            *map(_time, took_s), field(duration(part.estimate_s), part.estimate_s), _time(limit_s),
            field(part.command, part.command, tone="code"),
        ],
    }  # fmt: skip


def _time(seconds: float | None) -> Any:
    return unmeasured("not started") if seconds is None else field(duration(seconds), seconds)


def _failed(result: PartResult) -> dict[str, Any]:
    failures = [one.model_dump() for one in result.failures]
    return {"name": result.name, "failures": failures[:_MOST_SHOWN], "more": failures[_MOST_SHOWN:]}


def _numbers(result: PartResult, table: PartTable) -> dict[str, Any]:
    rows = [
        {
            "name": row[0] or "-", "title": row[0], "anchor": f"{result.name}-{number}", "record": "", "href": "",
            "fields": [field(text, text, tone="wrap" if len(text) > _LONG else "") for text in row[1:]],
        }
        for number, row in enumerate(table.rows)
    ]  # fmt: skip
    columns = [column(label, number=False) for label in table.columns[1:]]
    made = grouped(
        f"{result.name}-table", result.title, columns, [("", rows)], file=f"night-{result.name}",
        first=table.columns[0] or "Measurement", by="",
    )  # fmt: skip
    links = [{"href": file, "text": _PAGES.get(file.rpartition("/")[2], file)} for file in result.files]
    return {
        "name": result.name, "title": result.title, "table": made, "links": links, "notes": table.notes,
        "summary": "; ".join(filter(None, [result.summary, result.because])),
        "command": result.command, "badge": badge(result.status, _TONES[result.status]),
    }  # fmt: skip
