"""Factors of a case: every setting of a Method or an Operation, with the values that cases try. Imports no torch.

A Method's settings are the fields of its Config. An Operation's settings are the keyword parameters of its function
`arguments`, whose annotations hold a `Factor`:

    def arguments(dtype, generator, *, shape: Matrix, rows: Rows, rank: Rank, bias: bool = True) -> Arguments: ...
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from harness.methods.spec import FieldInfo

ELEMENTS = 80_000
"""Largest number of elements of a random tensor. It exceeds 65,536, where some kernels begin another block. Yet a case
takes only a tenth of a second."""
LARGEST_SIZE = 300
"""Largest random rank or block, unless the setting has a smaller maximum. It exceeds 256, the size of the kernels'
tiles."""
BEYOND_8_BITS = 300
"""Number of adapters or experts above 255, the largest 8-bit number."""
WIDEST = 16_400
"""Number of features above 16,384, the longest row that a kernel reads as one block. Llama 2 has 11,008."""
LARGEST_RANK = 1030
"""Largest rank that a case has. It exceeds every side of the kernels' tiles."""
LENGTHS = tuple(range(1, 13))
"""Possible lengths of random lists, such as lists of sequences or of adapters."""
_KEY = 2**31
"""An integer setting with a maximum of at least this number is a key or a seed, not a size."""


@dataclass(frozen=True)
class Factor:
    """A setting of a case, with the values that cases try."""

    levels: tuple[Any, ...]
    """Representative values, the plainest first. `check --wide` covers every pair of levels of two factors."""
    extremes: tuple[Any, ...] = ()
    """Further values, such as very large ones. The fixed sample tries each of them once, beside plain values of the other
    factors."""
    least: float | None = None
    """Smallest number that is drawn at random. None if only levels are drawn."""
    most: float | None = None
    """Largest number that is drawn at random. For a factor that holds a tensor's sizes, the largest number of elements."""
    dimensions: tuple[int, ...] = ()
    """Possible lengths, if the setting is a list; empty otherwise. If `least` is None, the list holds the sizes of a
    tensor. Otherwise it holds numbers from `least` to `most`."""
    optional: bool = False
    """True if an implementation need not support any level except the first."""

    def within(self, least: float | None, most: float | None) -> Factor:
        """Return the factor with these bounds; None keeps the present bound.

        A level outside becomes the nearest bound. An extreme value outside is left out.
        """
        low = self.least if least is None else least
        high = self.most if most is None else most
        levels = dict.fromkeys(type(v)(min(max(v, low or 0), math.inf if high is None else high)) for v in self.levels)
        extremes = tuple(v for v in self.extremes if (low is None or v >= low) and (most is None or v <= most))
        return replace(self, levels=tuple(levels), extremes=extremes, least=low, most=high)


Rank = Annotated[int, Factor((3, 1, 16, 65, 130), (20, 40, 100, 260, LARGEST_RANK), least=1, most=LARGEST_SIZE)]
ThreeRanks = Annotated[
    Sequence[int],
    Factor(
        ((3, 8, 2), (1, 1, 1), (16, 4, 65), (130, 3, 17)),
        ((520, 260, 100), (5, 520, 1030)),
        least=1,
        most=LARGEST_SIZE,
        dimensions=(3,),
    ),
]
Scaling = Annotated[
    float, Factor((1.75, 1.0, 0.0, 0.3, 16.0, -2.0), (2.0, 4.0, 100.0, 1e-3, -0.25), least=-64.0, most=64.0)
]
Dropout = Annotated[float, Factor((0.0, 0.25, 0.5, 0.75), (0.01, 0.9, 0.95), least=0.0, most=0.95, optional=True)]
Tokens = Annotated[int, Factor((3, 1, 130, 515), (2, 16, 1030, 2060), least=1, most=600)]
Step = Annotated[int, Factor((7, 2, 50, 1000), (3, 100, 256, 257, 4097, 70_000), least=2, most=10_000)]
FirstStep = Annotated[int, Factor((7, 1, 2, 50, 1000), (3, 100, 256, 257, 4097, 70_000), least=1, most=10_000)]
WeightDecay = Annotated[float, Factor((0.0, 0.1, 0.5), (0.001, 2.0), least=0.0, most=1.0)]
Beta = Annotated[float, Factor((0.9, 0.0, 0.5, 0.999), (0.95, 0.99, 0.9999), least=0.0, most=0.999)]
Eps = Annotated[float, Factor((1e-6, 1e-8, 1e-3, 0.1), (1e-12, 1.0), least=1e-8, most=1.0)]
LearningRate = Annotated[float, Factor((0.1,), (0.0, 1e-3, 1.0, 4.0), least=0.0, most=4.0)]
WeightMagnitude = Annotated[str, Factor(("normal",), ("large", "small"))]
Numel = Annotated[int, Factor((1024, 1, 600, 4097, 65_700), (2, 255, 2049, 270_001), least=1, most=ELEMENTS)]
Block = Literal[64, 32, 128, 256, 512, 1024, 2048, 4096]
Matrix = Annotated[
    Sequence[int],
    Factor(
        ((24, 40), (24, 24), (1, 33), (12, 1030), (520, 12), (257, 300)),
        ((4100, 8), (8, 4100), (520, 521), (264, 264), (33, 1), (31, 17), (3, WIDEST), (WIDEST, 3)),
        dimensions=(2,),
    ),
]
Shape = Annotated[
    Sequence[int],
    Factor(
        ((5, 96), (64,), (1,), (0, 64), (63, 65), (3, 5, 7), (12, 1030), (257, 300)),
        ((128, 128), (4100,), (2, 3, 4, 5), (4100, 33), (520, 521), (0,), (2,), (1, 1)),
        dimensions=(1, 2, 3),
    ),
]
Rows = Annotated[
    Sequence[int],
    Factor(
        ((17,), (1,), (), (0,), (2, 3, 4), (515,)),
        ((1, 1), (5, 1), (1, 7), (2, 0), (2, 1, 2, 3), (16,), (130,), (2060,)),
        most=300,
        dimensions=(1, 2, 3),
    ),
]


def of_field(field: FieldInfo, *, is_rank: bool = False) -> Factor | None:
    """Return the factor for a field of a Config. If the field is a list of layers, return None.

    is_rank: True if the setting is a rank, which has extreme values of its own.
    """
    if field.is_list:
        return None
    if field.type == "bool":
        return Factor((field.default, not field.default), optional=True)
    if field.choices is not None:
        others = tuple(choice for choice in field.choices if choice != field.default)
        return Factor((field.default, *others), optional=field.type == "str")
    if field.type == "int":
        return _of_whole_number(field, is_rank)
    least, most = field.minimum, field.maximum
    if most is not None and most <= 1:
        levels = _distinct((field.default, least or 0.0, 0.1, 0.5, 0.75))
        extremes = _others((0.01, 0.9, 0.95, 0.99, 0.9999), levels, least, most)
        return Factor(levels, extremes, least, min(most, 0.95), optional=field.default == least)
    size = abs(field.default) or 1.0
    low = max(least if least is not None else 0.0, -size * 64)
    high = min(most if most is not None else math.inf, size * 64)
    special = (v for v in (1.0, 0.0, -size) if low < v <= high or v == least)  # programs treat these as special cases
    levels = _distinct((field.default, size / 64, size * 8, *special))
    return Factor(levels, _others((size / 1000, size * 64), levels, least, most), low, high)


def _of_whole_number(field: FieldInfo, is_rank: bool) -> Factor:
    least = int(field.minimum or 0)
    if field.maximum is not None and field.maximum >= _KEY:
        keys = (field.default, 7, 2**31, 2**32 - 1)
        levels = _distinct(tuple(key for key in keys if least <= key <= field.maximum))
        return Factor(levels, _others((2**32, 2**32 + 7), levels, least, field.maximum), least, int(field.maximum))
    most = int(min(field.maximum if field.maximum is not None else math.inf, max(LARGEST_SIZE, field.default)))
    levels = _distinct(tuple(level for level in (field.default, least, 3, 130) if least <= level <= most))
    extremes = (20, 40, 100, 260, LARGEST_RANK) if is_rank else (2, LARGEST_RANK)
    return Factor(levels, _others(extremes, levels, least, field.maximum), least, most)


def of_config(fields: Mapping[str, FieldInfo]) -> dict[str, Factor]:
    """Return the factors for the fields of a Config, by name. Lists of layers are left out."""
    found = {name: of_field(field, is_rank=name.endswith("rank")) for name, field in fields.items()}
    return {name: factor for name, factor in found.items() if factor is not None}


def of_signature(function: Callable[..., object]) -> dict[str, Factor]:
    """Return the factors for the keyword-only parameters of a function, by name and in order.

    Raises TypeError for a parameter whose annotation has no Factor and is neither a bool nor a Literal.
    """
    hints = get_type_hints(function, include_extras=True)
    parameters = inspect.signature(function).parameters.values()
    return {p.name: _of_hint(p, hints[p.name]) for p in parameters if p.kind is p.KEYWORD_ONLY}


def _of_hint(parameter: inspect.Parameter, hint: Any) -> Factor:
    for one in get_args(hint)[1:] if get_origin(hint) is Annotated else ():
        if isinstance(one, Factor):
            return one
    if hint is bool:
        return Factor((False, True) if parameter.default is False else (True, False))
    if get_origin(hint) is Literal:
        return Factor(get_args(hint))
    raise TypeError(f"parameter {parameter.name!r}: annotate it with Annotated[..., Factor(...)], a Literal or bool")


def _others(values: Sequence[Any], levels: Sequence[Any], least: float | None, most: float | None) -> tuple[Any, ...]:
    """Return the items of `values` that lie between `least` and `most` and are not in `levels`. None means no bound."""
    low, high = -math.inf if least is None else least, math.inf if most is None else most
    return tuple(value for value in values if low <= value <= high and value not in levels)


def _distinct(levels: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(dict.fromkeys(levels))


def is_positive(value: Any) -> bool:
    """Return whether a number, or every item of a list of numbers, is above 0. A switch counts as positive."""
    return isinstance(value, bool) or (all(one > 0 for one in value) if isinstance(value, tuple) else value > 0)
