"""Interface of a program that loads adapter files into a base model. Imports no torch.

An Implementation of the target `adapter_files` is a function that returns a `Loader`:

@implements("adapter_files", name="mine", requires=["my_library"])
def load_base(base_folder: Path, dtype: str) -> Loader: ...
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

from harness.errors import Unsupported

if TYPE_CHECKING:
    from torch import Tensor

ADAPTER_FILES = "adapter_files"
"""Target of the Implementations that load adapter files. Their function returns a `Loader`."""


class Loader:
    """A base model in evaluation mode, and the adapters that have been loaded into it.

    A subclass implements `load` and `logits`. It overrides every other method that the program supports; here, these
    methods raise harness.Unsupported. The caller gives each adapter a name.
    """

    combinations: tuple[str, ...] = ("",)
    """Names of the ways in which `combine` can compute the sum, such as peft's `svd`. The harness checks each way."""

    def load(self, folder: Path, name: str) -> None:
        """Load the adapter in `folder`, which has adapter_config.json and adapter_model.safetensors, as `name`."""
        raise NotImplementedError

    def logits(self, prompts: Sequence[Sequence[int]], name: str | None) -> list[Tensor]:
        """Return the logits of each prompt with one adapter, or of the base alone if `name` is None.

        prompts: token ids. Each result is (tokens, vocabulary) for a causal model, and (labels,) for a classifier.
        """
        raise NotImplementedError

    def combine(self, names: Sequence[str], weights: Sequence[float], new_name: str, way: str) -> None:
        """Add an adapter whose update is the sum of the updates of `names`, each multiplied by its weight.

        way: one of `combinations`. Raises Unsupported where the program documents that this way is an approximation.
        """
        raise Unsupported("combine: the loader cannot combine adapters")

    def merge(self, names: Sequence[str]) -> None:
        """Add the updates of these adapters to the base weights. `logits` with the name None then includes them."""
        raise Unsupported("merge: the loader cannot merge adapters")

    def unmerge(self) -> None:
        """Undo `merge`."""
        raise Unsupported("unmerge: the loader cannot merge adapters")

    def hotswap(self, folder: Path, name: str) -> None:
        """Replace the adapter `name` by the one in `folder`, without loading the base again."""
        raise Unsupported("hotswap: the loader cannot replace an adapter in place")

    def disabled(self) -> AbstractContextManager[None]:
        """Return a context in which all adapters are off: `logits` returns the logits of the base for every `name`."""
        raise Unsupported("disabled: the loader cannot disable adapters")

    def set_scale(self, name: str, factor: float) -> None:
        """Set the scaling of an adapter to `factor` times the scaling that its file gives."""
        raise Unsupported("set_scale: the loader cannot change a scaling")

    def train(self, mode: bool) -> None:
        """Set the model to training mode if `mode` is True, else to evaluation mode."""
        raise Unsupported("train: the loader has no training mode")

    def copy(self) -> Loader:
        """Return an independent copy."""
        raise Unsupported("copy: the loader cannot be copied")

    def delete(self, name: str) -> None:
        """Remove an adapter."""
        raise Unsupported("delete: the loader cannot remove an adapter")
