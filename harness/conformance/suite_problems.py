"""Find problems in a parity suite's file: names of checks, settings or config keys that do not exist. Imports no torch."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from harness import yaml_validation
from harness.conformance import checks
from harness.errors import Problem, did_you_mean
from harness.methods.spec import methods


def of_checks(
    document: yaml_validation.Document, names: Sequence[str], tolerances: Collection[str]
) -> Iterator[Problem]:
    """Yield a problem for each of `names` that is not a check, and for each tolerance of a check that is not in `names`."""
    known = checks.docstrings()
    for index, name in enumerate(names):
        if name not in known:
            where = document.where("checks", index)
            yield Problem(where, f"no check is called {name!r}", did_you_mean(name, known, "checks"))
    for name in tolerances:
        if name not in names:
            what = f"a tolerance for {name!r}, a check that this suite does not try"
            yield Problem(document.where("tolerances", name), what, did_you_mean(name, names, "checks here"))


def of_settings(
    document: yaml_validation.Document, method: str, configs: Sequence[Mapping[str, Any]], settings: Collection[str]
) -> Iterator[Problem]:
    """Yield a problem for each invalid value, and for each key of `configs` and `settings` that the Method does not
    have.
    """
    fields = methods()[method].fields if method in methods() else {}
    for index, config in enumerate(configs):
        for key, value in config.items():
            where = document.where("configs", index, key)
            if key not in fields:
                what = f"{method} has no config key {key!r}"
                yield Problem(where, what, did_you_mean(key, fields, "config keys"))
            elif problem := fields[key].problem(value):
                yield Problem(where, f"{key} {problem}")
    for name in [name for name in settings if name not in fields]:
        where = document.where("settings", name)
        yield Problem(where, f"{method} has no setting {name!r}", did_you_mean(name, fields, "settings"))
