"""The loader `reference`: the reading of adapter files in reference/adapter_file.py, and transformers for the base model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from harness.errors import Unsupported
from harness.methods.base_model import load_base, logits
from harness.methods.loader import Loader
from reference import adapter_file


@dataclass(frozen=True)
class _Adapter:
    config: dict[str, Any]
    tensors: dict[str, Tensor]


class ReferenceLoader(Loader):
    """A folder with a base model, and adapters. Each call of `logits` loads the base and writes one adapter into it."""

    def __init__(self, base_folder: Path, dtype: str) -> None:
        self.base_folder, self.dtype = base_folder, getattr(torch, dtype)
        self.adapters: dict[str, _Adapter] = {}

    def load(self, folder: Path, name: str) -> None:
        """Read an adapter. Raises Unsupported for a config that the reference does not implement."""
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        if reasons := adapter_file.unsupported(config):
            raise Unsupported("; ".join(reasons))
        self.adapters[name] = _Adapter(config, load_file(folder / "adapter_model.safetensors"))

    def logits(self, prompts: Sequence[Sequence[int]], name: str | None) -> list[Tensor]:
        """Compute logits with one adapter, or of the base."""
        model = load_base(self.base_folder, self.dtype)
        if name is not None:
            adapter = self.adapters[name]
            adapter_file.apply(model, adapter_file.AdapterSettings.of(adapter.config), adapter.tensors)
        return logits(model, prompts)
