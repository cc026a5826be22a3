"""The sizes that are timed, and what of them is judged: linear layers of Llama-3-8B and 70B, and small ones. No torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

MOST_WEIGHTS = {"cpu": 2**24, "cuda": 2**26}
"""Elements of a weight that the float64 reference judges; it needs some ten float64 copies."""
MOST_PRODUCTS = {"cpu": 2**31, "cuda": 2**40}
"""Multiplications of a product that the float64 reference computes about ten times: some seconds each on a CPU."""


@dataclass(frozen=True)
class BenchSize:
    """A linear layer and what goes through it. E, D: out and in features; tokens: rows of x; rank: LoRA's."""

    layer: str
    E: int
    D: int
    tokens: int = 1
    rank: int = 16

    @property
    def weights(self) -> int:
        """The number of elements of the weight."""
        return self.E * self.D

    def document(self) -> dict[str, Any]:
        """Return it as JSON can hold it."""
        return asdict(self)

    def judged(self, device: str, per_token: bool) -> BenchSize:
        """Return the size at which the reference judges: this one, or one of fewer rows where that would take too long.

        The rows of x are fewer, or those of the weight, which then keeps the side on which it is the longer.
        """
        size = self
        if size.weights > MOST_WEIGHTS[device]:
            rows = max(1, MOST_WEIGHTS[device] // size.D)
            size = replace(size, E=max(rows, size.D) if size.E >= size.D else rows)
        if per_token and size.tokens * size.weights > MOST_PRODUCTS[device]:
            size = replace(size, tokens=max(1, min(size.tokens, MOST_PRODUCTS[device] // size.weights)))
        return size


TINY = BenchSize("tiny", 128, 128, 1, 4)
"""A call of this size is all overhead: what it takes, every call takes."""

_LAYERS = {
    "small": (("square", 512, 512), ("wide", 1536, 576)),
    "8b": (("q_proj", 4096, 4096), ("k_proj", 1024, 4096), ("gate_proj", 14336, 4096), ("down_proj", 4096, 14336)),
    "70b": (("q_proj", 8192, 8192), ("k_proj", 1024, 8192), ("gate_proj", 28672, 8192), ("down_proj", 8192, 28672)),
}
_TOKENS = {"small": (128,), "8b": (1, 64, 4096), "70b": (1, 64, 4096)}
"""A token of decoding, a batch of decoding, and a step of training."""

SHAPES = tuple(_LAYERS)


def sizes(shapes: str, per_token: bool) -> list[BenchSize]:
    """List the sizes of `small`, `8b` or `70b`; with each number of tokens, where an Operation has any."""
    layers = _LAYERS[shapes]
    if not per_token:
        return [BenchSize(*layer) for layer in layers]
    return [BenchSize(*layer, tokens) for layer in layers for tokens in _TOKENS[shapes]]
