"""Read the adapter_config.json of a LoRA adapter, and refuse invalid values."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from harness.errors import UsageError

CONFIG = "adapter_config.json"
_TYPES = {
    "r": int, "lora_alpha": (int, float), "use_rslora": bool, "use_dora": bool, "lora_bias": bool, "bias": str,
    "rank_pattern": dict, "alpha_pattern": dict, "target_modules": (str, list), "exclude_modules": (str, list),
    "target_parameters": list, "modules_to_save": list, "layers_to_transform": (int, list),
    "layers_pattern": (str, list), "task_type": str, "auto_mapping": dict,
}  # fmt: skip
"""Key of the config -> types of its value in JSON. null stands for the default."""
_ELEMENTS = {
    "target_modules": str, "exclude_modules": str, "target_parameters": str, "modules_to_save": str,
    "layers_pattern": str, "layers_to_transform": int,
}  # fmt: skip
"""Key of the config -> type of each element, if its value is a list."""
_WORDS = {
    "bias": ("none", "all", "lora_only"),
    "task_type": ("CAUSAL_LM", "SEQ_2_SEQ_LM", "SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION"),
}
"""Key of the config -> the values that peft knows."""
_ENDS = r"(.*\.)?({})$"
_FORMS = {
    "target_modules": "{}", "exclude_modules": "{}", "rank_pattern": _ENDS, "alpha_pattern": _ENDS,
    "modules_to_save": r"(^|.*\.){}($|\..*)", "layers_pattern": r"(?:^|.*?\.){}\.(?P<idx>\d+)\.",
}  # fmt: skip
"""Key of the config -> regular expression that peft builds around a pattern of this key. `{}` stands for the pattern."""
_LARGEST = 2**31
"""Largest accepted rank and largest accepted absolute alpha. No layer has so many features."""
_META = "a dot, a bracket or a star has a special meaning; `\\.` stands for a dot"
_AS_PEFT = "write it as peft's `save_pretrained` does"


def read_json_object(path: Path, hint: str) -> dict[str, Any]:
    """Return the JSON object in a file. hint: advice to show in the error.

    Raises UsageError if the file is missing, is not a regular file, cannot be read or holds no JSON object.
    """
    if path.exists() and not path.is_file():  # reading a FIFO would wait for ever
        raise UsageError("is no regular file", where=str(path), hint=hint)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot be read ({error.strerror})", where=str(path), hint=hint) from error
    except ValueError as error:  # not UTF-8, or not JSON
        raise UsageError(f"is not JSON ({error})", where=str(path), hint=hint) from error
    except RecursionError as error:
        raise UsageError(
            "is not JSON that can be read (too many nested brackets)", where=str(path), hint=hint
        ) from error
    if not isinstance(content, dict):
        raise UsageError("is not a JSON object", where=str(path), hint=hint)
    return content


def require_lora(config: Mapping[str, Any], where: Path) -> None:
    """Raise UsageError unless `config` is a valid LoRA config. where: path of the config, for the message."""
    for what, hint in _mistakes(config):
        raise UsageError(what, where=str(where), hint=hint)


def _mistakes(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield pairs (mistake, hint). Use only the first: each test assumes that all earlier tests passed."""
    if (kind := config.get("peft_type")) != "LORA":
        hint = "`peft-harness check PATH` judges LoRA adapters: peft_type LORA"
        yield f"unknown type of adapter: peft_type is {_short(kind)}", hint
    for key, types in _TYPES.items():
        if (value := config.get(key)) is not None and not _is(value, types):
            yield f"{key} is {_short(value)}", _AS_PEFT
    for key, element in _ELEMENTS.items():
        for value in config[key] if isinstance(config.get(key), list) else ():
            if not _is(value, element):
                yield f"{key} has the element {_short(value)}", _AS_PEFT
    for name, rank in _with_patterns(config, "r", "rank_pattern"):
        if not _is(rank, int) or not 1 <= rank <= _LARGEST:
            yield f"{name} is {_short(rank)}", f"write an integer of at least 1, and at most {_LARGEST}"
    for name, alpha in _with_patterns(config, "lora_alpha", "alpha_pattern"):
        if not _is(alpha, (int, float)) or not abs(alpha) <= _LARGEST:
            yield f"{name} is {_short(alpha)}", f"write a number from -{_LARGEST} to {_LARGEST}"
    for key, words in _WORDS.items():
        if (word := config.get(key)) is not None and word not in words:
            yield f"{key} is {_short(word)}", f"write one of {', '.join(words)}"
    for key, pattern in _patterns(config):
        for form, hint in (("{}", _META), (_FORMS[key], "write `(?i:name)` for `(?i)name`, and no group `idx`")):
            try:
                re.compile(form.format(pattern))
            except (re.error, OverflowError, RecursionError) as error:
                place = "" if form == "{}" else f" inside {form.format('…')}"
                yield f"{key}: {_short(pattern)} is not a regular expression{place} ({error})", hint


def _with_patterns(config: Mapping[str, Any], key: str, patterns: str) -> Iterator[tuple[str, Any]]:
    """Yield pairs (name for messages, value) for a setting and its exceptions, such as `r` and `rank_pattern`.

    A setting that is missing or null is left out. patterns: key of a dict that maps patterns of layer names to values.
    """
    if config.get(key) is not None:
        yield key, config[key]
    for pattern, value in (config.get(patterns) or {}).items():
        yield f"{patterns}: {_short(pattern)}", value


def _patterns(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield pairs (key, value) for the values that peft uses as regular expressions."""
    for key in ("target_modules", "exclude_modules"):
        if isinstance(config.get(key), str):
            yield key, config[key]
    for key in ("rank_pattern", "alpha_pattern", "modules_to_save", "layers_pattern"):
        found = config.get(key) or ()
        for pattern in [found] if isinstance(found, str) else found:
            yield key, pattern


def _is(value: Any, types: Any) -> bool:
    """Return whether a value has one of these types. A boolean does not count as a number."""
    return isinstance(value, types) and not (isinstance(value, bool) and types is not bool)


def _short(value: Any) -> str:
    text = f"{len(str(abs(value)))} digits" if isinstance(value, int) and abs(value) > 10**18 else repr(value)
    return text if len(text) <= 80 else f"{text[:79]}…"
