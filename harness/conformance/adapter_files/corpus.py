"""Names of the adapters in suites/adapters. `check` loads them to check loaders of adapter files. Imports no torch."""

from __future__ import annotations

from pathlib import Path

from harness.resources import data_folder

TYPICAL = "plain"
"""Name of the most ordinary adapter."""


def folder() -> Path:
    """Return the path of suites/adapters, which holds one folder per adapter."""
    return data_folder("suites") / "adapters"


def names() -> list[str]:
    """List the names of the adapters in suites/adapters, sorted. The name of an adapter is that of its folder."""
    return sorted(file.parent.name for file in folder().glob("*/adapter_config.json"))
