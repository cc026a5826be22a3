"""The classification head of an encoder: it trains as a whole with every Method, and no adapter sits on it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from harness.errors import UsageError
from harness.methods.spec import TARGET_WORDS

_SPREAD = 0.02
"""Standard deviation of new weights, as in BERT."""


def head_of(model: nn.Module, kind: str, lacks: Collection[str] = ()) -> dict[str, nn.Parameter]:
    """Return the parameters of an encoder's head by name: those outside the encoder itself, new or from a checkpoint.

    lacks: names of the parameters that the checkpoint lacks. Those inside the encoder, such as the pooler of a masked
    language model, belong to the head too: they start at random, and must train.
    """
    if kind != "encoder":
        return {}
    start = f"{model.base_model_prefix}."
    return {n: p for n, p in model.named_parameters() if n in lacks or not n.startswith(start)}


@torch.no_grad()
def draw(model: nn.Module, names: Collection[str], seed: int) -> dict[str, nn.Parameter]:
    """Draw parameters of the head, of these names, in place from the Cell's seed alone, and return them by name.

    It draws matrices and the biases of linear layers. Other parameters stay as the model's own initialiser has left them: a
    norm that starts at zero would pass nothing on, and no gradient back.
    """
    generator = torch.Generator().manual_seed(seed)
    head = {name: model.get_parameter(name) for name in names}
    for name, parameter in head.items():
        if parameter.dim() > 1:
            # Drawn in float64 so that every dtype starts from the same numbers.
            drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * _SPREAD
            parameter.copy_(drawn)
        elif isinstance(model.get_submodule(name.rpartition(".")[0]), nn.Linear):
            parameter.zero_()
    return head


def without_head_targets(config: Any, matched: Collection[str], head: Collection[str]) -> Any:
    """Return a Method's config without targets in the head. matched: paths of all layers that the targets fit.

    The targets are paths then; also in place of a word such as `all-linear`, which only the model resolves. Raises
    UsageError if none is left.
    """
    if not hasattr(config, "targets"):
        return config
    paths = tuple(path for path in matched if not in_head(path, head))
    if len(paths) == len(matched) and not TARGET_WORDS & {*config.targets}:
        return config
    if not paths:
        what = f"`targets` name nothing but the head ({', '.join(matched)}), which trains as a whole anyway"
        raise UsageError(what, hint="name layers of the model, or choose `method: frozen`")
    return replace(config, targets=paths)


def in_head(path: str, head: Collection[str]) -> bool:
    """Return whether the layer at `path` is a part of the head. head: names of its parameters."""
    return any(name.startswith(f"{path}.") for name in head)
