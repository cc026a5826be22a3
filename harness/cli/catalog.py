"""Names that `list` shows, from the registry, the suites and the claim files."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from harness import yaml_validation
from harness.assets import shapes
from harness.assets.table import Source, load_table
from harness.cli.topics import glossary
from harness.conformance import checks, parity_suite
from harness.console import align_columns
from harness.methods.peft_config import UNREFERENCED
from harness.methods.registry import Registry, discover, targets
from harness.methods.spec import methods
from harness.records.record import SCHEMA
from harness.resources import data_folder
from harness.suites import loader, tasks

ListRow = dict[str, Any]
_WIDTH = 100
_SHOWN = 20
"""Maximum number of names per kind in the overview."""


def listing(kinds: Sequence[str] = ()) -> dict[str, Any]:
    """Return a JSON document with one row per name of each kind, such as `methods`. Without kinds, it has all kinds."""
    registry = discover()
    document: dict[str, Any] = {"schema": SCHEMA}
    for kind in kinds or KINDS:
        document[kind] = _ROWS[kind](registry)
        if kind == "implementations":
            document["broken"] = [{"name": name, "reason": reason} for name, reason in registry.broken.items()]
    return document


def overview(document: Mapping[str, Any]) -> list[str]:
    """Return the lines of one paragraph for each kind, with the number and the names of its entries."""
    lines = []
    for kind, rows in document.items():
        if kind == "schema" or (kind == "broken" and not rows):
            continue
        names = list(dict.fromkeys(row["name"] for row in rows))
        head = f"{kind:<{max(map(len, KINDS))}}  {len(names):>4}  "
        more = [f"and {len(names) - _SHOWN} more"] if len(names) > _SHOWN else []
        text = ", ".join([*names[:_SHOWN], *more])
        lines += textwrap.wrap(
            text, _WIDTH, initial_indent=head, subsequent_indent=" " * len(head), break_on_hyphens=False
        )
    return [*lines, "", "`peft-harness list KIND` shows the details of a kind"]


def lines(document: Mapping[str, Any]) -> list[str]:
    """Return the rows of each kind in aligned columns with headings."""
    found: list[str] = []
    for kind, rows in document.items():
        if kind == "schema" or (kind == "broken" and not rows):
            continue
        shown = [_COLUMNS[kind], *([_shown(row[column]) for column in _COLUMNS[kind]] for row in rows)]
        found += [*([""] if found else []), kind, *align_columns(shown)]
    return found


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, (list, tuple, dict)) else str(value)


def _methods(registry: Registry) -> list[ListRow]:
    return [
        {
            "name": info.name,
            "implementations": registry.names("method", info.name),
            "summary": info.summary,
            "paper": info.spec.paper,
            "config": {
                key: {"type": f.type, "default": f.default, "least": f.minimum, "most": f.maximum, "choices": f.choices}
                for key, f in info.fields.items()
            },
        }
        for info in (methods() | UNREFERENCED).values()
    ]


def _bases(registry: Registry) -> list[ListRow]:
    names = sorted(name for name, kind in targets().items() if kind == "base")
    about = {name: glossary()["term"][name].partition(":")[0].partition("(")[0].strip() for name in names}
    return [{"name": name, "implementations": registry.names("base", name), "summary": about[name]} for name in names]


def _implementations(registry: Registry) -> list[ListRow]:
    return [
        {
            "name": i.name,
            "kind": i.kind,
            "target": i.target,
            "provider": f"{i.distribution} {i.version}".strip(),
            "dtypes": i.dtypes,
            "devices": i.devices,
            "offers": i.offers,
        }
        for i in sorted(registry.implementations, key=lambda i: (i.kind, i.target, i.name))
    ]


def _operations(registry: Registry) -> list[ListRow]:
    return [
        {
            "name": name,
            "implementations": registry.names("operation", name),
            "follows": parity_suite.load_operation(name).follows,
        }
        for name in parity_suite.names()
        if parity_suite.kind_of(name) == "operation"
    ]


def _suites(_: Registry) -> list[ListRow]:
    files = {name: yaml_validation.load(loader.find(name)).data for name in loader.names()}
    return [
        {"name": name, "title": str(data.get("title", "")), "about": str(data.get("about", "")).strip()}
        for name, data in files.items()
    ]


def _models(_: Registry) -> list[ListRow]:
    whole = [s for s in _sources().values() if s.kind != "data"]
    return [
        *({"name": s.name, "kind": s.kind, "source": s.source, "licence": s.licence} for s in whole),
        *(
            {"name": f"{shapes.PREFIX}{p.name}", "kind": p.kind, "source": p.source, "licence": "none: no weights"}
            for p in shapes.presets().values()
        ),
    ]


def _tasks(_: Registry) -> list[ListRow]:
    found = [tasks.load(name, data_folder("suites"), _sources()) for name in tasks.names()]
    return [
        {
            "name": t.name,
            "data": t.data.name if t.data else "random tokens",
            "labels": t.labels,
            "test": t.test,
            "licence": t.data.licence if t.data else "none needed",
        }
        for t in found
    ]


def _checks(_: Registry) -> list[ListRow]:
    return [{"name": name, "summary": text.partition("\n")[0]} for name, text in checks.docstrings().items()]


def _claims(_: Registry) -> list[ListRow]:
    from harness.claims import claim_file

    claims = claim_file.load(claim_file.paths(claim_file.names()))
    return [
        {
            "name": c.id,
            "tier": c.tier,
            "source": f"{c.version}, {c.source}",
            "printed": c.printed,
            "sentence": c.sentence,
        }
        for c in claims
    ]


def _measures(_: Registry) -> list[ListRow]:
    from harness.claims.measure import measures

    return [
        {
            "name": m.name,
            "in": m.dimension,
            "arguments": list(m.arguments.model_fields),
            "summary": m.about.partition("\n")[0],
        }
        for m in measures().values()
    ]


def _sources() -> dict[str, Source]:
    return load_table(data_folder("suites") / "sources.yaml")


_ROWS: dict[str, Callable[[Registry], list[ListRow]]] = {
    "methods": _methods,
    "bases": _bases,
    "operations": _operations,
    "implementations": _implementations,
    "suites": _suites,
    "models": _models,
    "tasks": _tasks,
    "checks": _checks,
    "claims": _claims,
    "measures": _measures,
}
_COLUMNS = {
    "methods": ("name", "implementations", "summary"),
    "bases": ("name", "implementations", "summary"),
    "operations": ("name", "implementations", "follows"),
    "implementations": ("name", "kind", "target", "provider", "dtypes", "devices"),
    "broken": ("name", "reason"),
    "suites": ("name", "title"),
    "models": ("name", "kind", "source", "licence"),
    "tasks": ("name", "data", "labels", "test"),
    "checks": ("name", "summary"),
    "claims": ("name", "tier", "printed", "source"),
    "measures": ("name", "in", "summary"),
}
KINDS = tuple(_ROWS)
