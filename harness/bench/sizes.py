"""Sizes of timed calls (layers of Llama-3-8B and 70B, and small layers), and smaller sizes for parity. No torch."""

from __future__ import annotations

from dataclasses import dataclass, replace

MOST_WEIGHTS = {"cpu": 2**24, "cuda": 2**26}
"""Largest number of elements of a weight for parity. The float64 reference holds about ten copies of the weight."""
MOST_PRODUCTS = {"cpu": 2**31, "cuda": 2**40}
"""Largest number of multiplications per product for parity. The float64 reference computes about ten products, and each
takes seconds on a CPU."""


@dataclass(frozen=True)
class BenchSize:
    """A linear layer, its input and the rank of its adapter."""

    layer: str
    E: int
    """Output features."""
    D: int
    """Input features."""
    tokens: int = 1
    """Rows of x."""
    rank: int = 16
    """Rank of LoRA; other methods use a multiple of it."""

    @property
    def weights(self) -> int:
        """Number of elements of the weight."""
        return self.E * self.D

    def judged(self, device: str, per_token: bool) -> BenchSize:
        """Return the size for parity: this size, or fewer rows of x or of the weight if the reference is too slow.

        The longer side of the weight stays the longer one.
        """
        size = self
        if size.weights > MOST_WEIGHTS[device]:
            rows = max(1, MOST_WEIGHTS[device] // size.D)
            size = replace(size, E=max(rows, size.D) if size.E >= size.D else rows)
        if per_token and size.tokens * size.weights > MOST_PRODUCTS[device]:
            size = replace(size, tokens=max(1, min(size.tokens, MOST_PRODUCTS[device] // size.weights)))
        return size


TINY = BenchSize("tiny", 128, 128, 1, 4)
"""A call of this size does hardly any work, so that its time is the overhead of a call."""

_LAYERS = {
    "small": (("square", 512, 512), ("wide", 1536, 576)),
    "8b": (("q_proj", 4096, 4096), ("k_proj", 1024, 4096), ("gate_proj", 14336, 4096), ("down_proj", 4096, 14336)),
    "70b": (("q_proj", 8192, 8192), ("k_proj", 1024, 8192), ("gate_proj", 28672, 8192), ("down_proj", 8192, 28672)),
}
_TOKENS = {"small": (128,), "8b": (1, 64, 4096), "70b": (1, 64, 4096)}
"""Decoding of one token, decoding of a batch, and a training step."""

SHAPES = tuple(_LAYERS)


def sizes(shapes: str, per_token: bool) -> list[BenchSize]:
    """List the sizes of `small`, `8b` or `70b`; if `per_token`, each layer with every number of tokens."""
    layers = _LAYERS[shapes]
    if not per_token:
        return [BenchSize(*layer) for layer in layers]
    return [BenchSize(*layer, tokens) for layer in layers for tokens in _TOKENS[shapes]]
