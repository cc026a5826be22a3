"""Combinations of settings that the fixed sample of cases tries once, because some faults show only in combination.

A factor is a setting of a case. The module imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from harness.conformance.drawing.factors import Factor

BEYOND_16_BITS = 65_600
"""Number of rows or blocks above 65,535, which is the largest 16-bit number and the largest second side of a CUDA grid."""
_THIN = (4, 4)
"""Sides of the weight in a case with `BEYOND_16_BITS` rows. They are small, so that the case is small."""
_VOCABULARY = (BEYOND_16_BITS, 8)
_SLOW_DECAY = 0.99
"""Smallest beta2 that counts as near 1. With such a beta2, the bias correction still matters after a hundred steps."""


def beyond_16_bits(factors: Mapping[str, Factor]) -> Iterator[dict[str, Any]]:
    """Yield values of factors with more rows, or more blocks of a quantised weight, than 16 bits can count.

    The other factors of such a case have their plainest values. There is no such case for stacked experts: their
    gradients are sums over all rows, and the rounding errors of these sums exceed the tolerance.
    """
    shape = factors.get("shape")
    if "experts" in factors:
        return
    if shape is not None and shape.dimensions == (2,):
        for name in factors.keys() & {"rows", "tokens"}:
            yield {name: (BEYOND_16_BITS,) if factors[name].dimensions else BEYOND_16_BITS, "shape": _THIN}
    elif shape is not None and "block" in factors:
        block = min(factors["block"].levels)
        yield {"shape": (BEYOND_16_BITS, block), "block": block}


def combinations(factors: Mapping[str, Factor]) -> Iterator[dict[str, Any]]:
    """Yield each combination as values of some factors. All other factors of its case have their plainest values.

    - beta2 near 1, with a step shortly after 1 / (1 - beta2). There, the bias correction sqrt(1 - beta2^step) is 0.8.
    - A large gate before each activation, in float16. DoRA is off, because it would divide by the norm of the gate.
    - A square layer with each kind of layer, and with each option that is a word or a switch. In a square layer, a
      transposed weight has the right shape, so only its values show the mistake.
    - An embedding with more entries than 16 bits can count.
    - Dropout with a scaling of 1, for which a program may have a shorter path.
    - A bias of B in a model whose layers all have a bias. HF peft can merge a bias of B only in such layers.
    """
    if "step" in factors and "beta2" in factors:
        for beta in (*factors["beta2"].levels, *factors["beta2"].extremes):
            if beta >= _SLOW_DECAY:
                yield {"beta2": beta, "step": round(1 / (1 - beta)) + 1}
    if "activation" in factors and "gate" in factors:
        for activation in factors["activation"].levels if "float16" in factors["dtype"].levels else ():
            yield {"activation": activation, "gate": "large", "dora": False, "dtype": "float16"}
    if "scaling" in factors and "dropout" in factors:
        yield {"scaling": 1.0, "dropout": factors["dropout"].levels[1]}
    if "lora_bias" in factors and "model" in factors:
        yield {"lora_bias": True, "model": "wide"}
    if "kind" in factors and "sides" in factors:
        square = next(sides for sides in factors["sides"].levels if sides[0] == sides[1])
        for name, factor in factors.items():
            words = factor.optional and not isinstance(factor.levels[0], float)
            yield from ({name: level, "sides": square} for level in factor.levels[1:] if words)
        yield from ({"kind": kind, "sides": _VOCABULARY} for kind in factors["kind"].levels if kind == "embedding")
