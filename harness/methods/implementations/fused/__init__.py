"""`fused`: Methods, quantisations of base weights and Operations that run the optimised code of `harness/kernels`.

Only the computation differs from the reference. Adapted layers, initial state and merging come from the reference.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import TYPE_CHECKING

from harness.methods.implementations.fused import bases, methods, operations
from harness.methods.registry import DTYPES, Implementation, implements, optional_features

if TYPE_CHECKING:
    from torch import Generator, nn

    from harness.methods.spec import Adapted

_LACKING = ("nn.Conv1d", "Conv3d")
"""Optional features of LoRA and DoRA that `fused` does not have."""


def implementations() -> list[Implementation]:
    """Return one Implementation per Method, quantisation and Operation. They import torch on their first call."""
    names = [file.name for file in pkgutil.iter_modules(methods.__path__)]
    return [*map(_method, names), bases.nf4, bases.nf4_dq, *operations.implementations()]


def _method(name: str) -> Implementation:
    offers = [feature for feature in optional_features(name) if feature not in _LACKING]

    @implements(name, name="fused", dtypes=DTYPES, offers=offers)
    def attach(model: nn.Module, config: object, generator: Generator) -> Adapted:
        adapted: Adapted = importlib.import_module(f"{methods.__name__}.{name}").attach(model, config, generator)
        return adapted

    return attach
