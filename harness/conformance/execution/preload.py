"""Import what nearly every worker of `check` needs. The process that forks the workers imports this module once."""

from __future__ import annotations

from importlib import import_module

from harness.conformance import checks, operations
from harness.conformance.execution import suite_run, worker
from harness.methods import registry

__all__ = ["LOADED", "suite_run", "worker"]

LOADED = (
    import_module("torch._dynamo"),  # the first optimizer imports it
    # The first call of a compiled function imports this and the next two.
    import_module("torch._decomp.decompositions_for_jvp"),
    import_module("torch._dynamo.backends.common"),
    import_module("torch._inductor.pattern_matcher"),
    import_module("transformers.pytorch_utils"),
    # The classes of stacked experts import this and the next two.
    import_module("transformers.models.mixtral"),
    import_module("transformers.activations"),
    import_module("transformers.loss.loss_utils"),
    checks.every(),
    operations.every(),
    registry.targets(),
)
"""Modules and tables that a worker would otherwise load when it first needs them."""
