"""Weights that no product takes while a Method trains: out of memory until somebody wants to detach.

QLoRA multiplies by its codes and PiSSA by its residual. What these were made from is wanted again by `detach`, which puts
the model back, and by whoever checks that; the papers' memory is without it, and so is what is measured here.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn

from harness.methods.spec import Adapted, methods


def unused(method: str, adapted: Adapted, bases: Mapping[str, nn.Module]) -> dict[str, nn.Parameter]:
    """Map the paths of adapted layers to the weights in whose place the Method's own form of them stands.

    bases: path to the layer under the adapter. Left out is what another module of the model uses too (a tied embedding), and
    a weight that is itself that form.
    """
    info = methods().get(method)
    if info is None or not (instead := info.spec.replaces_weight):
        return {}
    state = adapted.state()
    own = {id(base) for base in bases.values()}
    others = (module for module in adapted.model.modules() if id(module) not in own)
    elsewhere = {id(p) for module in others for p in module.parameters(recurse=False)}
    found = {}
    base: Any
    for path, base in bases.items():
        weight, form = base.weight, state.get(f"{path}.{instead}")
        if not isinstance(weight, nn.Parameter) or not weight.is_floating_point() or form is None:
            continue
        if id(weight) not in elsewhere and form.untyped_storage()._cdata != weight.untyped_storage()._cdata:
            found[path] = weight
    return found


def drop(weights: Mapping[str, nn.Parameter]) -> None:
    """Give the memory of these weights back; they stay where they are, without elements."""
    for weight in weights.values():
        weight.data = weight.data.new_empty(0)


class OffloadedWeights:
    """Weights that were dropped: on a CPU into a file, since its memory is what is measured, else into the host's.

    folder: where there is room for that file, which has no name and ends with this process. Raises OSError or RuntimeError
    where it cannot be written; nothing is dropped then.
    """

    def __init__(self, weights: Mapping[str, nn.Parameter], folder: Path) -> None:
        self._weights = dict(weights)
        self._devices = {path: weight.device for path, weight in weights.items()}
        self._file: IO[bytes] | None = None
        self._held: dict[str, Tensor] = {}
        if any(device.type != "cpu" for device in self._devices.values()):
            self._held = {path: weight.detach().cpu() for path, weight in weights.items()}
        elif weights:
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  # it is read when all is measured
            torch.save({path: weight.detach() for path, weight in weights.items()}, self._file)
        drop(weights)

    def put_back(self) -> None:
        """Let every weight be what it was."""
        if self._file is not None:
            self._file.seek(0)
            self._held = torch.load(self._file, weights_only=True)
            self._file.close()
        for path, weight in self._weights.items():
            weight.data = self._held.pop(path).to(self._devices[path])
        self._weights = {}
