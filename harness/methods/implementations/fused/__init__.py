"""`fused`: our own optimised paths from `harness/kernels`, as Methods, as packed bases and as Operations.

Only the computation is ours: which layers are adapted, their initial state, and merging are the reference's.
"""

from __future__ import annotations

import importlib
import pkgutil

from harness.methods.registry import Implementation


def implementations() -> list[Implementation]:
    """Return all that the files of this package offer; torch and the kernels are imported when one is first called."""
    offering = [file.name for file in pkgutil.iter_modules(__path__) if not file.ispkg]  # the layers import torch
    files = [importlib.import_module(f"{__name__}.{name}") for name in offering]
    return [one for file in files for one in vars(file).values() if isinstance(one, Implementation)]
