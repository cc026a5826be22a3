"""`method: peft`: any method of HF peft, configured by an adapter_config.json and without a reference. Imports no torch.

The harness reads the file together with the suite, and the Cell stores the content, so that a cell_id hashes the
content and not the path. peft finds invalid values and unknown layers later, when the Cell runs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.errors import UsageError, closest_match, did_you_mean
from harness.methods import peft_schema
from harness.methods.spec import FieldInfo, FieldProblem, MethodInfo
from harness.resources import user_path
from reference.spec import ReferenceSpec

FILE = "adapter_config.json"
KEY = "adapter_config"
NO_REFERENCE = "no reference: not checked for parity"

_UNSUPPORTED_TYPES = {
    "CPT": "its loss includes the examples in its prompt, which peft's own forward pass takes from labels",
    "SHADOW": "its loss includes that of a second model, which peft's own forward pass takes from labels",
    "XLORA": "it mixes trained adapters",
}
"""Unsupported values of `peft_type`, with the reason."""
_UNSUPPORTED_KEYS = {
    "alora_invocation_tokens": "it acts only after these tokens, which a task's texts need not contain",
    "arrow_config": "it mixes trained adapters",
    "layer_replication": "it makes another model, with more layers",
    "monteclora_config": "it adds a term to the loss that peft leaves to the training loop",
}
"""Unsupported keys of LoRA, with the reason."""
_UNSUPPORTED_INITS = {
    "corda": "it requires texts before training (peft's `preprocess_corda`)",
    "eva": "it requires texts before training (peft's `initialize_lora_eva_weights`)",
    "lora_ga": "it requires gradients before training (peft's `preprocess_loraga`)",
    "pissa_niter": "its fast SVD draws new random numbers when peft loads the adapter, and gives another residual",
}
"""Unsupported values of LoRA's `init_lora_weights`, with the reason. peft itself would silently train another method."""
VIRTUAL_TOKENS = ("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CARTRIDGE")
"""Values of `peft_type` with virtual tokens before every text."""
IN_THE_CACHE = ("PREFIX_TUNING", "CARTRIDGE")
"""Values of `peft_type` whose virtual tokens are keys and values in the cache of every block. Virtual tokens of the other
types are input embeddings."""
_CAUSAL_ONLY = dict.fromkeys(IN_THE_CACHE, "passes its tokens as a key-value cache, which no encoder has") | {
    "ADAPTION_PROMPT": "supports the attention of Llama, Mistral and GPT-2 only"
}
"""Values of `peft_type` for causal models only, with the reason."""
_KINDS = {"CAUSAL_LM": "causal", "SEQ_CLS": "encoder"}
"""`task_type` of peft -> kind of model. Other task types are not supported."""
_HEADS = {"classifier", "score"}
"""Entries that peft adds to the `modules_to_save` of a classifier. The harness trains every head anyway."""


@dataclass(frozen=True)
class AdapterConfig:
    """Config of the Method `peft`."""

    adapter_config: dict[str, Any]
    """Content of the adapter_config.json, unchanged."""


@dataclass(frozen=True)
class AdapterConfigField(FieldInfo):
    """The field `adapter_config` of a suite.

    A value of the field is the path of an adapter_config.json, the path of its folder, or the content of the file. Hints
    show text that is valid in JSON and in YAML.
    """

    @property
    def type_label(self) -> str:
        """Name of the field's type, for authors of suites."""
        return f"the path of an {FILE}, or its keys"

    @property
    def shown_default(self) -> str:
        """The default value, as an author writes it in a suite."""
        return "none"

    @property
    def hint(self) -> str:
        """Hint for an invalid value."""
        return f"write `{KEY}: ./my-adapter/{FILE}`, as peft's `save_pretrained` makes it"

    def resolved(self, value: Any, folder: Path) -> Any:
        """Return the content of the file at the path `value`, relative to `folder`. Return any other value unchanged.

        Raises UsageError if the file cannot be read or is not a JSON object.
        """
        if not isinstance(value, str) or not value:
            return value
        hint = f"peft's `save_pretrained` writes an {FILE}"
        try:
            path = folder / user_path(value)
            path = path / FILE if path.is_dir() else path
            found = json.loads(path.read_bytes().decode("utf-8-sig"))
        except FileNotFoundError as error:
            hint = f"put it at {path}, or correct the path, which starts from the suite's folder"
            raise UsageError(f"{value} cannot be read: {error.strerror}", hint=hint) from error
        except OSError as error:
            hint = "name a file that you may read"
            raise UsageError(f"{value} cannot be read: {error.strerror}", hint=hint) from error
        except UnicodeDecodeError as error:
            raise UsageError(f"{value} is not UTF-8: {error.reason}", hint="save the file as UTF-8") from error
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{value} is not JSON: {error}", hint=f"correct it there; {hint}") from error
        if not isinstance(found, dict):
            raise UsageError(f"{value} is not a JSON object", hint=f"name another file; {hint}")
        return found

    def canonical(self, value: Any) -> Any:
        """Return the value unchanged."""
        return value

    def problem(self, value: Any) -> str:
        """Return all problems of a config in one line, or an empty string."""
        return "; ".join(text for _, text, _ in self.problems(value))

    def is_well_formed(self, value: Any) -> bool:
        """Return whether the config has a `peft_type`. `misfits` needs one."""
        return isinstance(value, dict) and isinstance(value.get("peft_type"), str)

    def problems(self, value: Any) -> Iterator[FieldProblem]:
        """Yield every problem of a config, with the path of the key that causes it."""
        if not isinstance(value, dict):
            problem = "is missing" if value is None else f"must be {self.type_label}, got {value!r}"
            yield (), problem, self.hint
            return
        yield from _json_problems(value)
        yield from _type_problems(value)
        yield from _unknown_keys(value)
        for key in _UNSUPPORTED_KEYS:
            if value.get(key):
                yield (
                    (key,),
                    f"has {key}, which is not supported: {_UNSUPPORTED_KEYS[key]}",
                    f'take `{key}` out, or write "{key}": null',
                )
        start = str(value.get("init_lora_weights")).lower()
        start = "pissa_niter" if start.startswith("pissa_niter") else start
        if start in _UNSUPPORTED_INITS:
            problem = f"has init_lora_weights {start}, which is not supported: {_UNSUPPORTED_INITS[start]}"
            usual = '"pissa"' if start == "pissa_niter" else "true"
            yield ("init_lora_weights",), problem, f'write "init_lora_weights": {usual}'
        task, saved = value.get("task_type"), value.get("modules_to_save")
        if task is not None and (not isinstance(task, str) or task not in _KINDS):
            problem = f"has task_type {task}; the harness has models for {', '.join(_KINDS)}"
            yield ("task_type",), problem, "write one of these, or take `task_type` out"
        if saved is not None and (not isinstance(saved, list) or not all(isinstance(name, str) for name in saved)):
            problem = f"has modules_to_save {saved!r}, which is not a list of names"
            yield ("modules_to_save",), problem, 'take `modules_to_save` out, or write "modules_to_save": null'
        elif extra := set(saved or ()) - _HEADS:
            names = ", ".join(sorted(extra))
            problem = f"has modules_to_save {names}; the harness trains only the adapter and the head"
            yield ("modules_to_save",), problem, f"take {names} out of `modules_to_save`"

    def misfits(self, value: Any, kind: str) -> Iterator[FieldProblem]:
        """Yield every reason why a config does not suit a model of this kind (`causal`, `encoder`)."""
        if kind == "encoder" and (reason := _CAUSAL_ONLY.get(value["peft_type"])):
            yield (
                ("peft_type",),
                f"has peft_type {value['peft_type']}, which {reason}",
                "take another `peft_type`, or another model",
            )
        task = value.get("task_type")
        needed = _KINDS.get(task) if isinstance(task, str) else None
        if needed and needed != kind:
            suitable = next(name for name, value_kind in _KINDS.items() if value_kind == kind)
            problem = f"has task_type {task}, and the model is of the kind `{kind}`"
            yield ("task_type",), problem, f'write "task_type": "{suitable}", or take another model'


def _type_problems(value: Mapping[str, Any]) -> Iterator[FieldProblem]:
    kind, known = value.get("peft_type"), peft_schema.peft_types()
    offered = [name for name in known if name not in _UNSUPPORTED_TYPES]
    if not isinstance(kind, str):
        keys = f"{', '.join(sorted(map(str, value))[:5])} ..." if value else "it is empty"
        hint = f'add it, e.g. "peft_type": "LORA", or name the {FILE} that peft wrote'
        yield (), f"has no `peft_type` ({keys}); is it an {FILE}?", hint
    elif kind in _UNSUPPORTED_TYPES:
        hint = f"write another: {', '.join(offered)}" if offered else "write another"
        yield ("peft_type",), f"has peft_type {kind}, which is not supported: {_UNSUPPORTED_TYPES[kind]}", hint
    elif known and kind not in known:
        problem = f"has peft_type {kind}, which the installed peft does not have"
        yield ("peft_type",), problem, did_you_mean(kind.upper(), offered, "it has")
    elif kind in VIRTUAL_TOKENS and not virtual_tokens({KEY: value}):
        problem = (
            f"has num_virtual_tokens {value.get('num_virtual_tokens')!r}; {kind} needs a whole number of at least 1"
        )
        yield ("num_virtual_tokens",), problem, 'write e.g. "num_virtual_tokens": 8, without quotes around the number'


def _unknown_keys(value: Mapping[str, Any]) -> Iterator[FieldProblem]:
    """Yield a problem for every key that peft would ignore.

    Keys with the value null are allowed, because other versions of peft write them.
    """
    kind = value.get("peft_type")
    known = peft_schema.keys_of(kind) if isinstance(kind, str) and kind not in _UNSUPPORTED_TYPES else frozenset()
    for key in value:
        if known and key not in known and value[key] is not None:
            close = closest_match(str(key), known)
            hint = f"did you mean `{close}`?" if close else f"take `{key}` out"
            yield (key,), f"has {_path((key,))}, which the installed peft's {kind} does not have and would ignore", hint


def _json_problems(config: Any) -> Iterator[FieldProblem]:
    """Yield a problem for every value that Python's JSON reader accepts but JSON cannot express.

    Such values are NaN, 1e999 and half a surrogate pair. A cell_id cannot hash them.
    """
    todo: list[tuple[tuple[str | int, ...], Any]] = [((), config)]
    while todo:
        path, value = todo.pop()
        if isinstance(value, dict):
            todo += [((*path, key), key) for key in value] + [((*path, key), item) for key, item in value.items()]
        elif isinstance(value, list):
            todo += [((*path, index), item) for index, item in enumerate(value)]
        elif isinstance(value, float) and not math.isfinite(value):
            yield path, f"has {_path(path)} {value}, which JSON cannot represent", "write a finite number"
        elif isinstance(value, str) and any("\ud800" <= letter <= "\udfff" for letter in value):
            yield path, f"has half a surrogate pair in {_path(path)}", "write the character itself"


def _path(path: tuple[str | int, ...]) -> str:
    return ascii(".".join(map(str, path)))[1:-1]


def virtual_tokens(config: Mapping[str, Any]) -> int:
    """Return the number of virtual tokens before every text with this config. Each takes up one position of the model."""
    keys = config.get(KEY)
    count = keys.get("num_virtual_tokens") if isinstance(keys, dict) else None
    return max(count, 0) if isinstance(count, int) and not isinstance(count, bool) else 0


_ABOUT = (
    f"Path of an {FILE}, relative to the suite's folder, or its keys. With {', '.join(map(str.lower, VIRTUAL_TOKENS))} "
    "virtual tokens precede every text and take positions of the model. Not supported: "
    f"{', '.join(map(str.lower, _UNSUPPORTED_TYPES))}; of LoRA {', '.join((*_UNSUPPORTED_KEYS, *_UNSUPPORTED_INITS))}. "
    "Without a reference there is no parity check, so reports do not compare the times of such a Cell."
)
PEFT = MethodInfo(
    name="peft",
    summary=f"Any other method of HF peft, by its {FILE}; {NO_REFERENCE}",
    spec=ReferenceSpec(paper="see the documentation of the config's `peft_type` in peft"),
    fields={KEY: AdapterConfigField("dict", None, about=_ABOUT)},
    path=Path(__file__),
)
UNREFERENCED = {PEFT.name: PEFT}
"""Methods without a reference, by name. Only checks that need no reference apply to them."""
