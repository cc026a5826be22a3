"""Pack layers of a model in 4 bits by an implementation of a quantised base."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from harness.conformance.subject import PackedLayer
from harness.methods.registry import Implementation


def pack(base: Implementation, model: nn.Module, paths: Collection[str], dtype: torch.dtype) -> dict[str, PackedLayer]:
    """Pack the layers at `paths` in place, and return their packed forms by path.

    Adapters take their dtype from a floating-point parameter or from `compute_dtype`. If a packed layer has neither, this
    function sets `compute_dtype`. Raises TypeError if `base` does not return packed forms.
    """
    returned = base(model, list(paths), dtype)
    try:
        forms = {path: PackedLayer(*form) for path, form in returned.items()}
    except (AttributeError, TypeError) as error:
        form = "{path: (packed, absmax, block)}" if base.target == "nf4" else "{path: (packed, absmax, block, True)}"
        raise TypeError(
            f"{base.target} should return {form}; it returned {type(returned).__name__}: {error}"
        ) from error
    for path in forms.keys() & set(paths):
        layer: Any = model.get_submodule(path)
        if not hasattr(layer, "compute_dtype") and not any(p.is_floating_point() for p in layer.parameters()):
            layer.compute_dtype = dtype
    return forms
