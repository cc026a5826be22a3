"""Read a case from its name, e.g. to repeat a case that a search has shrunk."""

from __future__ import annotations

import ast
import re
from typing import Any

from harness.conformance.drawing import sample
from harness.conformance.parity_suite import CaseShape, MethodCase, MethodSuite, OperationCase, OperationSuite

_SIZES = ("model", "magnitude", "weights")
"""Words of a name that belong to no config and no Operation."""
_SHAPE = re.compile(r"(\d+)x(\d+)x(\d+)")
_PAIR = {
    MethodSuite: re.compile(r"(\w+)=(\S+)"),
    OperationSuite: re.compile(r"(\w+)=(.+?)(?= \w+=|$)"),  # a list or a value of several words
}


def read(plan: MethodSuite | OperationSuite, name: str) -> MethodCase | OperationCase | None:
    """Return the case with this name and dtype, e.g. `rank=8 conv2d 9x24x40 float32`. None if the name is no full name.

    The values are not checked, so they may be of a wrong type, or out of bounds. Raises ValueError for a shape with a 0.
    """
    of_case, _, dtype = name.rpartition(" ")
    pair = _PAIR[type(plan)]
    values = {key: _value(value) for key, value in pair.findall(of_case)}
    sizes = {key: values.pop(key) for key in _SIZES if key in values}
    known = sample.factors(plan, plan.dtypes)
    if dtype not in plan.dtypes or not (values.keys() | sizes.keys()) <= known.keys():
        return None
    if any(size not in (*known[key].levels, *known[key].extremes) for key, size in sizes.items()):
        return None
    if isinstance(plan, OperationSuite):
        made: MethodCase | OperationCase = OperationCase(values, dtype, **sizes, drawn=True)
    else:
        *kinds, shape = pair.sub("", of_case).split() or [""]
        kind, numbers = " ".join(kinds) or "linear", _SHAPE.fullmatch(shape)
        if kind not in plan.layers or numbers is None:
            return None
        of_shape = CaseShape.model_validate(dict(zip(("tokens", "in", "out"), map(int, numbers.groups()), strict=True)))
        made = MethodCase(values, kind, of_shape, dtype, **sizes, drawn=True)
    return made if f"{made} {made.dtype}" == name else None


def _value(text: str) -> Any:
    """Return the value that `str` shows as this text: a number, None, a switch or a list, otherwise a word."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
