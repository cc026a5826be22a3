"""Read the layers and initial values of a Method from the attached model, if no reference implements the Method."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import Tensor, nn

from harness.cell.training.head import in_head
from harness.errors import UsageError
from harness.methods.peft_config import NO_REFERENCE


def attached_layers(adapted: Any, head: Collection[str]) -> tuple[dict[str, nn.Module], dict[str, Tensor]]:
    """Return two dicts: path -> base layer under each adapted layer, and name -> copy of each trained tensor.

    head: names of the head's parameters. Raises UsageError if the adapter adapts the head.
    """
    bases: dict[str, nn.Module] = adapted.bases()
    if on_head := [path for path in bases if in_head(path, head)]:
        what = f"the adapter_config adapts the head ({', '.join(on_head)}), which trains as a whole"
        raise UsageError(what, hint="name other `target_modules`, or add the head to `exclude_modules`")
    return bases, {name: t.detach().clone() for name, t in adapted.tensors().items()}


def notes(adapted: Any) -> list[str]:
    """Return notes for the Record about the missing reference."""
    return [f"{NO_REFERENCE}: only what needs no reference was checked, and no time is shown", *adapted.notes]
