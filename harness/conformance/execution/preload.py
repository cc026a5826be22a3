"""Import what every worker of `check` needs. The process that forks the workers imports this module once."""

from __future__ import annotations

from harness.conformance import checks, operations
from harness.conformance.execution import suite_run, worker
from harness.methods import registry

__all__ = ["LOADED", "suite_run", "worker"]

LOADED = checks.every(), operations.every(), registry.targets()
"""Tables that a worker would otherwise load when it first needs them."""
