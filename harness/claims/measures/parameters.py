"""Measures: numbers of parameters, counted on the meta device with the Method's reference attached."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from fractions import Fraction
from typing import Literal

from harness.claims import attached_model
from harness.claims.measure import Config, MeasureResult, Method, Model, measure
from harness.claims.sums import Shape, in_words, summed, total

Split = dict[str, list[str]]
"""Names of the parts of each fused layer, e.g. `{c_attn: [q, k, v]}` for GPT-2. A config may then adapt single parts."""


@measure("count")
def parameters(model: Model, without: list[str] | None = None, only: list[str] | None = None) -> MeasureResult:
    """Number of parameters of a model. Tied parameters count once.

    without, only: regular expressions. Parameters whose names match one of `without` are left out. If `only` is given,
    just the parameters whose names match one of `only` are counted. Raises ValueError for an expression that matches no
    name.
    """
    every = attached_model.parameters(model)
    left_out = fitting(every, without) if without else []
    return summed(tuple(every[name].shape) for name in fitting(every, only) if name not in left_out)


@measure("count")
def trainable_parameters(
    model: Model,
    method: Method,
    config: Config = {},
    split: Split = {},
    only: list[str] | None = None,
    also: list[str] | None = None,
) -> MeasureResult:
    """Number of trainable parameters of a Method attached to a model, without a classifier's new head.

    only, also: regular expressions. If `only` is given, just the tensors of the Method whose names match one of `only`
    are counted. Parameters of the model whose names match one of `also`, e.g. `classifier` or `embed_tokens`, count as
    trainable too. A parameter that the Method trains anyway counts once.
    """
    return summed(_trained(model, method, config, split, only, also))


@measure("count")
def frozen_tensors_of_the_method(
    model: Model,
    method: Method,
    config: Config = {},
    split: Split = {},
    only: list[str] | None = None,
) -> MeasureResult:
    """Number of elements of the tensors that a Method adds but does not train, such as VeRA's projections.

    A tensor that several layers share counts once.
    """
    every = attached_model.frozen(model, method, config, split)
    return summed(every[name] for name in fitting(every, only))


@measure("share")
def trainable_share(
    model: Model,
    method: Method,
    config: Config = {},
    of: Literal["base", "base+adapter"] = "base",
    split: Split = {},
    only: list[str] | None = None,
    also: list[str] | None = None,
) -> MeasureResult:
    """Trainable parameters of a Method, as a share of the model's parameters.

    of: if it is `base+adapter`, the model's parameters include the trainable parameters of the Method; if it is `base`,
    they do not. only, also: as in `trainable_parameters`.
    """
    trained = _trained(model, method, config, split, only, also)
    top, base = total(trained), attached_model.parameter_count(model)
    bottom = base + top if of == "base+adapter" else base
    return MeasureResult(Fraction(top, bottom), f"{top:,} / {bottom:,}, with {in_words(trained)}")


@measure("count")
def adapted_layers(model: Model, method: Method, config: Config = {}, split: Split = {}) -> MeasureResult:
    """Number of layers that a Method adapts."""
    paths = {name.rpartition(".")[0] for name in attached_model.trained(model, method, config, split)}
    ends = Counter(path.rpartition(".")[2] for path in paths)
    return MeasureResult(len(paths), " + ".join(f"{number} of {name}" for name, number in sorted(ends.items())))


def _trained(
    model: str, method: str, config: Config, split: Split, only: list[str] | None, also: list[str] | None
) -> list[Shape]:
    by_method = attached_model.trained(model, method, config, split)
    sizes = {name: by_method[name] for name in fitting(by_method, only)}
    if also:
        own = attached_model.parameters(model)
        sizes |= {name: tuple(own[name].shape) for name in fitting(own, also)}
    return list(sizes.values())


def fitting(names: Iterable[str], patterns: list[str] | None) -> list[str]:
    """Return the names that match at least one of the regular expressions; all names if `patterns` is None.

    Raises ValueError for an expression that matches no name, because it would silently count nothing.
    """
    every = list(names)
    if patterns is None:
        return every
    for pattern in patterns:
        if not any(re.search(pattern, name) for name in every):
            some = ", ".join(f"`{name}`" for name in dict.fromkeys([*every[:2], *every[-2:]]))
            raise ValueError(f"`{pattern}` matches none of {len(every)} names, e.g. {some or 'none'}")
    return [name for name in every if any(re.search(pattern, name) for pattern in patterns)]
