"""Import what most workers of `check` need at some time: torch's compiler, and transformers' stacked experts.

Unless the command names so few targets that each worker gets at most one, the process that forks the workers imports this
module once. With fewer targets, this import would only delay the first worker.
"""

from __future__ import annotations

from importlib import import_module

from harness.conformance.execution import preload

__all__ = ["LOADED", "preload"]

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
)
"""Modules that a worker would otherwise import when it first needs them."""
