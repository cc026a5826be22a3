"""Base models in a local folder: load one, and compute its logits. torch is imported on the first call."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub.errors import StrictDataclassError

from harness.errors import UsageError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

_IN_CONFIG = (ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError, StrictDataclassError)
"""Errors that transformers raises for an invalid value in config.json."""
_HINT = "give the folder of the base model: config.json and model.safetensors"
_KEPT_B = 2**22
"""Models with at most this many bytes of weights stay in memory: checks load tiny models hundreds of times."""


def read_config(folder: Path) -> Any:
    """Return the config of the model in a folder. Raises UsageError if transformers cannot read it."""
    import transformers

    if not (folder / "config.json").is_file():
        raise UsageError(
            "is not a folder with a config.json", where=str(folder), hint=f"{_HINT}; a name on the Hub is not fetched"
        )
    try:
        return transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (*_IN_CONFIG, OSError, RecursionError) as error:
        reason = str(error).partition("\n")[0]
        raise UsageError(f"no base model can be read ({reason})", where=str(folder), hint=_HINT) from error


def model_class(name: str) -> Any:
    """Return transformers' model class with this name, or None if there is none. Auto classes are not returned."""
    import transformers

    found = getattr(transformers, name, None)
    is_model = isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)
    return found if is_model and getattr(found, "config_class", None) else None


def _model_class(folder: Path) -> tuple[Any, Any]:
    """Return the config and the class of the model in a folder. Raises UsageError if transformers knows no such model."""
    config = read_config(folder)
    names = config.architectures or []
    found = model_class(names[0]) if names else None
    if found is None:
        named = f"`architectures` in config.json is {names}"
        raise UsageError(
            f"{named}, which is not a model class of the installed transformers", where=str(folder), hint=_HINT
        )
    return config, found


def load_base(folder: Path, dtype: torch.dtype) -> nn.Module:
    """Load the base model in a folder, with eager attention, in evaluation mode, in `dtype`.

    Raises UsageError if the folder has no readable model, or if the installed transformers lacks its class.
    """
    files = [folder / name for name in ("config.json", "model.safetensors")]
    if all(file.is_file() for file in files) and files[1].stat().st_size <= _KEPT_B:
        times = tuple(file.stat().st_mtime_ns for file in files)
        from harness.methods.module_copy import copied

        return copied(_kept(folder.resolve(), dtype, times))
    return _loaded(folder, dtype)


@cache
def _kept(folder: Path, dtype: torch.dtype, times: tuple[int, ...]) -> nn.Module:
    """Load a small base model, and keep it in memory. times: modification times of its files, a part of the cache's key."""
    return _loaded(folder, dtype)


def _loaded(folder: Path, dtype: torch.dtype) -> nn.Module:
    from safetensors import SafetensorError

    _, factory = _model_class(folder)
    try:
        model, info = factory.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation="eager",
            experts_implementation="eager",
            local_files_only=True,
            use_safetensors=True,
            use_kernels=False,  # layers are those of transformers; its release 5.25 would ask the hub for others
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        reason = str(error).partition("\n")[0]
        hint = "save the base with `save_pretrained`, which writes model.safetensors; pickles are not read"
        raise UsageError(f"the weights of the base cannot be read ({reason})", where=str(folder), hint=hint) from error
    model.missing_weights = frozenset(info["missing_keys"])
    found: nn.Module = model.eval().requires_grad_(False)
    return found


def missing_weights(model: nn.Module) -> frozenset[str]:
    """Return the names of the parameters that `load_base` drew at random because the folder has no weights for them."""
    found: frozenset[str] = model.missing_weights  # type: ignore[assignment]
    return found


def empty_base(folder: Path) -> nn.Module:
    """Return the base model in a folder, on the device `meta`. Only the config is read. Raises UsageError as `load_base`."""
    config, factory = _model_class(folder)
    return _empty(folder, config, factory)


def empty_model(folder: Path, name: str, labels: int = 0) -> nn.Module:
    """Return a model of the class `name` of transformers on the device `meta`, with the config in a folder.

    labels: number of labels of its head; 0 for the number in the config.
    """
    import transformers

    config = read_config(folder)
    if labels:
        config.num_labels = labels
    return _empty(folder, config, getattr(transformers, name))


def _empty(folder: Path, config: Any, factory: Any) -> nn.Module:
    import torch

    try:
        with torch.device("meta"):
            model: nn.Module = factory(config)
    except (*_IN_CONFIG, RuntimeError) as error:
        what = f"no {factory.__name__} can be made from config.json ({error})"
        raise UsageError(what, where=str(folder), hint=_HINT) from error
    return model


def logits(model: nn.Module, prompts: Sequence[Sequence[int]], starts: Sequence[int] = ()) -> list[Tensor]:
    """Return the logits of a model for each prompt. Run one prompt at a time, without a KV cache.

    prompts: token ids. Each result is (tokens, vocabulary) for a causal model, and (labels,) for a classifier. starts:
    for a causal model, the index in each prompt of the first token whose logits are returned; empty for all tokens.
    """
    import torch

    found = []
    with torch.no_grad():
        for index, prompt in enumerate(prompts):
            out: Tensor = model(input_ids=torch.tensor([list(prompt)]), use_cache=False).logits[0]
            found.append(out[starts[index] :].clone() if starts else out)
    return found
