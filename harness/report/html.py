"""Report of runs: one HTML file that needs no network. It contains its style and the only script that may run."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness import resources
from harness.analysis.comparison.reproducibility import Rerun
from harness.analysis.run_facts import RunFacts
from harness.errors import UsageError
from harness.records import files, store
from harness.report import view

if TYPE_CHECKING:
    from jinja2 import Environment

TEMPLATE = "report.html.j2"


def render(analysed: Sequence[RunFacts], again: Sequence[Rerun] | None = None) -> str:
    """Return the page of one or several runs. again: comparisons of reruns; None if there can be no rerun."""
    return fill(TEMPLATE, view.build(analysed, again))


def fill(template: str, page: Mapping[str, Any], style: str = "") -> str:
    """Return a template filled with `page`. Every value is escaped, since names and messages are untrusted.

    style: CSS of the result; by default, the CSS of the report.
    """
    from markupsafe import Markup

    style = style or template_text("report.css", "charts.css")
    script = template_text("tables.js", "download.js", "charts.js")
    compiled = _environment().get_template(template)
    return compiled.render(
        page={**page, "generated": store.now()},
        # These files of the package, never data, are the only unescaped text on the page.
        style=Markup(style),  # noqa: S704
        script=Markup(script),  # noqa: S704
        policy=policy(style, script),
    )


@cache
def _environment() -> Environment:
    """Return the Jinja environment of the templates. It compiles each template once in a process."""
    # The import is late, so that `peft-harness --help` stays fast.
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(resources.data_folder("report_templates")),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["prose"] = _prose
    environment.policies["json.dumps_kwargs"] = {}  # keys stay in their order, which is faster
    return environment


def _prose(text: str) -> str:
    """Return a text as escaped HTML. Text between backticks becomes code."""
    from markupsafe import Markup, escape

    parts = text.split("`")
    if not len(parts) % 2:
        return escape(text)
    return Markup("").join(Markup("<code>{}</code>").format(part) if i % 2 else part for i, part in enumerate(parts))


def template_text(*names: str) -> str:
    """Return the joined text of the files `names` in `report_templates`."""
    folder = resources.data_folder("report_templates")
    return "\n".join((folder / name).read_text(encoding="utf-8") for name in names)


def policy(style: str, script: str) -> str:
    """Return a Content-Security-Policy that allows only the given style and script."""
    return (
        f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; img-src data:;"
        " base-uri 'none'; form-action 'none'"
    )


def page_path(out: Path, option: str = "--out") -> Path:
    """Return `out` if an HTML file may be written there. Raises UsageError for a folder, a device or another suffix."""
    if out.suffix.lower() not in (".html", ".htm") or (out.exists() and not out.is_file()):
        raise UsageError(
            f"{out} is no .html file", where=option, hint="name a file that ends in .html; an existing one is replaced"
        )
    return out


def write_page(page: str, out: Path) -> None:
    """Write a page to `out`. If this fails, `out` stays as it was."""
    files.write_atomic(out, page.encode(errors="backslashreplace"))


def write_report(analysed: Sequence[RunFacts], out: Path, again: Sequence[Rerun] | None = None) -> None:
    """Write the report of one or several runs to `out`. If this fails, `out` stays as it was."""
    write_page(render(analysed, again), out)


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
