"""The classification head of an encoder. With every Method the whole head trains, without an adapter."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from harness.conformance.subject import adaptable_layers, configure
from harness.errors import UsageError
from harness.methods.spec import TARGET_WORDS

_SPREAD = 0.02
"""Standard deviation of new weights, as in BERT."""


def head_of(model: nn.Module, kind: str, lacks: Collection[str] = ()) -> dict[str, nn.Parameter]:
    """Return the parameters of an encoder's head by name. They may be new, or come from a checkpoint.

    The head consists of the parameters outside the encoder itself, and of the parameters in `lacks`. lacks: names of
    the parameters that the checkpoint lacks. For example, the checkpoint of a masked language model lacks the
    parameters of the pooler. These parameters start at random, so they must train.
    """
    if kind != "encoder":
        return {}
    start = f"{model.base_model_prefix}."
    return {n: p for n, p in model.named_parameters() if n in lacks or not n.startswith(start)}


@torch.no_grad()
def draw(model: nn.Module, names: Collection[str], seed: int) -> dict[str, nn.Parameter]:
    """Initialise the head's parameters `names` in place, from the Cell's seed alone, and return them by name.

    Matrices get random values. Biases of linear layers get zeros. Other parameters keep the values of the model's
    initialiser. For example, if the weight of a norm were zero, the norm's output and gradient would be zero.
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


def adapted_layers(
    model: nn.Module, method: str, config: dict[str, Any], head: Collection[str]
) -> tuple[Any, list[str]]:
    """Return a Method's config, and the paths of the layers that the Method adapts. Layers of the head are left out.

    In the returned config, these paths replace `targets` if `targets` is a word such as `all-linear`, or names layers
    of the head. Raises UsageError if all targets are in the head.
    """
    chosen = configure(method, config)
    matched = list(adaptable_layers(model, chosen))
    paths = [path for path in matched if not in_head(path, head)]
    if not hasattr(chosen, "targets") or (len(paths) == len(matched) and not TARGET_WORDS & {*chosen.targets}):
        return chosen, paths
    if not paths:
        what = f"`targets` name only the head ({', '.join(matched)}), which trains as a whole"
        raise UsageError(what, hint="name layers of the model, or choose `method: frozen`")
    return replace(chosen, targets=tuple(paths)), paths


def in_head(path: str, head: Collection[str]) -> bool:
    """Return whether the layer at `path` is part of the head. head: names of the head's parameters."""
    return any(name.startswith(f"{path}.") for name in head)
