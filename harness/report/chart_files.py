"""Files of single charts, light and dark, for a README or a paper. Each file contains its style, title and legend."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness.analysis.run_facts import RunFacts
from harness.errors import UsageError
from harness.records import files
from harness.report import chart_sets, html, junit_xml
from harness.report.svg.charts import fitted

_DARK = re.compile(r"@media \(prefers-color-scheme: dark\) \{\n(.*?)\n\}", re.DOTALL)
_COLUMNS, _COLUMN, _ROW, _HEAD = 3, 185.0, 18.0, 28.0
"""- _COLUMNS, _COLUMN: number and width of the legend's columns.
- _ROW: height of a row of the legend.
- _HEAD: height of the title.

Sizes are in SVG units."""


def write_charts(analysed: Sequence[RunFacts], folder: Path, option: str = "--svg") -> list[Path]:
    """Write every chart of some runs to `folder`, and return the paths. Raises UsageError if that fails.

    option: name of the command's option, for the error message.
    """
    styles, written = {scheme: _style(dark=scheme == "dark") for scheme in ("light", "dark")}, []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, page in _pages(analysed).items():
            for scheme, style in styles.items():
                text = junit_xml.clean(html.fill("chart.svg.j2", page, style))
                written.append(folder / f"{name}-{scheme}.svg")
                files.write_atomic(written[-1], text.encode(errors="backslashreplace"))
    except OSError as error:
        what = f"cannot be written: {error.strerror}"
        raise UsageError(what, where=f"{option} {folder}", hint="name a folder for the files") from error
    return written


def _pages(analysed: Sequence[RunFacts]) -> dict[str, dict[str, Any]]:
    """Return file name -> values for its template, for each chart. A file name consists of model, task and title."""
    found: dict[str, dict[str, Any]] = {}
    for f, one in ((facts, one) for facts in analysed for one in chart_sets.every(facts)):
        legend = [entry for entry in one["legend"] if entry["shown"]]
        for k, entry in enumerate(legend):
            entry |= {"x": k % _COLUMNS * _COLUMN, "y": k // _COLUMNS * _ROW, "short": fitted(entry["name"], 140)}
        for figure in one["figures"]:
            texts = (f.prefix, one["title"], figure["title"])
            words = (re.sub(r"[^a-z0-9.]+", "-", text.lower())[:60].strip("-.") for text in texts)
            name = "-".join(filter(None, words))
            while name in found:
                name += "-more"
            marks = [m for m in figure["marks"] if not m["attributes"]["class"].endswith(" off")]
            page = {"title": f"{figure['title']}, {one['title']}", "chart": figure | {"marks": marks}, "legend": legend}
            below = _HEAD + figure["height"] + 6
            found[name] = page | {"below": below, "height": below + (len(legend) + 2) // _COLUMNS * _ROW}
    return found


def _style(*, dark: bool) -> str:
    """Return the CSS of charts, with variables replaced by their values, because only browsers support variables."""
    page, rules = html.template_text("report.css", "charts.css"), html.template_text("charts.css")
    named = [_DARK.sub("", page), *(_DARK.findall(page) if dark else ())]
    values = dict(pair for text in named for pair in re.findall(r"--([\w-]+): ([^;]+);", text))
    drawn = _DARK.sub("", rules).partition("/* ---- only on the page")[0].partition("}\n")[2]
    return re.sub(r"var\(--([\w-]+)\)", lambda found: values[found[1]], drawn)
