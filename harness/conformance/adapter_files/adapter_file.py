"""One LoRA adapter on disk: adapter_config.json and adapter_model.safetensors, as HF peft writes them. No pickle is read."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.conformance.adapter_files.adapter_config import CONFIG, read_json_object, require_lora
from harness.conformance.adapter_files.other_layouts import LAYOUTS, layout_of
from harness.errors import UsageError, first_names, plural
from harness.methods.task_base import task_base
from reference.adapter_file import PREFIX, AdapterSettings

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS = "adapter_model.safetensors"
_BESIDE = "an adapter needs its config beside its weights"
_PICKLES = ("adapter_model.bin", "adapter_model.pt", "pytorch_lora_weights.bin")


@dataclass(frozen=True)
class TensorHeader:
    """Dtype and shape of a tensor, from the header of a safetensors file."""

    dtype: str
    """Name as in the file, e.g. `F32`."""
    shape: tuple[int, ...]


@dataclass(frozen=True)
class AdapterFile:
    """One LoRA adapter on disk. Its tensors stay in the file until `tensors` or `stream` reads them."""

    weights: Path
    """Path of the safetensors file. The config is in the same folder."""
    config: Mapping[str, Any]
    """Content of the adapter_config.json."""
    header: Mapping[str, TensorHeader]
    """Key -> dtype and shape, for each tensor of the file."""

    @classmethod
    def read(cls, path: Path) -> AdapterFile:
        """Read the config and the header of an adapter.

        path: the folder, or the file adapter_model.safetensors in it. Raises UsageError if the file does not exist, if
        it is not a safetensors file, if it has the layout of another program, or if the config is not that of a LoRA.
        """
        weights = _weights(path)
        header, where = read_header(weights), weights.parent / CONFIG
        config = read_json_object(where, _BESIDE) if where.is_file() else {}
        if "peft_type" not in config and (layout := layout_of(header)):
            hint = "`peft-harness check PATH` judges the format of HF peft; convert the file to it"
            what = (
                f"this is a {layout} LoRA file ({plural(len(header), 'tensor')}, e.g. {next(iter(header))}): not judged"
            )
            raise UsageError(what, where=str(weights), hint=hint)
        require_lora(config or read_json_object(where, _BESIDE), where)
        return cls(weights, config, header)

    @property
    def folder(self) -> Path:
        """Folder with the config and the weights."""
        return self.weights.parent

    @property
    def local_base(self) -> Path | None:
        """Folder of the base model that the config names, relative to the working directory or to the adapter.

        None if there is no such folder.
        """
        name = self.config.get("base_model_name_or_path")
        if not isinstance(name, str) or not name:
            return None
        folders = (Path(name), Path(os.path.normpath(self.folder / name)))
        with contextlib.suppress(OSError):  # a name that is too long, or a folder without the right to read it
            return next((one for one in folders if (one / "config.json").is_file()), None)
        return None

    def base_for_task(self, folder: Path) -> Path:
        """Return a folder from which the base model loads as the class that this adapter needs, e.g. a classifier.

        folder: the base model. If its config.json names another class or number of labels, the result is a temporary copy.
        """
        shapes: dict[str, tuple[int, ...]] = {}
        for key, one in self.header.items():
            name = key.removeprefix(PREFIX).replace(".base_layer", "")
            shapes[name.partition(".lora_")[0]] = one.shape
        return task_base(folder, self.config, shapes, self.folder / CONFIG)

    @property
    def settings(self) -> AdapterSettings:
        """The settings of the config on which the adapted weights depend, such as rank and alpha."""
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


def _weights(path: Path) -> Path:
    """Return the path of an adapter's weights. Raises UsageError if there is no such file."""
    hint = "give the folder that peft's `save_pretrained` wrote, or its adapter_model.safetensors"
    try:
        if not path.is_dir():
            if path.is_file():
                if path.name == CONFIG:
                    raise UsageError("is the adapter's config, not its weights", where=str(path), hint=hint)
                return path
            found: list[str] = []
        else:
            found = sorted(one.name for one in path.iterdir())
    except OSError as error:  # no right to read the folder, or a name that is too long
        raise UsageError(f"cannot be read ({error.strerror})", where=str(path), hint=hint) from error
    for name in (WEIGHTS, *(one.file for one in LAYOUTS if one.file)):
        if (path / name).is_file():
            return path / name
    if WEIGHTS in found:
        raise UsageError("is no regular file, or a link to nothing", where=str(path / WEIGHTS), hint=hint)
    within = [name for name in found if (path / name / CONFIG).is_file()]
    if within:
        hint = f"the adapter is in a folder below: {first_names(within)}"
    elif pickles := [name for name in _PICKLES if name in found or (path.parent / name).is_file()]:
        hint = f"{pickles[0]} is a pickle, which may run code; save the adapter again as safetensors"
    elif "model.safetensors" in found:
        hint = f"this is the folder of a base model; {hint}"
    raise UsageError("there is no such file", where=str(path / WEIGHTS if found else path), hint=hint)


def read_header(path: Path) -> dict[str, TensorHeader]:
    """Return the header of a safetensors file. No tensor is read. Raises UsageError if the file is not valid."""
    from safetensors import SafetensorError, safe_open

    try:
        with path.open("rb"):  # safetensors would call a file without the right to read it a missing file
            pass
    except OSError as error:
        raise UsageError(
            f"cannot be read ({error.strerror})", where=str(path), hint="make the file readable"
        ) from error
    try:
        with safe_open(path, framework="pt") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118  # not a mapping
            return {key: TensorHeader(one.get_dtype(), tuple(one.get_shape())) for key, one in slices.items()}
    except (SafetensorError, OSError) as error:
        hint = "save the adapter again; `peft-harness check` reads safetensors only"
        raise UsageError(f"is not a safetensors file ({error})", where=str(path), hint=hint) from error
