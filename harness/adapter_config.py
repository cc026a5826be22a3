"""`method: peft`: any method of HF peft by its adapter_config.json: a Method without a reference. No torch.

The file is read when the suite is, and its content stands in the Cell: a cell_id hashes what it says, not where it lay. What
only peft can tell (a key that it does not know, layers that the model does not have) comes up in the worker.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from harness.errors import UsageError
from harness.methods import FieldInfo, MethodInfo
from harness.resources import named
from harness.spelling import near

FILE = "adapter_config.json"
KEY = "adapter_config"
NO_REFERENCE = "no reference: not checked for parity"

_REFUSED = {
    "CPT": "its loss is also that of the examples in its prompt, which peft's own forward pass takes from labels",
    "SHADOW": "its loss is also that of a second model, which peft's own forward pass takes from labels",
    "XLORA": "it mixes adapters that were trained before",
}
_REFUSED_KEYS = {
    "alora_invocation_tokens": "it acts only behind these tokens, and no text of a task need hold them",
    "arrow_config": "it mixes adapters that were trained before",
    "layer_replication": "it makes another model, of more layers",
    "monteclora_config": "it adds a term to the loss that peft leaves to the training loop",
}
"""Keys of LoRA's."""
_REFUSED_STARTS = {
    "corda": "it wants to see texts first (peft's `preprocess_corda`)",
    "eva": "it wants to see texts first (peft's `initialize_lora_eva_weights`)",
    "lora_ga": "it wants to see gradients first (peft's `preprocess_loraga`)",
    "pissa_niter": "its fast SVD draws anew when peft loads the adapter, over another residual; write `pissa`",
}
"""Values of LoRA's `init_lora_weights`. peft itself would train without a word what is no EVA and no LoRA-GA."""
_VIRTUAL = ("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CARTRIDGE")
"""Types that put virtual tokens before every text."""
IN_THE_CACHE = ("PREFIX_TUNING", "CARTRIDGE")
"""Types whose virtual tokens are keys and values of every block; of the others they are embeddings."""
_OF_CAUSAL = dict.fromkeys(IN_THE_CACHE, "gives its tokens as a key-value cache, which no encoder has") | {
    "ADAPTION_PROMPT": "is made for the attention of Llama, Mistral and GPT-2"
}
_KINDS = {"CAUSAL_LM": "causal", "SEQ_CLS": "encoder"}
"""What peft calls the tasks of the harness's two kinds of models."""
_HEADS = {"classifier", "score"}
"""What peft adds to `modules_to_save` of a classifier; the harness trains every new head anyway."""


@dataclass(frozen=True)
class AdapterConfig:
    """The Config of this Method: the keys of an adapter_config.json, as they are."""

    adapter_config: dict[str, Any]


@dataclass(frozen=True)
class AdapterConfigField(FieldInfo):
    """The one knob: the path of an adapter_config.json, or of its folder, or its keys themselves."""

    @property
    def called(self) -> str:
        """The type in the words of a suite's author."""
        return f"the path of an {FILE}, or its keys"

    @property
    def shown_default(self) -> str:
        """What a suite would write."""
        return "none"

    @property
    def mend(self) -> str:
        """What to write instead of a value that is wrong."""
        return f"write `{KEY}: ./my-adapter/{FILE}`, as peft's `save_pretrained` makes it"

    def resolved(self, value: Any, folder: Path) -> Any:
        """Read the file that a suite in `folder` names. Raises UsageError where it cannot be read."""
        if not isinstance(value, str) or not value:
            return value
        try:
            path = folder / named(value)
            path = path / FILE if path.is_dir() else path
            found = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse)
            json.dumps(found, ensure_ascii=False, allow_nan=False).encode()  # 1e999 and a lone surrogate can be read
        except OSError as error:
            raise UsageError(
                f"{value} cannot be read: {error.strerror}", mend="paths start from the suite's folder"
            ) from error
        except (ValueError, RecursionError) as error:
            raise UsageError(
                f"{value} is no JSON: {error}", mend=f"peft's `save_pretrained` writes an {FILE}"
            ) from error
        return found

    def canonical(self, value: Any) -> Any:
        """Return the value: nothing of the file is changed."""
        return value

    def problem(self, value: Any) -> str:
        """Say what is wrong with the keys of a config, or return an empty string."""
        if value is None:
            return "is missing"
        if not isinstance(value, dict):
            return f"must be {self.called}, got {value!r}"
        kind, known = value.get("peft_type"), peft_types()
        if not isinstance(kind, str):
            keys = f"{', '.join(sorted(map(str, value))[:5])} ..." if value else "it is empty"
            return f"has no `peft_type` ({keys}); is it an {FILE}?"
        if known and kind not in known:
            return f"has peft_type {kind}, which the installed peft does not have; {near(kind, known, 'it has')}"
        if kind in _REFUSED:
            return f"has peft_type {kind}, which is not offered: {_REFUSED[kind]}"
        if refused := [key for key in _REFUSED_KEYS if value.get(key)]:
            return f"has {refused[0]}, which is not offered: {_REFUSED_KEYS[refused[0]]}"
        start = str(value.get("init_lora_weights")).lower()
        start = "pissa_niter" if start.startswith("pissa_niter") else start
        if start in _REFUSED_STARTS:
            return f"has init_lora_weights {start}, which is not offered: {_REFUSED_STARTS[start]}"
        if kind in _VIRTUAL and not virtual_tokens({KEY: value}):
            return f"has num_virtual_tokens {value.get('num_virtual_tokens')}; {kind} wants a whole number, at least 1"
        task, saved = value.get("task_type"), value.get("modules_to_save")
        if task is not None and (not isinstance(task, str) or task not in _KINDS):
            return f"has task_type {task}; the harness has models for {', '.join(_KINDS)}"
        if saved is not None and (not isinstance(saved, list) or not all(isinstance(name, str) for name in saved)):
            return f"has modules_to_save {saved!r}, which is no list of names"
        more = set(saved or ()) - _HEADS
        if more:
            return (
                f"has modules_to_save {', '.join(sorted(more))}; the harness trains the adapter and a new head, no more"
            )
        return ""

    def misfit(self, value: Any, kind: str) -> str:
        """Say why a sound config is not one for a model of this kind (`causal`, `encoder`), or return an empty string."""
        if kind == "encoder" and (why := _OF_CAUSAL.get(value["peft_type"])):
            return f"has peft_type {value['peft_type']}, which {why}"
        wants = _KINDS.get(value.get("task_type") or "", kind)
        return "" if wants == kind else f"has task_type {value['task_type']}, and the model is of the kind `{kind}`"


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number of JSON")


def virtual_tokens(config: Mapping[str, Any]) -> int:
    """Return how many tokens a Cell's config puts before every text: they take positions of the model."""
    keys = config.get(KEY)
    count = keys.get("num_virtual_tokens") if isinstance(keys, dict) else None
    return max(count, 0) if isinstance(count, int) and not isinstance(count, bool) else 0


@cache
def peft_types() -> tuple[str, ...]:
    """Return the peft_types of the installed peft, read from its source: importing it takes seconds."""
    package = find_spec("peft")
    file = Path(package.origin).parent / "utils" / "peft_types.py" if package and package.origin else None
    if file is None or not file.is_file():
        return ()
    classes = (n for n in ast.parse(file.read_text(encoding="utf-8")).body if isinstance(n, ast.ClassDef))
    return tuple(
        ast.literal_eval(line.value)
        for one in classes
        if one.name == "PeftType"
        for line in one.body
        if isinstance(line, ast.Assign)
    )


PEFT = MethodInfo(
    name="peft",
    summary=f"Any other method of HF peft, by its {FILE}; {NO_REFERENCE}",
    paper="the config's `peft_type` says which; see peft's documentation",
    deviations=(),
    fields={KEY: AdapterConfigField("dict", None)},
    about_fields=(
        f"{KEY}: the path of an {FILE} (it starts from the suite's folder), or its keys. Of "
        f"{', '.join(map(str.lower, _VIRTUAL))} the virtual tokens go before every text and take positions of the model. "
        "Not offered: "
        f"{', '.join(map(str.lower, _REFUSED))}; of LoRA {', '.join((*_REFUSED_KEYS, *_REFUSED_STARTS))}. There is no "
        "reference to compare with, so that no time of such a Cell is shown beside others."
    ),
    path=Path(__file__),
)
UNREFERENCED = {PEFT.name: PEFT}
"""Methods of which the harness has no reference: nothing of them can be checked but what needs none."""
