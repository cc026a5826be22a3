"""Find the class of the base model on which an adapter was trained, and the number of labels of the model's head.

A classifier is usually trained on a base that was saved as a causal model. The file of the base then has no head for
the task; only the adapter's file has one.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from harness.errors import Unsupported, UsageError
from harness.methods.base_model import empty_model, model_class, read_config

_MAPPINGS = {
    "CAUSAL_LM": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "SEQ_2_SEQ_LM": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "SEQ_CLS": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "TOKEN_CLS": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    "QUESTION_ANS": "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES",
    "FEATURE_EXTRACTION": "MODEL_MAPPING_NAMES",
}
"""task_type of peft -> name of the table in transformers that maps a model_type to the model class for this task."""
WITH_LABELS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")
"""Values of task_type for which a new head is trained. The head in the adapter's file shows the number of labels."""
_MARK = 7919
"""A number of labels unlike any other size in a model. A parameter with this size therefore belongs to the head."""


def task_base(folder: Path, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], where: Path) -> Path:
    """Return a folder with the base model of the class on which an adapter was trained.

    folder: the base. config: content of the adapter_config.json. shapes: name of a module or parameter in the base ->
    shape of the adapter's tensor for it. where: path of the adapter_config.json, for errors. If the class and the
    number of labels are those of the base's config.json, the result is `folder`. Otherwise it is a temporary folder
    with a changed config.json and links to the other files, which is removed when the process ends. Raises Unsupported
    if transformers has no class for this task and base, and UsageError if the base cannot be read, or if auto_mapping
    names an object of transformers that is not a model class.
    """
    task = config.get("task_type")
    base: Any = read_config(folder)
    found = list(_candidates(base, task, _mapped(config, where)))
    if not found:
        raise Unsupported(f"transformers has no class for task_type {task} and model_type {base.model_type}")
    fitting = found[0]
    if len(found) > 1:
        fitting = next((name for name in found if _has_any(folder, name, shapes)), fitting)
    labels = _labels(folder, fitting, shapes) if task in WITH_LABELS else 0
    if [fitting] == list(base.architectures or ()) and labels in (0, base.num_labels):
        return folder
    return _changed(folder.resolve(), fitting, labels).path


def _mapped(config: Mapping[str, Any], where: Path) -> str:
    """Return the name of the base's class in auto_mapping. If there is a task_type, or no auto_mapping, return "".

    peft writes auto_mapping if there is no task_type. The class may be from another library than transformers. Raises
    UsageError if the name is that of an object in transformers that is not a model class.
    """
    import transformers

    name = (config.get("auto_mapping") or {}).get("base_model_class")
    if config.get("task_type") is not None or name is None:
        return ""
    if not isinstance(name, str) or (hasattr(transformers, name) and model_class(name) is None):
        what = f"base_model_class in auto_mapping is {name!r}, which is no class of a model in transformers"
        hint = "write the class of the base model, such as LlamaForCausalLM; or set auto_mapping to null"
        raise UsageError(what, where=str(where), hint=hint)
    return name


def _candidates(base: Any, task: str | None, mapped: str) -> Iterator[str]:
    """Yield names of classes of transformers for this task, the most likely one first. mapped: result of `_mapped`."""
    from transformers.models.auto import modeling_auto

    own = list(base.architectures or ())[:1]
    table: Mapping[str, Any] = getattr(modeling_auto, _MAPPINGS.get(task or "", ""), {})
    of_task = table.get(base.model_type, ())
    of_task = [of_task] if isinstance(of_task, str) else list(of_task)
    if task in WITH_LABELS:
        names = own if set(own) & set(table.values()) else of_task
    elif task is None:
        names = [mapped, *own]
    else:
        names = [*own, *of_task] if task != "FEATURE_EXTRACTION" else [*of_task, *own]
    yield from dict.fromkeys(name for name in names if isinstance(name, str) and model_class(name))


def _has_any(folder: Path, name: str, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    return any(path in shapes for path, _ in empty_model(folder, name).named_modules())


def _labels(folder: Path, name: str, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Return the number of labels of the head in the adapter's file, or 0 if the file has no head."""
    for parameter, tensor in empty_model(folder, name, _MARK).named_parameters():
        if _MARK in tensor.shape[:1] and shapes.get(parameter):
            return int(shapes[parameter][0])
    return 0


@dataclass(frozen=True)
class _ChangedBase:
    """A temporary folder with a changed config.json. Python removes the folder together with this object."""

    folder: tempfile.TemporaryDirectory[str]

    @property
    def path(self) -> Path:
        return Path(self.folder.name)


@cache
def _changed(folder: Path, name: str, labels: int) -> _ChangedBase:
    view = _ChangedBase(tempfile.TemporaryDirectory(prefix="base-"))
    for file in folder.iterdir():
        if file.name != "config.json":
            (view.path / file.name).symlink_to(file)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8")) | {"architectures": [name]}
    if labels:
        config["id2label"] = {str(i): f"LABEL_{i}" for i in range(labels)}
        config["label2id"] = {f"LABEL_{i}": i for i in range(labels)}
    (view.path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return view
