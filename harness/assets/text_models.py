"""The types of models that transformers has for texts, read from its source: importing it takes seconds. No torch."""

from __future__ import annotations

import ast
from functools import cache
from importlib.util import find_spec
from pathlib import Path

_NAMES = {
    "any": "MODEL_MAPPING_NAMES",
    "causal": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "encoder": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
}
_START, _END = " = OrderedDict(", "\n)\n"


def lacks(kind: str, model_type: str) -> bool:
    """Say whether the installed transformers knows a type and has no model of this kind (`causal`, `encoder`) of it."""
    there = _types(kind)
    return bool(there) and model_type not in there and model_type in _types("any")


@cache
def _types(kind: str) -> frozenset[str]:
    """Return the types of a kind; none where the source does not look as it did."""
    package = find_spec("transformers")
    file = Path(package.origin).parent / "models" / "auto" / "modeling_auto.py" if package and package.origin else None
    if file is None or not file.is_file():
        return frozenset()
    _, found, rest = file.read_text(encoding="utf-8").partition(f"\n{_NAMES[kind]}{_START}")
    return frozenset(dict(ast.literal_eval(rest.partition(_END)[0].strip()))) if found else frozenset()
