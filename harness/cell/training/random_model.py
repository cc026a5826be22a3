"""Build a model from its config.json without weights, and then draw random weights block by block.

A block is an entry of the model's list of layers. Each block gets all its weights before the next block gets any, so that
the blocks can be packed one by one, and the whole model never exists in 16 bits.
"""

from __future__ import annotations

import json
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from harness.assets import shapes, structure
from harness.errors import AssetError

SEED = 0
"""Seed of the weights. It does not depend on the Cell's seed, so that Cells with the same model start with equal
weights."""
NOTE = (
    f"the weights are random (seed {SEED}, the spread of the model's own initialiser), because only a shape was named: "
    "memory and speed are those of the shape, losses and texts mean nothing, and no accuracy was measured"
)
_REST = "the rest"


def build(folder: Path, dtype: torch.dtype, kind: str = "causal", labels: int = 0) -> Any:
    """Return the model of `folder`/config.json on the meta device: all layers, no weights.

    labels: classes of an encoder's head. Raises AssetError if transformers has no model of this kind for the config.
    """
    facts = json.loads((folder / "config.json").read_bytes())
    try:
        return structure.build(shapes.with_classes(facts, labels) if kind == "encoder" else facts, kind, dtype)
    except (KeyError, ValueError) as error:
        what = "encoder with a classification head" if kind == "encoder" else "causal model"
        what = f"no {what} can be made of it: {error}"
        hint = "correct `model_type`, or check the version of transformers"
        raise AssetError(what, where=str(folder / "config.json"), hint=hint) from error


def drawn(model: Any, device: torch.device) -> Iterator[set[str]]:
    """Draw the weights of a model that is on the meta device, part by part. Yield the module paths of each part.

    The first part has the modules outside the blocks; every further part is a block. Each part has its own seed. The
    weights are drawn on `device` by the initialiser with which the model would be trained from scratch. The initialiser's
    standard deviations avoid overflow in 16 bits. A model in float64 gets the weights that it has in float32, so that
    their losses can be compared. Raises AssetError for a weight that the initialiser does not set.
    """
    parts: dict[str, dict[str, nn.Module]] = {_REST: {}}
    blocks = [f"{path}.{name}" for path, m in outermost_lists(model).items() for name, _ in m.named_children()]
    for path, module in model.named_modules():
        block = next((b for b in blocks if path == b or path.startswith(f"{b}.")), _REST)
        parts.setdefault(block, {})[path] = module
    # Hold references to shared weights only: other weights must be freed once they are packed.
    uses = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    homes: dict[int, nn.Parameter | None] = {key: None for key, count in uses.items() if count > 1}
    for part in list(parts):
        _draw(model, part, parts[part], device, homes)
        yield set(parts.pop(part))  # without references to the layers, which are packed next


def draw(model: Any, device: torch.device) -> None:
    """Draw all weights of a model that is on the meta device. Raises AssetError if the initialiser leaves one out."""
    for _ in drawn(model, device):
        pass


@torch.no_grad()
def _draw(
    model: Any, part: str, modules: dict[str, nn.Module], device: torch.device, homes: dict[int, nn.Parameter | None]
) -> None:
    """Draw the weights of one part's modules.

    homes: id of a tied weight on the meta device -> the weight drawn for it, or None if it is not drawn yet.
    """
    dtypes = {
        (path, name): tensor.dtype
        for path, module in modules.items()
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
    }
    for module in modules.values():
        for name, parameter in module.named_parameters(recurse=False):
            home = homes.get(id(parameter))
            if home is None:
                home = nn.Parameter(_unset(parameter, device), requires_grad=parameter.requires_grad)
            if id(parameter) in homes:
                homes[id(parameter)] = home
            setattr(module, name, home)
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = _unset(buffer, device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(SEED + zlib.crc32(part.encode()))
        for module in reversed(list(modules.values())):  # children first: some parents scale their children's weights
            model._init_weights(module)
    for path, module in modules.items():
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            if tensor.is_floating_point() and bool(tensor.isnan().any()):
                what = f"{type(model).__name__} has no initialiser for {path}.{name}, so its shape cannot be filled"
                raise AssetError(what, where="phase load", hint="name a model with weights")
            tensor.data = tensor.data.to(dtypes[path, name])


def _unset(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a tensor with the shape and dtype of `tensor` on `device`, but float32 in place of float64.

    It holds NaN, or 0 if the dtype is an integer. If a NaN remains later, the initialiser has left the tensor out.
    """
    dtype = torch.float32 if tensor.dtype == torch.float64 else tensor.dtype
    return torch.full_like(tensor, torch.nan if tensor.is_floating_point() else 0, device=device, dtype=dtype)


def outermost_lists(model: nn.Module) -> dict[str, nn.ModuleList]:
    """Return path -> ModuleList for those ModuleLists of a model that are not inside another ModuleList."""
    lists = {path: module for path, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    return {path: m for path, m in lists.items() if not any(path.startswith(f"{other}.") for other in lists)}
