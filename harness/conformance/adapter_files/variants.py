"""Variants of an adapter, in temporary folders that are removed when the process ends."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from harness.conformance.adapter_files.adapter_config import CONFIG
from harness.conformance.adapter_files.adapter_file import WEIGHTS, AdapterFile
from harness.methods.base_model import empty_base
from reference.adapter_file import AdapterReading, read

DROPOUT = 0.5
_SEED = 7


@dataclass(frozen=True)
class _Written:
    folder: tempfile.TemporaryDirectory[str]
    """Temporary folder with the adapter. It is removed together with this object."""

    @classmethod
    def of(cls, config: Mapping[str, Any], tensors: dict[str, Tensor]) -> _Written:
        written = cls(tempfile.TemporaryDirectory(prefix="adapter-"))
        (written.path / CONFIG).write_text(json.dumps(config), encoding="utf-8")
        save_file(tensors, written.path / WEIGHTS, {"format": "pt"})
        return written

    @property
    def path(self) -> Path:
        return Path(self.folder.name)


def another(folder: Path, base: Path) -> Path:
    """Return the folder of a variant of the adapter in `folder`: other values, a rank larger by 1, and twice the alpha.

    The variant adapts the same layers. base: the folder of the base model.
    """
    return _another(folder, base).path


def with_dropout(folder: Path, base: Path) -> Path:
    """Return a folder with a copy of the adapter in `folder` whose config has dropout.

    The probability is DROPOUT, or 0 if the adapter adapts experts. base: the folder of the base model.
    """
    return _with_dropout(folder, base).path


@cache
def _another(folder: Path, base: Path) -> _Written:
    file, generator = AdapterFile.read(folder), torch.Generator().manual_seed(_SEED)
    tensors = file.tensors()

    def drawn(like: Tensor, *shape: int) -> Tensor:
        noise = torch.randn(*shape, generator=generator)
        return (noise * like.float().square().mean().sqrt()).to(like.dtype)

    reading = _read(file, base)
    for update in reading.updates:
        A, B = tensors[update.A], tensors[update.B]
        rows = len(A) // update.rank * (update.rank + 1)
        tensors[update.A] = drawn(A, rows, *A.shape[1:])
        tensors[update.B] = drawn(B, len(B), rows, *B.shape[2:]) / 2
        for key in filter(None, (update.bias, update.magnitude)):
            tensors[key] = tensors[key] + drawn(tensors[key], *tensors[key].shape) / 4
    for key in reading.replaced:
        if not key.endswith(".base_layer.weight"):  # files repeat the base weight of an adapted embedding
            tensors[key] = tensors[key] + drawn(tensors[key], *tensors[key].shape) / 4
    settings = file.settings
    changed = {
        "r": settings.r + 1,
        "rank_pattern": {name: rank + 1 for name, rank in settings.rank_pattern.items()},
        "lora_alpha": 2 * settings.lora_alpha,  # not alpha_pattern, which some programs require to stay equal
    }
    return _Written.of({**file.config, **changed}, tensors)


@cache
def _with_dropout(folder: Path, base: Path) -> _Written:
    file = AdapterFile.read(folder)
    dropout = 0.0 if any(update.kind in ("stack", "expert") for update in _read(file, base).updates) else DROPOUT
    return _Written.of({**file.config, "lora_dropout": dropout}, file.tensors())


def _read(file: AdapterFile, base: Path) -> AdapterReading:
    return read(file.settings, list(file.header), empty_base(base))
