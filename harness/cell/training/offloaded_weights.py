"""Free the memory of weights that no matrix product uses, while a Method trains.

For example, QLoRA multiplies by its 4-bit codes and PiSSA by its residual, not by the original weights. The original
weights are needed only by `detach`, which restores the model, and by the check of `detach`. The papers do not count
these weights as memory, so the harness does not count them either.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO

import torch
from torch import Tensor, nn

from harness.methods.spec import Adapted, methods


def unused(method: str, adapted: Adapted, bases: Mapping[str, nn.Module]) -> dict[str, nn.Parameter]:
    """Return path -> weight for each weight of an adapted layer that the Method replaces by another tensor.

    bases: path -> the layer under the adapter. The result leaves out weights that another module also uses (a tied
    embedding), and weights that share their storage with the replacing tensor.
    """
    info = methods().get(method)
    if info is None or not (instead := info.spec.replaces_weight):
        return {}
    state = adapted.state()
    own = {id(base) for base in bases.values()}
    others = (module for module in adapted.model.modules() if id(module) not in own)
    shared = {id(p) for module in others for p in module.parameters(recurse=False)}
    found = {}
    for path, base in bases.items():
        for name, weight in base.named_parameters(recurse=False):
            # A layer with one weight has its new form directly in its state, stacked experts one for each weight.
            form = state.get(f"{path}.{instead}" if name == "weight" else f"{path}.{name}.{instead}")
            if form is None or not weight.is_floating_point() or id(weight) in shared:
                continue
            if form.untyped_storage()._cdata != weight.untyped_storage()._cdata:
                found[f"{path}.{name}"] = weight
    return found


def release(weights: Mapping[str, nn.Parameter]) -> None:
    """Release the memory of these weights. The parameters remain, but have no elements."""
    for weight in weights.values():
        weight.data = weight.data.new_empty(0)


class OffloadedWeights:
    """Weights that were moved out of the measured memory: from a CPU to a file, or from a GPU to the host's memory.

    folder: where the file is written. The file is temporary and has no name, so it vanishes with this process. If it
    cannot be written, no weight is released, and the constructor raises OSError or RuntimeError.
    """

    def __init__(self, weights: Mapping[str, nn.Parameter], folder: Path) -> None:
        self._weights = dict(weights)
        self._devices = {path: weight.device for path, weight in weights.items()}
        self._file: IO[bytes] | None = None
        self._copies: dict[str, Tensor] = {}
        if any(device.type != "cpu" for device in self._devices.values()):
            self._copies = {path: weight.detach().cpu() for path, weight in weights.items()}
        elif weights:
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  # `restore` reads it
            torch.save({path: weight.detach() for path, weight in weights.items()}, self._file)
        release(weights)

    def restore(self) -> None:
        """Move every weight back to its device."""
        if self._file is not None:
            self._file.seek(0)
            self._copies = torch.load(self._file, weights_only=True)
            self._file.close()
        for path, weight in self._weights.items():
            weight.data = self._copies.pop(path).to(self._devices[path])
        self._weights = {}
