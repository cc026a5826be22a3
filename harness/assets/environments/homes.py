"""Find the environments of implementations whose libraries this Python lacks."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from harness.assets.environments import folder, integrity, table
from harness.assets.environments.folder import MadeEnvironment


def of(implementations: Collection[str]) -> dict[str, MadeEnvironment | str]:
    """Map each implementation to its environment, which suites/environments.yaml or a user's file declares.

    If the environment has not been made yet, the value is its name. Implementations without an environment are left
    out.
    """
    if not implementations:
        return {}
    specs = {one.name: one.file.spec for one in folder.made() if one.is_current} | table.load()
    return {
        name: folder.read(folder.place(spec)) or spec.name
        for spec in specs.values()
        for name in spec.implementations
        if name in implementations
    }


def at(place: Path) -> MadeEnvironment:
    """Check that the interpreter of an environment starts, and return the environment. place: its folder."""
    environment = folder.read(place)
    assert environment is not None  # noqa: S101  # `homes` has just read it
    integrity.require_start(environment)
    return environment
