"""Combinations of settings that the fixed sample of cases tries once, because some faults show only in combination.

The module imports no torch.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from harness.conformance.drawing.factors import Factor

BEYOND_16_BITS = 65_600
"""Number of rows or blocks above 65,535, which is the largest 16-bit number and the largest second side of a CUDA grid."""
BEYOND_17_BITS = 131_100
"""Number of blocks above 131,072 = 2^17. With 32 numbers each, they are a weight of more than 2^22 numbers."""
_THIN = (4, 4)
"""Sides of the weight in a case with `BEYOND_16_BITS` rows. They are small, so that the case is small."""
_VOCABULARY = (BEYOND_16_BITS, 8)
BEYOND_20_BITS = (1030, 1100)
"""Sides of a weight with more than 2^20 = 1,048,576 numbers, at which some programs start to compute in pieces. The largest
power of two that divides their product is 8, so the last piece is incomplete."""
BEYOND_22_BITS = (2050, 2060)
"""Sides of a weight with more than 2^22 = 4,194,304 numbers, as most layers of large models have. It divides like
`BEYOND_20_BITS`."""
BEYOND_24_BITS = (4100, 4100)
"""Sides of a weight with more than 2^24 = 16,777,216 numbers. A float32 cannot count further one by one."""
_LEAST_BLOCK, _LONG_BLOCK = 32, 256
"""Blocks of quantised weights: the smallest, and one for a weight with these sides. The latter does not divide a million, so
a piece of a million numbers ends inside a block."""
_SIDE = 12
"""Every size of a layer whose sizes are all equal."""
_LOW_THRESHOLD, _WIDE = 2.5, (12, 1030)
"""A threshold that one of 17 random numbers of a column exceeds in one column of five, and a layer with 1030 columns."""
_SLOW_DECAY = 0.99
"""Smallest beta2 that counts as near 1. With such a beta2, the bias correction still matters after a hundred steps."""


def large_tensors(names: Collection[str], wide: bool) -> Iterator[dict[str, Any]]:
    """Yield values of some factors that make a tensor very large.

    names: the names of all factors. wide: whether the selection of cases is wide.

    A weight, a parameter of an optimizer or an input of `dynamic_quantize` has more than 2^20 numbers. If an Operation
    only quantises or decodes a 4-bit weight, the weight has more than 2^22. In a wide selection, this weight and an 8-bit
    optimizer's parameter also get more than 2^24. A further case of an Operation has more rows, or more blocks of a
    quantised weight, than 16 bits can count. Stacked experts have no such case: their gradients are sums over all rows,
    and the rounding errors of these sums exceed the tolerance.
    """
    if "chosen" in names:
        return
    if "sides" in names:
        yield {"sides": BEYOND_20_BITS}
    elif "shape" in names and "block" in names and "rows" not in names:
        yield {"shape": BEYOND_22_BITS, "block": _LONG_BLOCK}
        if wide:
            yield {"shape": BEYOND_24_BITS, "block": _LONG_BLOCK}
        yield {"shape": (BEYOND_17_BITS, _LEAST_BLOCK), "block": _LEAST_BLOCK}
    elif "shape" in names:
        yield {"shape": BEYOND_20_BITS}
        if wide and "gradient" in names and not {"rank", "ranks"} & {*names}:
            yield {"shape": BEYOND_24_BITS}
        for name in {"rows", "tokens"} & {*names}:
            one_sequence = {"ids": (0,)} if "ids" in names else {}
            yield {name: (BEYOND_16_BITS,) if name == "rows" else BEYOND_16_BITS, "shape": _THIN, **one_sequence}
    elif "numel" in names:
        yield {"numel": math.prod(BEYOND_20_BITS)}
    elif "blocks" in names:
        yield {"blocks": BEYOND_17_BITS}


def combinations(factors: Mapping[str, Factor]) -> Iterator[dict[str, Any]]:
    """Yield each combination as values of some factors. All other factors of its case have their plainest values.

    - beta2 near 1, with a step shortly after 1 / (1 - beta2). There, the bias correction sqrt(1 - beta2^step) is 0.8.
    - A gate layer with a large weight before each activation, in float16. DoRA is off: it divides by the weight's norm.
    - DoRA of a large and of a very small weight, in float16 and in float32.
    - A layer with as many rows of x as inputs, outputs and ranks. A program may mistake one side for another.
    - A square layer with each kind of layer, and with each option that is a word or a switch. In a square layer, a
      transposed weight has the right shape, so only its values show the mistake.
    - An embedding with more entries than 16 bits can count.
    - A small threshold of outliers in a wide layer in eval mode, which makes hundreds of columns outlier columns.
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
    for name in ("gate", "query"):
        sizes = factors[name].extremes if name in factors and "dora" in factors else ()
        yield from (
            {name: size, "dora": True, "dtype": dtype}
            for size, dtype in itertools.product(sizes, ("float16", "float32"))
            if dtype in factors["dtype"].levels
        )
    if "shape" in factors and "rows" in factors:
        ranks = {name: side for name, side in (("rank", _SIDE), ("ranks", (_SIDE,) * 3)) if name in factors}
        yield {"shape": (_SIDE, _SIDE), "rows": (_SIDE,), **ranks}
    if "threshold" in factors:
        yield {"threshold": _LOW_THRESHOLD, "shape": _WIDE, "training": False}
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


def switched_kinds(there: Mapping[str, Factor], tried: Mapping[str, Collection[str]]) -> Iterator[dict[str, Any]]:
    """Yield each switch that is off by default, together with each kind of layer: each kind may have its own code.

    there: the factors, among them `kind`. tried: for each switch, the kinds with which an example already tries it.
    Variants of one kind, such as `conv2d` and `conv2d-grouped`, count as one.
    """
    for name, factor in there.items():
        if factor.levels[0] is False:
            met = list(tried[name])
            for kind in there["kind"].levels:
                if not any(kind.startswith(one) or one.startswith(kind) for one in met):
                    met.append(kind)
                    yield {name: True, "kind": kind}


def with_dropout(there: Mapping[str, Factor], settings: Collection[str]) -> Iterator[dict[str, Any]]:
    """Yield dropout alone, and together with each value of a word or a switch of a Method that is not the plainest.

    Such a value may choose code that drops features by itself. settings: names of the Config's fields.
    """
    if "dropout" not in there:
        return
    dropout = {"dropout": there["dropout"].levels[1]}
    yield dropout
    for name in settings:
        levels = there[name].levels if name in there else ()
        if all(isinstance(level, str | bool) for level in levels):
            yield from (dropout | {name: level} for level in levels[1:])
