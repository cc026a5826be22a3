"""One LoRA adapter on disk: adapter_config.json and adapter_model.safetensors, as HF peft writes them. No pickle is read."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.errors import UsageError
from reference.adapter_file import AdapterSettings

if TYPE_CHECKING:
    from torch import Tensor

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_PICKLES = ("adapter_model.bin", "adapter_model.pt", "pytorch_lora_weights.bin")
_TYPES = {
    "r": int, "lora_alpha": (int, float), "use_rslora": bool, "use_dora": bool, "lora_bias": bool, "bias": str,
    "rank_pattern": dict, "alpha_pattern": dict, "target_modules": (str, list), "exclude_modules": (str, list),
    "target_parameters": list, "modules_to_save": list, "layers_to_transform": (int, list),
    "layers_pattern": (str, list), "task_type": str,
}  # fmt: skip
"""Key of the config -> types of its value in JSON. null stands for the default."""


@dataclass(frozen=True)
class TensorHeader:
    """Dtype and shape of a tensor, from the header of a safetensors file."""

    dtype: str
    """Name as in the file, e.g. `F32`."""
    shape: tuple[int, ...]


@dataclass(frozen=True)
class AdapterFile:
    """One adapter. The tensors are read only by `tensors`."""

    weights: Path
    """Path of the safetensors file. The config is in the same folder."""
    config: Mapping[str, Any]
    """Content of the adapter_config.json."""
    header: Mapping[str, TensorHeader]
    """Key -> dtype and shape of each tensor of the file."""

    @classmethod
    def read(cls, path: Path) -> AdapterFile:
        """Read the config and the header of an adapter.

        path: the folder, or the file adapter_model.safetensors in it. Raises UsageError if the file does not exist, if
        it is not a safetensors file, or if the config is not that of a LoRA.
        """
        weights = path / WEIGHTS if path.is_dir() else path
        if not weights.is_file():
            pickles = [name for name in _PICKLES if (weights.parent / name).is_file()]
            hint = "give the folder that peft's `save_pretrained` wrote, or its adapter_model.safetensors"
            if pickles:
                hint = f"{pickles[0]} is a pickle, which may run code; save the adapter again as safetensors"
            raise UsageError("there is no such file", where=str(weights), hint=hint)
        config = read_json_object(weights.parent / CONFIG, "an adapter needs its config beside its weights")
        _require_lora(config, weights.parent / CONFIG)
        return cls(weights, config, read_header(weights))

    @property
    def folder(self) -> Path:
        """Folder with the config and the weights."""
        return self.weights.parent

    @property
    def local_base(self) -> Path | None:
        """Folder that base_model_name_or_path names, relative to the working directory or to the adapter, if it exists."""
        name = self.config.get("base_model_name_or_path")
        if not isinstance(name, str) or not name:
            return None
        folders = (Path(name), Path(os.path.normpath(self.folder / name)))
        return next((one for one in folders if (one / "config.json").is_file()), None)

    @property
    def settings(self) -> AdapterSettings:
        """The keys of the config that decide the weights."""
        return AdapterSettings.of(self.config)

    def tensors(self) -> dict[str, Tensor]:
        """Read and return all tensors, on the CPU, in the dtypes of the file."""
        return dict(self.stream())

    def stream(self) -> Iterator[tuple[str, Tensor]]:
        """Read the tensors one by one, and yield each with its key."""
        from safetensors import safe_open

        with safe_open(self.weights, framework="pt") as file:
            for key in self.header:
                yield key, file.get_tensor(key)


def read_json_object(path: Path, hint: str) -> dict[str, Any]:
    """Return the JSON object in a file. hint: advice to show in the error.

    Raises UsageError if the file is missing, cannot be read or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot be read ({error.strerror})", where=str(path), hint=hint) from error
    except ValueError as error:  # not UTF-8, or not JSON
        raise UsageError(f"is not JSON ({error})", where=str(path), hint=hint) from error
    if not isinstance(content, dict):
        raise UsageError("is not a JSON object", where=str(path), hint=hint)
    return content


def read_header(path: Path) -> dict[str, TensorHeader]:
    """Return the header of a safetensors file. No tensor is read. Raises UsageError if the file is not valid."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118  # not a mapping
            return {key: TensorHeader(one.get_dtype(), tuple(one.get_shape())) for key, one in slices.items()}
    except (SafetensorError, OSError) as error:
        hint = "save the adapter again; `peft-harness check` reads safetensors only"
        raise UsageError(f"is not a safetensors file ({error})", where=str(path), hint=hint) from error


def _require_lora(config: Mapping[str, Any], where: Path) -> None:
    """Raise UsageError unless the config is that of a LoRA, and every value has the type that it needs."""
    kind = config.get("peft_type")
    if kind != "LORA":
        hint = "`peft-harness check PATH` judges LoRA adapters: peft_type LORA"
        raise UsageError(f"unknown type of adapter: peft_type is {kind!r}", where=str(where), hint=hint)
    for key, types in _TYPES.items():
        value = config.get(key)
        wrong = not isinstance(value, types) or (isinstance(value, bool) and types is not bool)  # type: ignore[arg-type]
        if value is not None and wrong:
            raise UsageError(f"{key} is {value!r}", where=str(where), hint="write it as peft's `save_pretrained` does")
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern, value in (config.get(key) or {}).items():
            if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
                raise UsageError(f"{key}: {pattern!r} is {value!r}", where=str(where), hint="write a positive number")
    if config.get("r") is not None and config["r"] < 1:
        raise UsageError(f"r is {config['r']}", where=str(where), hint="a rank is at least 1")
