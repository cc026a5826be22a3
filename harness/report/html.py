"""Write the report: one HTML file that needs no network and runs only its own script."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from harness import resources
from harness.analysis.comparison.reproducibility import Rerun
from harness.analysis.run_facts import RunFacts
from harness.errors import UsageError
from harness.records import files, store
from harness.report import view

TEMPLATE = "report.html.j2"


def render(analysed: Sequence[RunFacts], again: Sequence[Rerun] | None = None) -> str:
    """Return the page of one or several runs. again: their reruns; None if none are possible."""
    return fill(TEMPLATE, view.build(analysed, again))


def fill(template: str, page: Mapping[str, Any]) -> str:
    """Return a filled template. Names and messages are untrusted, so everything is escaped."""
    # A late import, so that `peft-harness --help` stays fast.
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    folder = resources.data_folder("report_templates")
    style = (folder / "report.css").read_text(encoding="utf-8")
    script = (folder / "report.js").read_text(encoding="utf-8")
    environment = Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(
        page={**page, "generated": store.now()},
        # Two files of the package, never data: the only unescaped text on the page.
        style=Markup(style),  # noqa: S704
        script=Markup(script),  # noqa: S704
        policy=policy(style, script),
    )


def policy(style: str, script: str) -> str:
    """Return the Content-Security-Policy under which only this style and this script run."""
    return (
        f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; img-src data:;"
        " base-uri 'none'; form-action 'none'"
    )


def page_path(out: Path, option: str = "--out") -> Path:
    """Return `out` if it is an HTML file that may be written. Raises UsageError for another kind of file or a device."""
    if out.suffix.lower() not in (".html", ".htm") or (out.exists() and not out.is_file()):
        raise UsageError(
            f"{out} is not a page", where=option, hint="name a file that ends in .html; an existing one is replaced"
        )
    return out


def write_page(page: str, out: Path) -> None:
    """Write a page to `out`, whole or not at all."""
    files.write_atomic(out, page.encode(errors="backslashreplace"))


def write_report(analysed: Sequence[RunFacts], out: Path, again: Sequence[Rerun] | None = None) -> None:
    """Write the report of one or several runs to `out`, whole or not at all."""
    write_page(render(analysed, again), out)


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
