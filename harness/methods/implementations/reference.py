"""`reference`: one Implementation for the reference of each Method and Operation, and one for adapter files.

The entry point also offers `torch-compile`, which compiles plain formulas by torch.
"""

from __future__ import annotations

import importlib
import pkgutil
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from harness.methods.implementations import torch_compile
from harness.methods.loader import ADAPTER_FILES
from harness.methods.registry import DTYPES, Implementation, implements, optional_features
from harness.methods.spec import methods

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Generator, nn

    from harness.methods.loader import Loader
    from harness.methods.spec import Adapted
OPERATIONS = "harness.conformance.operations"


def implementations() -> list[Implementation]:
    """Return one Implementation per Method, per Operation and for adapter files. They import torch on their first call."""
    found = find_spec(OPERATIONS)
    folders = found.submodule_search_locations if found is not None else None
    operations = [module.name for module in pkgutil.iter_modules(folders)] if folders else []
    return [*map(_method, methods()), *map(_operation, operations), _loader, *torch_compile.implementations()]


def _method(name: str) -> Implementation:
    @implements(name, name="reference", dtypes=DTYPES, offers=optional_features(name))
    def attach(model: nn.Module, config: object, generator: Generator) -> Adapted:
        adapted: Adapted = importlib.import_module(f"reference.{name}").attach(model, config, generator)
        return adapted

    return attach


def _operation(name: str) -> Implementation:
    @implements(name, name="reference", kind="operation", dtypes=DTYPES)
    def call(**arguments: Any) -> Any:
        return importlib.import_module(f"{OPERATIONS}.{name}").OPERATION.reference(**arguments)

    return call


@implements(ADAPTER_FILES, name="reference", requires=["transformers"])
def _loader(base_folder: Path, dtype: str) -> Loader:
    from harness.methods.reference_loader import ReferenceLoader

    return ReferenceLoader(base_folder, dtype)
