"""The logits that an adapter file must give, computed from the file by the reference. No adapter library is involved."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from harness.conformance.adapter_files.adapter_file import AdapterFile
from harness.conformance.comparison.moved_numbers import perturbed
from harness.errors import Unsupported, UsageError, first_names
from harness.methods.base_model import load_base, logits, missing_weights
from harness.methods.unsupported_adapters import reason, unsupported
from reference.adapter_file import apply, combine


def reference_logits(
    base_folder: Path,
    adapter: AdapterFile | None,
    prompts: Sequence[Sequence[int]],
    dtype: torch.dtype = torch.float64,
    perturbation: torch.Generator | None = None,
    starts: Sequence[int] = (),
) -> list[Tensor]:
    """Return the logits of the base with the weights that the adapter file gives, one tensor per prompt, in `dtype`.

    The shapes are (tokens, vocabulary), or (labels,) for a classifier. The config's task_type decides the model's
    class. A model computes some parts in float32 for every dtype; if `dtype` is float64, they are in float64 too.

    adapter: None for the base alone. prompts: token ids. perturbation: generator that moves each weight by up to half a
    unit in its last place, as rounding may do. starts: for each prompt, the index of the first token whose logits are
    returned; if empty, the logits of all tokens are returned.

    Raises UsageError if the file does not fit the base, or if both lack the weights of a layer. Raises Unsupported for
    a config that the reference does not implement.
    """
    model = load_base(base_folder if adapter is None else adapter.base_for_task(base_folder), dtype)
    if dtype is torch.float64:
        model = model.double()  # converts the frequencies of rotary embeddings too
    missing = set(missing_weights(model))
    if adapter is not None:
        if found := unsupported(adapter.config):
            raise Unsupported(reason(found))
        hint = f"is {base_folder} the base of this adapter? `peft-harness check {adapter.folder}` judges the file"
        try:
            reading = apply(model, adapter.settings, adapter.tensors())
        except ValueError as error:
            raise UsageError(str(error), where=str(adapter.weights), hint=hint) from error
        if not reading.updates and not reading.replaced:
            raise UsageError("no tensor has a place in the base", where=str(adapter.weights), hint=hint)
        missing -= set(reading.replaced.values())
    if missing:
        what = f"has no weights for {first_names(sorted(missing))}, which each load would draw anew"
        hint = "save these layers with the adapter (modules_to_save), or give the base that was trained on"
        raise UsageError(what, where=str(base_folder), hint=hint)
    return logits_of(model, prompts, perturbation, starts)


@dataclass(frozen=True)
class WeightedAdapterFile:
    """One adapter in a weighted sum of adapters."""

    folder: Path
    weight: float = 1.0
    factor: float = 1.0
    """Number by which the file's scaling is multiplied."""


def combined(base_folder: Path, parts: Sequence[WeightedAdapterFile], dtype: torch.dtype) -> nn.Module:
    """Return the base with a weighted sum of adapters, in `dtype`. If `parts` is empty, return the base."""
    model = load_base(base_folder, dtype)
    if dtype is torch.float64:
        model = model.double()
    files = [(AdapterFile.read(part.folder), part) for part in parts]
    combine(model, [(file.settings.scaled(part.factor), file.tensors(), part.weight) for file, part in files])
    return model


def logits_of(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    perturbation: torch.Generator | None = None,
    starts: Sequence[int] = (),
) -> list[Tensor]:
    """Return the logits of a model from `combined` or `reference_logits`. The other arguments are those of the latter.

    A perturbation changes the weights of `model` in place.
    """
    dtype = next(model.parameters()).dtype
    if perturbation is not None:
        for parameter in model.parameters():
            parameter.data = perturbed(parameter.data, str(dtype).removeprefix("torch."), perturbation)
    if dtype is not torch.float64:
        return logits(model, prompts, starts)
    with _Float64():
        return logits(model, prompts, starts)


class _Float64(TorchFunctionMode):
    """Within this context, a float64 tensor stays in float64, even where a model asks for float32.

    In transformers, norms, softmax and rotary embeddings convert to float32. This conversion would round the result.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call `func`, with float64 in place of float32 if the first argument is a float64 tensor.

        `Tensor.float` always gives float64.
        """
        named = dict(kwargs or {})
        if args and isinstance(args[0], Tensor) and args[0].dtype is torch.float64:
            if func is Tensor.float:
                func, args = Tensor.double, args[:1]
            args = tuple(torch.float64 if one is torch.float32 else one for one in args)
            named = {key: torch.float64 if one is torch.float32 else one for key, one in named.items()}
        elif func is Tensor.float:
            func = Tensor.double
        return func(*args, **named)
