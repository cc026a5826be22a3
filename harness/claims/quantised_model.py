"""Count the 4-bit weights of a model under QLoRA, and their bits.

The reference's QLoRA is attached to the model on the meta device. Imports torch only when a model is built.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from harness.claims import attached_model


@dataclass(frozen=True)
class Quantised:
    """Numbers of elements of a model under QLoRA, and the paths of its linear layers."""

    weights: Counter[int]
    """Size in elements -> number of 4-bit weight matrices of that size."""
    adapters: int
    """Number of trainable elements in the adapters."""
    rest: int
    """Number of elements in all other parameters, such as the embeddings, the output layer and the norms."""
    inside: tuple[str, ...]
    """Paths of the linear layers that are stored in 4 bits."""
    outside: tuple[str, ...]
    """Paths of the linear layers that are not stored in 4 bits."""

    @property
    def elements(self) -> int:
        """Number of elements in 4 bits."""
        return sum(numel * number for numel, number in self.weights.items())

    @property
    def code_bits(self) -> int:
        """Number of bits of all 4-bit codes. The codes of each weight are padded to whole bytes."""
        return 8 * sum(-(-numel // 2) * number for numel, number in self.weights.items())

    def bits(self, block: int, double: bool, second_block: int) -> int:
        """Return the number of bits of all 4-bit codes and quantisation constants, as the reference counts them.

        block: number of elements that share a constant. double: whether the constants are quantised too. second_block:
        number of constants that are quantised together.
        """
        from reference.operations.double_quant import bits_per_parameter

        of_each = {n: bits_per_parameter(n, block, double, second_block) * n for n in self.weights}
        return sum(round(of_each[n]) * number for n, number in self.weights.items())


def of(name: str, config: Mapping[str, Any]) -> Quantised:
    """Attach QLoRA to a model on the meta device, and return the counts.

    name: the name of a preset, or the path of a config.json. Raises ValueError for a config that does not fit the
    model.
    """
    # Block size and double quantisation change no layer, so one attached model is enough for all their values.
    return _of(name, json.dumps({key: value for key, value in config.items() if key not in ("block", "double_quant")}))


@lru_cache(maxsize=64)
def _of(name: str, config: str) -> Quantised:
    from torch import nn

    from harness.memory_model import equal_blocks

    model = attached_model.model(name)

    def find() -> tuple[dict[str, int], dict[str, int]]:
        with attached_model.attached(model, "qlora", json.loads(config)) as adapted:
            layers: Mapping[str, Any] = adapted.layers
            weights = {path: layer.base.weight.numel() for path, layer in layers.items()}
            return weights, {key: t.numel() for key, t in adapted.tensors().items()}

    weights, adapters = equal_blocks.named_facts(model, find)
    return Quantised(
        weights=Counter(weights.values()),
        adapters=sum(adapters.values()),
        rest=attached_model.parameter_count(name) - sum(weights.values()),
        inside=tuple(weights),
        outside=tuple(
            path for path, layer in model.named_modules() if isinstance(layer, nn.Linear) and path not in weights
        ),
    )
