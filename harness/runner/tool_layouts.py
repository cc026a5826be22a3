"""Read the folder of a finished training of trl, Axolotl, LLaMA-Factory, ms-swift or Unsloth. Imports no torch.

All of these programs use the Trainer of transformers. They write an adapter (adapter_config.json,
adapter_model.safetensors) into the folder or into checkpoint-N, and a log (trainer_state.json). Some also write their
settings as text. `training_args.bin` and `optimizer.pt` are pickles, which can run code, and are never opened.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from harness.errors import UsageError
from harness.records.base_model import Json
from harness.records.files import sha256
from harness.records.imported import Imported, LoggedLoss
from harness.yaml_validation import Yaml12Loader

_CONFIG, _WEIGHTS, _STATE = "adapter_config.json", "adapter_model.safetensors", "trainer_state.json"
_PICKLE = "adapter_model.bin"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_AXOLOTL = re.compile(r"axolotl version: `(?P<version>[^`]*)`\s*```yaml\n(?P<yaml>.*?)```", re.DOTALL)
_SETTINGS = (
    "learning_rate", "per_device_train_batch_size", "micro_batch_size", "gradient_accumulation_steps", "max_steps",
    "num_train_epochs", "num_epochs", "lr_scheduler", "lr_scheduler_type", "warmup_steps", "warmup_ratio",
    "weight_decay", "optim", "optimizer", "max_grad_norm", "seed", "bf16", "fp16", "sequence_len", "cutoff_len",
    "max_length", "sample_packing", "packing", "load_in_4bit", "load_in_8bit", "quantization_bit",
    "quantization_method", "quant_bits", "quant_method",
)  # fmt: skip
"""Keys of the settings that are copied into the Record. The training programs write these keys into text files."""
_QUANTISED = ("load_in_4bit", "load_in_8bit", "quantization_bit", "quant_bits")
_OF_STATE = ("global_step", "max_steps", "num_train_epochs", "train_batch_size", "logging_steps")
_MEMORY = "memory(GiB)"
"""Key in the log for the peak memory of a GPU so far. Only ms-swift writes it."""


@dataclass(frozen=True)
class FinishedRun:
    """The folder of a finished training, and the adapter in it that was chosen for the import."""

    folder: Path
    """Folder that the user named."""
    adapter: Path
    """Folder with the chosen adapter: `folder` itself, or a checkpoint in it."""
    checkpoint: int | None
    """N of the folder `checkpoint-N` that holds the adapter. None if the adapter is in no such folder."""

    @classmethod
    def find(cls, folder: Path, checkpoint: int | None = None) -> FinishedRun:
        """Choose the adapter to import from `folder`.

        If `checkpoint` is given, the adapter is in `checkpoint-N` with this number. Otherwise it is in `folder` itself,
        or, if `folder` has no weights, in the last checkpoint. Raises UsageError if there is no adapter there.
        """
        if not folder.is_dir():
            raise UsageError(
                "there is no such folder", where=str(folder), hint="name the folder of a finished training"
            )
        found = _checkpoints(folder)
        if checkpoint is not None:
            if checkpoint not in found:
                hint = f"it has {', '.join(map(str, found))}" if found else "it has none; leave out --checkpoint"
                raise UsageError(f"there is no checkpoint-{checkpoint}", where=str(folder), hint=hint)
            return cls(folder, _require_adapter(found[checkpoint]), checkpoint)
        if not found or any((folder / name).is_file() for name in (_WEIGHTS, _PICKLE)):
            own = _CHECKPOINT.fullmatch(folder.resolve().name)
            return cls(folder, _require_adapter(folder), int(own[1]) if own else None)
        last = max(found)
        return cls(folder, _require_adapter(found[last]), last)

    def facts(self) -> Imported:
        """Return what the files say about the training. Raises UsageError if a file cannot be read."""
        tool, file, settings = self._tool
        state, log = self._state, self._log
        settings = {key: settings[key] for key in _SETTINGS if _is_plain(settings.get(key))}
        settings |= {f"{_STATE}: {key}": state[key] for key in _OF_STATE if _is_plain(state.get(key))}
        if memory := [entry[_MEMORY] for entry in log if isinstance(entry.get(_MEMORY), int | float)]:
            settings["peak memory in the log, GiB"] = max(memory)
        return Imported(
            folder=str(self.folder),
            checkpoint=self.checkpoint,
            tool=tool,
            tool_file=file,
            adapter_sha256=sha256(self.adapter / _WEIGHTS),
            config_sha256=sha256(self.adapter / _CONFIG),
            base_named=str(self._config.get("base_model_name_or_path") or ""),
            settings=settings,
            logged=self._logged,
            absent=[
                name for name, path in ((_STATE, self._state_path), ("README.md", self._file("README.md"))) if not path
            ],
            unknown=dict(self._unknown(settings)),
        )

    def _unknown(self, settings: Mapping[str, Json]) -> Iterator[tuple[str, str]]:
        log = self._log
        yield "order of the training data", "no program writes it"
        yield "time of each step", "the log has only the mean speed"
        yield "base weights", "the folder names the base, but has no hash of its weights"
        if "peak memory in the log, GiB" not in settings:
            yield "peak memory", "the log does not have it"
        if not any(key in settings for key in _QUANTISED):
            yield "quantisation of the base in training", f"{_CONFIG} does not state it"
        if quantised := [key for key in _QUANTISED if settings.get(key)]:
            yield "logits over the quantised base", f"its settings say {quantised[0]}; the Cell's base is not quantised"
        if self._state_path is None:
            yield "loss curve", f"there is no {_STATE}"
        elif not self._logged:
            yield "loss curve", f"{_STATE} has no logged training loss"
        if odd := sum(isinstance(loss := entry.get("loss"), float) and not math.isfinite(loss) for entry in log):
            yield f"{odd} of the logged losses", "they are NaN or infinite in the log: training diverged"

    @cached_property
    def _config(self) -> dict[str, Any]:
        return _object(self.adapter / _CONFIG)

    def _file(self, name: str) -> Path | None:
        """Return the path of a file with this name, or None. Search the folder of the adapter, then `folder`.

        If `folder` is itself a `checkpoint-N`, search its parent folder last.
        """
        places = [self.adapter, self.folder]
        if _CHECKPOINT.fullmatch(self.folder.resolve().name):
            places.append(self.folder.resolve().parent)
        return next((place / name for place in places if (place / name).is_file()), None)

    @cached_property
    def _state_path(self) -> Path | None:
        """Path of trainer_state.json, which holds the log. None if there is no such file.

        If the adapter is in `folder` itself and the file is not there, the file of the last checkpoint is used.
        """
        found = self._file(_STATE)
        if found is None and self.checkpoint is None and (checkpoints := _checkpoints(self.folder)):
            path = checkpoints[max(checkpoints)] / _STATE
            found = path if path.is_file() else None
        return found

    @cached_property
    def _state(self) -> dict[str, Any]:
        return _object(self._state_path) if self._state_path else {}

    @cached_property
    def _log(self) -> list[dict[str, Any]]:
        log = self._state.get("log_history", [])
        if not isinstance(log, list) or not all(isinstance(entry, dict) for entry in log):
            hint = "copy the file again, or remove it: the loss curve is then unknown"
            raise UsageError("log_history is not a list of entries", where=str(self._state_path), hint=hint)
        return log

    @cached_property
    def _logged(self) -> list[LoggedLoss]:
        """The logged losses up to the chosen checkpoint, without NaN and infinite losses."""
        return [
            LoggedLoss(step=entry["step"], loss=float(entry["loss"]))
            for entry in self._log
            if isinstance(entry.get("loss"), int | float)
            and math.isfinite(entry["loss"])
            and isinstance(entry.get("step"), int)
            and (self.checkpoint is None or entry["step"] <= self.checkpoint)
        ]

    @cached_property
    def _tool(self) -> tuple[str, str, dict[str, Any]]:
        """Name of the program that wrote the folder, the file that shows this, and the settings in its text files.

        All of them are empty if no file shows the program.
        """
        if path := self._file("args.json"):
            return "ms-swift", "args.json", _object(path)
        for name in ("training_args.yaml", "llamaboard_config.yaml"):
            if path := self._file(name):
                return "LLaMA-Factory", name, _yaml(path.read_text(encoding="utf-8", errors="replace"), path)
        if self._file("trainer_log.jsonl"):
            return "LLaMA-Factory", "trainer_log.jsonl", {}
        path = self._file("README.md")
        card = path.read_text(encoding="utf-8", errors="replace") if path else ""
        if path and (found := _AXOLOTL.search(card)):
            return f"Axolotl {found['version']}", "README.md", _yaml(found["yaml"], path)
        mapping = self._config.get("auto_mapping")
        if isinstance(mapping, dict) and mapping.get("unsloth_fixed"):
            return "Unsloth", _CONFIG, {}
        if re.search(r"^- unsloth$", card, re.MULTILINE):
            return "Unsloth", "README.md", {}
        if re.search(r"^- trl$", card, re.MULTILINE):
            return "trl", "README.md", {}
        return "", "", {}


def _is_plain(value: object) -> bool:
    """Return whether `value` is a str, a bool or a finite number."""
    return isinstance(value, str | bool | int) or (isinstance(value, float) and math.isfinite(value))


def _checkpoints(folder: Path) -> dict[int, Path]:
    """Return the checkpoints in a folder, in ascending order: number -> folder."""
    found = {
        int(match[1]): path
        for path in folder.iterdir()
        if path.is_dir() and (match := _CHECKPOINT.fullmatch(path.name))
    }
    return dict(sorted(found.items()))


def _require_adapter(folder: Path) -> Path:
    """Return `folder` if it holds an adapter. Otherwise, raise UsageError."""
    absent = [name for name in (_WEIGHTS, _CONFIG) if not (folder / name).is_file()]
    if not absent:
        return folder
    hint = "name the folder that `save_pretrained` or `save_model` wrote, or a folder with checkpoint-N in it"
    if (folder / _PICKLE).is_file() and _WEIGHTS in absent:
        hint = f"{_PICKLE} is a pickle, which may run code; load it where you trust it, and save it as safetensors"
    elif inner := sorted(path.name for path in folder.iterdir() if path.is_dir() and _checkpoints(path)):
        hint = f"name the run in it: {', '.join(inner)}"
    raise UsageError(f"there is no {' and no '.join(absent)}", where=str(folder), hint=hint)


def _object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file. Raises UsageError if there is none."""
    hint = "copy the file again" if path.name == _CONFIG else "copy the file again, or remove it to import without it"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"is not JSON ({error})", where=str(path), hint=hint) from error
    if not isinstance(content, dict):
        raise UsageError("is not a JSON object", where=str(path), hint=hint)
    return content


def _yaml(text: str, path: Path) -> dict[str, Any]:
    """Return the YAML mapping in a text, without values that are not plain (`_is_plain`). Raises UsageError for other
    texts.
    """
    try:
        content = yaml.load(text, Loader=Yaml12Loader)  # noqa: S506  # a subclass of the safe loader
    except yaml.YAMLError as error:
        reason = str(error).partition("\n")[0]
        hint = "copy the file again, or remove it to import without it"
        raise UsageError(f"its settings are not YAML ({reason})", where=str(path), hint=hint) from error
    return content if isinstance(content, dict) else {}
