"""Conformance and benchmarking of parameter-efficient fine-tuning methods."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from harness.errors import Unsupported
    from harness.methods.registry import Implementation, implements
    from harness.report.export.frames import load

    __version__: str

__all__ = ["Implementation", "Unsupported", "__version__", "implements", "load"]


def __getattr__(name: str) -> object:
    """Import on first use, so that `import harness` costs nothing."""
    if name == "__version__":
        from importlib.metadata import version

        return version("peft-harness")
    if name == "Unsupported":
        from harness.errors import Unsupported

        return Unsupported
    if name == "load":
        from harness.report.export.frames import load

        return load
    if name in __all__:
        import harness.methods.registry

        return getattr(harness.methods.registry, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
