"""Sizes of the layers that `bench` times, and smaller sizes for the checks. This module imports no torch.

There are the layers of Llama-3-8B and Llama-3-70B, and some small layers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

MOST_WEIGHTS = {"cpu": 2**24, "cuda": 2**26}
"""Device -> largest number of elements that a weight may have in a check.

The float64 reference holds about ten copies of the weight.
"""
MOST_PRODUCTS = {"cpu": 2**31, "cuda": 2**40}
"""Device -> largest number of multiplications that a matrix product may have in a check.

The float64 reference computes about ten such products. Each product takes seconds on a CPU.
"""


@dataclass(frozen=True)
class BenchSize:
    """A linear layer, its input and the rank of its adapter."""

    layer: str
    E: int
    """Number of output features."""
    D: int
    """Number of input features."""
    tokens: int = 1
    """Number of rows of the input x."""
    rank: int = 16
    """Rank of a LoRA adapter. For other Methods, the rank is a multiple of this number."""

    @property
    def weights(self) -> int:
        """Number of elements of the weight."""
        return self.E * self.D

    def judged(self, device: str, per_token: bool) -> BenchSize:
        """Return the size on which the checks run: this size, or a smaller one if the reference would be too slow.

        A smaller size has fewer rows of the weight, or fewer rows of x. The longer side of the weight stays the longer
        side. per_token: whether the timed call has an input x.
        """
        size = self
        if size.weights > MOST_WEIGHTS[device]:
            rows = max(1, MOST_WEIGHTS[device] // size.D)
            size = replace(size, E=max(rows, size.D) if size.E >= size.D else rows)
        if per_token and size.tokens * size.weights > MOST_PRODUCTS[device]:
            size = replace(size, tokens=max(1, min(size.tokens, MOST_PRODUCTS[device] // size.weights)))
        return size


TINY = BenchSize("tiny", 128, 128, 1, 4)
"""A size at which a call does hardly any work. The time of such a call is its overhead."""

_LAYERS = {
    "small": (("square", 512, 512), ("wide", 1536, 576)),
    "8b": (("q_proj", 4096, 4096), ("k_proj", 1024, 4096), ("gate_proj", 14336, 4096), ("down_proj", 4096, 14336)),
    "70b": (("q_proj", 8192, 8192), ("k_proj", 1024, 8192), ("gate_proj", 28672, 8192), ("down_proj", 8192, 28672)),
}
_TOKENS = {"small": (128,), "8b": (1, 64, 4096), "70b": (1, 64, 4096)}
"""Name of a set of layers -> numbers of rows of x with which each layer is timed.

In `8b` and `70b`, 1 row stands for decoding one token, 64 rows for decoding a batch, and 4096 rows for a training step.
"""

SHAPES = tuple(_LAYERS)


def sizes(shapes: str, per_token: bool) -> list[BenchSize]:
    """Return the sizes of one set of layers: `small`, `8b` or `70b`.

    per_token: if true, a layer occurs once for each number of tokens; if false, it occurs only once.
    """
    layers = _LAYERS[shapes]
    if not per_token:
        return [BenchSize(*layer) for layer in layers]
    return [BenchSize(*layer, tokens) for layer in layers for tokens in _TOKENS[shapes]]
