"""Measures: trainable parameters of LoRA's baselines, by the formulas of arXiv:2106.09685, section 5.1.

In these formulas, d is the width of the model, and L is its number of blocks.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Annotated, Literal

from pydantic import Field

from harness.claims import attached_model
from harness.claims.measure import MeasureResult, Model, Positive, Quantity, measure
from harness.claims.measures.baselines import of_some
from harness.claims.sums import Shape, in_words, total

Tokens = Annotated[int, Field(ge=0)]
"""A parameter that is a number of virtual tokens."""
Design = Literal["houlsby", "lin", "pfeiffer"]
"""A parameter that names a design of adapters: `houlsby`, `lin` and `pfeiffer` are the paper's `AdapterH`, `AdapterL`
and `AdapterP`."""

_PER_BLOCK = {"houlsby": (2, 0), "lin": (1, 1), "pfeiffer": (1, 0)}
"""Design -> number of adapters, and number of trained layer norms, in each block. `houlsby` has an adapter after the
attention and one after the MLP. `lin` has one after the MLP and the norm. `pfeiffer` has one after the MLP."""


@measure("count")
def adapters(model: Model, design: Design, rank: Positive) -> MeasureResult:
    """Number of parameters of adapters: L_Adpt (2 d r + r + d) + 2 L_LN d.

    L_Adpt is the number of adapters, and L_LN the number of trained layer norms. d is the width of the model, and r is
    `rank`, the inner width of an adapter. An adapter is two linear layers with biases.
    """
    d, depth = _width_and_depth(model)
    number, norms = (depth * each for each in _PER_BLOCK[design])
    count = number * (2 * d * rank + rank + d) + 2 * norms * d
    trained_norms = f" + 2 x {norms} x {d:,}" if norms else ""
    return MeasureResult(count, f"{number} x (2 x {d:,} x {rank} + {rank} + {d:,}){trained_norms}")


@measure("count")
def adapters_of_some_rank(
    model: Model, design: Design, printed: Quantity, last: Quantity, fitted: bool = False
) -> MeasureResult:
    """Number of parameters of adapters, if the paper prints this number but not the rank.

    If some rank gives the printed number, the result is a range over ranks. printed: the printed number. last: one unit
    of its last digit. fitted: return the number at the nearest rank instead of a range (see `at_some_rank`).
    """
    d, depth = _width_and_depth(model)
    number, norms = (depth * each for each in _PER_BLOCK[design])
    return of_some(Fraction(number * d + 2 * norms * d), Fraction(number * (2 * d + 1)), printed, last, fitted, "rank")


@measure("count")
def prefix_embedding(model: Model, prefix: Tokens, infix: Tokens) -> MeasureResult:
    """Number of parameters of prefix-embedding tuning, which trains the embeddings of virtual tokens: d (l_p + l_i).

    d is the width of the model, l_p is `prefix`, and l_i is `infix`.
    """
    d, _ = _width_and_depth(model)
    return MeasureResult(d * (prefix + infix), f"{d:,} x ({prefix} + {infix})")


@measure("count")
def prefix_layer(model: Model, prefix: Tokens, infix: Tokens) -> MeasureResult:
    """Number of parameters of prefix-layer tuning: L d (l_p + l_i).

    It trains the activations of virtual tokens after every block. L is the number of blocks, d is the width of the
    model, l_p is `prefix`, and l_i is `infix`.
    """
    d, depth = _width_and_depth(model)
    return MeasureResult(depth * d * (prefix + infix), f"{depth} x {d:,} x ({prefix} + {infix})")


@measure("count")
def prefix_layer_of_some_length(model: Model, printed: Quantity, last: Quantity, fitted: bool = False) -> MeasureResult:
    """Number of parameters of prefix-layer tuning, if the paper prints this number but not the number of virtual tokens.

    If some number of tokens gives the printed number, the result is a range. printed: the printed number. last: one
    unit of its last digit. fitted: return the number for the nearest number of tokens instead.
    """
    d, depth = _width_and_depth(model)
    return of_some(Fraction(0), Fraction(depth * d), printed, last, fitted, "token")


@measure("count")
def last_blocks(model: Model, blocks: Positive) -> MeasureResult:
    """Number of parameters of the last `blocks` blocks of a model."""
    of_block: dict[int, list[Shape]] = {}
    for name, tensor in attached_model.parameters(model).items():
        if index := re.search(r"\.(\d+)\.", name):
            of_block.setdefault(int(index[1]), []).append(tuple(tensor.shape))
    if blocks > len(of_block):
        raise ValueError(f"`blocks` is {blocks}, but the model has {len(of_block)} blocks")
    last = sorted(of_block)[-blocks:]
    sizes = [shape for index in last for shape in of_block[index]]
    return MeasureResult(total(sizes), f"blocks {last[0]} to {last[-1]}: {in_words(sizes)}")


def _width_and_depth(model: str) -> tuple[int, int]:
    config = attached_model.model(model).config
    return config.hidden_size, config.num_hidden_layers
