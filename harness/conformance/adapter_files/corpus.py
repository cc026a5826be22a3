"""Names of the adapters of the corpus in suites/adapters. No torch."""

from __future__ import annotations

from pathlib import Path

from harness.resources import data_folder


def folder() -> Path:
    """Return the path of suites/adapters, which holds one folder per adapter of the corpus."""
    return data_folder("suites") / "adapters"


def names() -> list[str]:
    """List the adapters of the corpus by the names of their folders, sorted."""
    return sorted(file.parent.name for file in folder().glob("*/adapter_config.json"))
