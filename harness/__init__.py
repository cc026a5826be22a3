"""Conformance and benchmarking of parameter-efficient fine-tuning methods."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from harness.errors import Unsupported
    from harness.methods.registry import Implementation, implements
    from harness.report.export.frames import load

    __version__: str

__all__ = ["Implementation", "Unsupported", "__version__", "implements", "load"]

_MODULES = {
    "Implementation": "harness.methods.registry",
    "implements": "harness.methods.registry",
    "load": "harness.report.export.frames",
    "Unsupported": "harness.errors",
}
"""Module that defines each public name."""


def __getattr__(name: str) -> object:
    """Import a public name at its first use and return its value, so that `import harness` is fast."""
    from importlib import import_module
    from importlib.metadata import version

    if name == "__version__":
        return version("peft-harness")
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
