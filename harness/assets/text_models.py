"""List the types of text models in transformers. Reads its source, because importing it takes seconds. No torch."""

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
    """Return whether the installed transformers knows this type but has no model of this kind (`causal`, `encoder`) for it.

    False for an unknown type: the folder may have its code, or the Cell may run with another release.
    """
    there = _types(kind)
    return bool(there) and model_type not in there and f'("{model_type}", ' in _source()


@cache
def _types(kind: str) -> frozenset[str]:
    """Return the types of a kind; none if the source has changed its form."""
    _, found, rest = _source().partition(_NAMES[kind] + _START)
    return frozenset(dict(ast.literal_eval(rest.partition(_END)[0].strip()))) if found else frozenset()


@cache
def _source() -> str:
    package = find_spec("transformers")
    file = Path(package.origin).parent / "models" / "auto" / "modeling_auto.py" if package and package.origin else None
    return file.read_text(encoding="utf-8") if file is not None and file.is_file() else ""
