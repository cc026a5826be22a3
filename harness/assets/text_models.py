"""The types of models that transformers has for texts, read from its source: importing it takes seconds. No torch."""

from __future__ import annotations

import ast
from functools import cache
from importlib.util import find_spec
from pathlib import Path

_NAMES = {
    "causal": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "encoder": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
}
CACHES = ("cache", "past_key_values", "cache_params")
"""Names of the key-value cache argument: since transformers 5.24, before it, and of state-space models before it."""
_START, _END = " = OrderedDict(", "\n)\n"


def lacks(kind: str, model_type: str) -> bool:
    """Say whether the installed transformers knows this type, and has no model of this kind (`causal`, `encoder`) of it.

    Of a type that it does not know nothing is said: where the Cell runs another release may, or the folder brings its code.
    """
    there = _types(kind)
    return bool(there) and model_type not in there and f'("{model_type}", ' in _source()


@cache
def _types(kind: str) -> frozenset[str]:
    """Return the types of a kind; none where the source does not look as it did."""
    _, found, rest = _source().partition(_NAMES[kind] + _START)
    return frozenset(dict(ast.literal_eval(rest.partition(_END)[0].strip()))) if found else frozenset()


@cache
def _source() -> str:
    package = find_spec("transformers")
    file = Path(package.origin).parent / "models" / "auto" / "modeling_auto.py" if package and package.origin else None
    return file.read_text(encoding="utf-8") if file is not None and file.is_file() else ""
