"""`fused`: the optimised code of `harness/kernels`, as Methods, packed bases and Operations.

Only the computation differs from the reference: adapted layers, initial state and merging are the reference's.
"""

from __future__ import annotations

import importlib
import pkgutil

from harness.methods.registry import Implementation


def implementations() -> list[Implementation]:
    """Return the Implementations of this package's files. They import torch and the kernels on their first call."""
    names = [file.name for file in pkgutil.iter_modules(__path__) if not file.ispkg]  # `layers` imports torch
    files = [importlib.import_module(f"{__name__}.{name}") for name in names]
    return [one for file in files for one in vars(file).values() if isinstance(one, Implementation)]
