"""Find the kinds of model servers by name. Imports no torch.

A module of this package declares a kind by its constant SERVER. Another distribution declares a kind by an entry point in
the group `harness.servers` that refers to a ServerKind.
"""

from __future__ import annotations

import pkgutil
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points

from harness.errors import UsageError, did_you_mean
from harness.methods.servers.kind import ServerKind

GROUP = "harness.servers"


@cache
def kinds() -> dict[str, ServerKind]:
    """Map the name of each kind to its declaration.

    If a plug-in uses a name of the harness, the harness's declaration is kept.
    """
    modules = (import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__))
    own = [kind for module in modules if isinstance(kind := getattr(module, "SERVER", None), ServerKind)]
    others = [kind for point in entry_points(group=GROUP) if isinstance(kind := _load(point), ServerKind)]
    return {kind.name: kind for kind in [*others, *own]}


def _load(point: EntryPoint) -> object:
    """Load an entry point. Return None if this fails, so that the other entry points still load."""
    try:
        return point.load()
    except Exception:  # noqa: BLE001  # a plug-in may raise anything
        return None


def find(name: str) -> ServerKind:
    """Return the kind with this name. Raises UsageError with the closest name if there is none."""
    if name not in kinds():
        raise UsageError(f"unknown server `{name}`", hint=did_you_mean(name, kinds(), "servers"))
    return kinds()[name]
