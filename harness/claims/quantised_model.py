"""QLoRA's reference attached to a shape on the meta device: which weights it keeps in 4 bits, and in how many bits."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from torch import nn

from harness.claims import attached_model
from harness.conformance.subject import configure
from harness.memory_model import counting
from reference.operations.double_quant import BLOCK, bits_per_parameter


@dataclass(frozen=True)
class Quantised:
    """What is in 4 bits, and what is not.

    weights: how many there are of each number of elements. adapters: elements that train. rest: elements of the model's
    other parameters: embeddings, output, norms. inside, outside: paths of the linear layers with and without 4 bits.
    """

    weights: Counter[int]
    adapters: int
    rest: int
    inside: tuple[str, ...]
    outside: tuple[str, ...]

    @property
    def elements(self) -> int:
        """Elements in 4 bits."""
        return sum(numel * number for numel, number in self.weights.items())

    def bits(self, block: int, double: bool, second_block: int = BLOCK) -> int:
        """Return the bits of all codes and constants, by the reference's own count of them."""
        of_each = {n: bits_per_parameter(n, block, double, second_block) * n for n in self.weights}
        return sum(round(of_each[n]) * number for n, number in self.weights.items())


def of(name: str, config: Mapping[str, Any]) -> Quantised:
    """Attach QLoRA to a shape and count. Raises ValueError for a config that does not fit the model."""
    # How the constants are kept changes neither what is adapted nor what trains: a large model is attached to once.
    return _of(name, json.dumps({key: value for key, value in config.items() if key not in ("block", "double_quant")}))


@lru_cache(maxsize=64)
def _of(name: str, config: str) -> Quantised:
    model = attached_model.model(name)
    linear = [path for path, layer in model.named_modules() if isinstance(layer, nn.Linear)]
    every = sum(p.numel() for p in model.parameters())
    with counting.attached(model, "qlora", configure("qlora", json.loads(config))) as adapted:
        layers: Mapping[str, Any] = adapted.layers
        weights = Counter(layer.base.weight.numel() for layer in layers.values())
        return Quantised(
            weights=weights,
            adapters=sum(t.numel() for t in adapted.tensors().values()),
            rest=every - sum(numel * number for numel, number in weights.items()),
            inside=tuple(layers),
            outside=tuple(path for path in linear if path not in layers),
        )
