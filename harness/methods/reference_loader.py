"""The loader `reference`: reference/adapter_file.py reads the adapter files, and transformers runs the base model."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from harness.errors import Unsupported
from harness.methods.base_model import load_base, logits
from harness.methods.loader import Loader
from harness.methods.module_copy import copied
from harness.methods.unsupported_adapters import reason, unsupported
from reference import adapter_file


@dataclass(frozen=True)
class _Part:
    """One adapter file in a weighted sum of adapters."""

    settings: adapter_file.AdapterSettings
    tensors: dict[str, Tensor]
    weight: float = 1.0
    factor: float = 1.0
    """Factor on the scaling that the file gives."""


class ReferenceLoader(Loader):
    """A base model, and adapters. Each call of `logits` copies the base and writes adapters into the copy."""

    def __init__(self, base_folder: Path, dtype: str) -> None:
        self.base = load_base(base_folder, getattr(torch, dtype))
        self.adapters: dict[str, list[_Part]] = {}
        self.merged: list[_Part] = []
        self.is_disabled = self.training = False

    def load(self, folder: Path, name: str) -> None:
        """Read an adapter. Raises Unsupported for a config that the reference does not implement."""
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        if found := unsupported(config):
            raise Unsupported(reason(found))
        settings = adapter_file.AdapterSettings.of(config)
        self.adapters[name] = [_Part(settings, load_file(folder / "adapter_model.safetensors"))]

    def logits(self, prompts: Sequence[Sequence[int]], name: str | None) -> list[Tensor]:
        """Return the logits with one adapter. If `name` is None, return those of the base and of all merged adapters."""
        model = copied(self.base)
        parts = self.merged if name is None else self.adapters[name]
        if not self.is_disabled:
            sums = [(one.settings.scaled(one.factor), one.tensors, one.weight) for one in parts]
            adapter_file.combine(model, sums)
        return logits(model, prompts)

    def combine(self, names: Sequence[str], weights: Sequence[float], new_name: str, way: str) -> None:
        """Add an adapter `new_name`, the weighted sum of other adapters. `way` is not used: there is only one way."""
        pairs = zip(names, weights, strict=True)
        self.adapters[new_name] = [
            replace(one, weight=one.weight * weight) for name, weight in pairs for one in self.adapters[name]
        ]

    def merge(self, names: Sequence[str]) -> None:
        """Let `logits` with the name None include the updates of these adapters. The base itself does not change."""
        self.merged = [one for name in names for one in self.adapters[name]]

    def unmerge(self) -> None:
        """Undo `merge`."""
        self.merged = []

    def hotswap(self, folder: Path, name: str) -> None:
        """Replace an adapter. Raises Unsupported if an adapter is merged."""
        if self.merged:
            raise Unsupported("hotswap: an adapter is merged")
        self.load(folder, name)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Disable all adapters within the context."""
        self.is_disabled = True
        try:
            yield
        finally:
            self.is_disabled = False

    def set_scale(self, name: str, factor: float) -> None:
        """Set the scaling of an adapter to `factor` times the scaling that its file gives."""
        self.adapters[name] = [replace(one, factor=factor) for one in self.adapters[name]]

    def train(self, mode: bool) -> None:
        """Set training mode if `mode` is True, else evaluation mode. The logits are the same in both: nothing is random."""
        self.training = mode

    def copy(self) -> ReferenceLoader:
        """Return an independent copy."""
        other = copy.copy(self)
        other.adapters, other.merged = dict(self.adapters), list(self.merged)
        return other

    def delete(self, name: str) -> None:
        """Remove an adapter."""
        del self.adapters[name]
