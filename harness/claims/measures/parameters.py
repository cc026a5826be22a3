"""Measures: parameters, counted on a model without weights that has the Method's reference attached."""

from __future__ import annotations

import re
from collections import Counter
from fractions import Fraction
from typing import Any, Literal

from harness.claims.measuring import Config, Found, Method, Model, measure

Split = dict[str, list[str]]
"""Layers that stand for several, e.g. `{c_attn: [q, k, v]}` of GPT-2; then `q` and `v` can be targets."""


@measure("count")
def parameters(model: Model, without: list[str] | None = None, only: list[str] | None = None) -> Found:
    """Parameters of a model, tied ones once.

    without, only: regular expressions of parameters' names that are left out, or are all that is counted.
    """
    return _sum(_parameters(model, without, only))


@measure("count")
def trainable_parameters(
    model: Model,
    method: Method,
    config: Config = {},
    split: Split = {},
    only: list[str] | None = None,
    also: list[str] | None = None,
) -> Found:
    """Parameters that train when a Method is attached to a model; a classifier's new head is not among them.

    only: regular expressions of the Method's tensors, the only ones counted. also: of the model's own parameters that train
    besides, e.g. `classifier` or `embed_tokens`.
    """
    return _sum(_trained(model, method, config, split, only, also))


@measure("count")
def frozen_tensors_of_the_method(
    model: Model,
    method: Method,
    config: Config = {},
    split: Split = {},
    only: list[str] | None = None,
) -> Found:
    """Elements of what a Method makes and does not train (VeRA's projections), once where layers share it."""
    from harness.claims import attached

    every = attached.kept(model, method, config, split)
    return _sum(Counter(shape for name, shape in every.items() if _fits(name, only)))


@measure("share")
def trainable_share(
    model: Model,
    method: Method,
    config: Config = {},
    of: Literal["base", "base+adapter"] = "base",
    split: Split = {},
    only: list[str] | None = None,
    also: list[str] | None = None,
) -> Found:
    """Parameters that train, as a share of the model's own (`base`), or of those and the Method's (`base+adapter`)."""
    from harness.claims import attached

    trained = _trained(model, method, config, split, only, also)
    top, base = attached.total(trained), attached.total(_parameters(model, None, None))
    bottom = base + top if of == "base+adapter" else base
    return Found(Fraction(top, bottom), f"{top:,} / {bottom:,}, with {attached.in_words(trained)}")


@measure("count")
def adapted_layers(model: Model, method: Method, config: Config = {}, split: Split = {}) -> Found:
    """Layers that a Method adapts."""
    from harness.claims import attached

    paths = {name.rpartition(".")[0] for name in attached.trained(model, method, config, split)}
    ends = Counter(path.rpartition(".")[2] for path in paths)
    return Found(len(paths), " + ".join(f"{number} of {name}" for name, number in sorted(ends.items())))


def _trained(
    model: str, method: str, config: Config, split: Split, only: list[str] | None, also: list[str] | None
) -> Any:
    from harness.claims import attached

    sizes = Counter(
        shape for name, shape in attached.trained(model, method, config, split).items() if _fits(name, only)
    )
    return sizes + _parameters(model, None, also) if also else sizes


def _parameters(model: str, without: list[str] | None, only: list[str] | None) -> Any:
    from harness.claims import attached

    every = attached.parameters(model).items()
    return Counter(tuple(p.shape) for name, p in every if _fits(name, only) and not (without and _fits(name, without)))


def _fits(name: str, patterns: list[str] | None) -> bool:
    return patterns is None or any(re.search(pattern, name) for pattern in patterns)


def _sum(sizes: Any) -> Found:
    from harness.claims import attached

    return Found(attached.total(sizes), attached.in_words(sizes))
