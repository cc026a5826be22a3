"""Count the bytes of a training step. The model is on the meta device, without weights.

The module attaches the reference of each Method to count its trainable tensors, and calls each adapted layer to count
the tensors that the layer saves. Nothing is computed. `counting_worker` runs this module in a separate process.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from harness.assets import structure
from harness.cell.measure.latency import positions
from harness.cell.measure.memory import model_tensors, storage_bytes
from harness.cell.training import model as models
from harness.cell.training.head import adapted_layers, head_of, in_head
from harness.conformance.subject import DTYPES, attach_reference, configure
from harness.errors import AssetError, UsageError
from harness.memory_model import activations, saved_activations, state_sizes
from harness.memory_model.ledger import BASES, OWN
from harness.memory_model.messages import CountRequest, MethodCount, ModelCount
from harness.methods import experts
from harness.methods.peft_config import UNREFERENCED
from harness.methods.spec import Adapted
from reference.shared import layers as surgery
from reference.shared.layers import kind_of


class SkipRandomDraws(TorchFunctionMode):
    """Skips the drawing of random numbers: only sizes matter here, and the draws for a large model take minutes."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.pop("generator", None) is None:
            return func(*args, **kwargs)
        return torch.empty(*args, **kwargs) if func is torch.randn else args[0]


def count(
    config: Mapping[str, Any],
    kind: str,
    dtype: str,
    methods: Mapping[str, list[dict[str, Any]]],
    targets: list[str],
    checkpoint: str = "",
) -> ModelCount:
    """Count the bytes of a model for every config of each Method. The arguments are documented in `CountRequest`.

    If a target matches no layer of any Method, the result has only `misfits`. Raises ValueError for a model that
    transformers does not know, and AssetError for an unreadable checkpoint.
    """
    model, lacks = structure.build(config, kind, DTYPES[dtype]), models.lacks(checkpoint)
    head = head_of(model, kind, lacks)
    if misfits := structure.model_misfits(model, targets):
        return {"misfits": misfits}
    names = targets or default_targets(model)
    total = sum(p.numel() for p in model.parameters())
    shape = saved_activations.llama_shape(model, DTYPES[dtype])
    found: dict[str, list[MethodCount]] = {}
    for method, configs in methods.items():
        found[method] = []
        for one in configs:
            try:
                counted = count_method(model, method, one, names, head, DTYPES[dtype])
            except structure.BUILD_ERRORS as error:  # only this config fails; the others are still counted
                counted = {"rank": one.get("rank"), "error": _sentence(error)}
                model = structure.build(config, kind, DTYPES[dtype])  # the old model may be partly adapted
                head = head_of(model, kind, lacks)
            found[method].append(counted)
    return {
        "parameters": total,
        "targets": names,
        "positions": positions(model),
        "logits": activations.logit_bytes_per_token(shape) if shape else None,
        "methods": found,
    }


def default_targets(model: nn.Module) -> list[str]:
    """Return the shortest names that match every linear layer except the output layer, and no other module.

    Each name is an end of a layer's dotted path, such as `q_proj` or `self_attn.q_proj`.
    """
    inner = surgery.targets(model, ("all-linear",), surgery.LINEAR)
    outside = {end for path, _ in model.named_modules() if path not in inner for end in _ends(path)}
    return list(dict.fromkeys(next((end for end in _ends(path) if end not in outside), path) for path in inner))


def _ends(path: str) -> list[str]:
    """List the ends of a dotted path, from the shortest to the whole path."""
    parts = path.split(".")
    return [".".join(parts[-n:]) for n in range(1, len(parts) + 1)]


@contextmanager
def attached(model: nn.Module, method: str, config: object) -> Iterator[Adapted]:
    """Attach the reference of a Method to a model on the meta device, and yield the adapted model.

    No random numbers are drawn. The end of the `with` block detaches the Method. Raises ValueError for a config that
    does not match the model.
    """
    adapted = _attach(model, method, config)
    try:
        yield adapted
    finally:
        adapted.detach()
        model.requires_grad_(False)


def _attach(model: nn.Module, method: str, config: object) -> Adapted:
    with SkipRandomDraws():
        return attach_reference(method, model, config, None, torch.Generator())


def count_method(
    model: nn.Module,
    method: str,
    config: Mapping[str, Any],
    names: list[str],
    head: Mapping[str, nn.Parameter],
    dtype: torch.dtype,
) -> MethodCount:
    """Attach the reference of a Method, count its bytes, detach it, and return the counts.

    names: targets to use if the config has no targets.
    """
    rank = config.get("rank")
    if method in UNREFERENCED:
        return {"rank": rank, "error": f"there is no reference of `{method}` to count"}
    own, shape = {id(p) for p in model.parameters()}, saved_activations.llama_shape(model, dtype)
    targets = {"targets": names} if hasattr(configure(method, {}), "targets") else {}
    try:
        chosen, _ = adapted_layers(model, method, targets | dict(config), head)
        adapted = _attach(model, method, chosen)
    except (UsageError, ValueError) as error:
        return {"rank": rank, "error": error.what if isinstance(error, UsageError) else str(error)}
    layers = {path: layer for path, layer in adapted.layers.items() if not in_head(path, head)}
    added = [t for t in adapted.tensors().values() if id(t) not in own]
    for parameter in head.values():
        parameter.requires_grad_(True)
    trains = list({id(p): p for p in (*adapted.parameters(), *head.values())}.values())
    of_layers, calls = saved_activations.saved_by_layers(layers, dtype)
    every = storage_bytes(model_tensors(model)) - storage_bytes(added)
    own_optimizer, largest = adapted.optimizer(1e-3, 0.0) is not None, sorted(trains, key=nn.Parameter.numel)[-1:]
    found = MethodCount(
        rank=rank,
        error="",
        trainable=sum(p.numel() for p in trains),
        untouched=experts.untouched(model),
        weights=_weights(every, _frozen(layers), calls, dtype),
        adapter=storage_bytes(added),
        gradients=storage_bytes(trains),
        optimizer=state_sizes.optimizer_bytes(adapted, trains, dtype),
        step=state_sizes.bytes_in_step(trains, dtype, own=own_optimizer),
        layerwise=storage_bytes(largest) + state_sizes.bytes_in_step(largest, dtype, own=own_optimizer),
        activations=None,
    )
    if shape is not None:
        inside = saved_activations.sum_over_llama(model, of_layers, layers.keys())
        found["activations"] = (
            activations.bytes_per_token(shape, inside),
            activations.bytes_per_token(shape, inside, checkpointing=True),
        )
    adapted.detach()
    model.requires_grad_(False)
    return found


def _weights(every: int, frozen: list[Tensor], calls: bool, dtype: torch.dtype) -> dict[str, int]:
    """Return the number of bytes of everything except the adapter, for each base that the Method supports.

    every: bytes of everything except the adapter, with unpacked weights. frozen: weights of the adapted layers that a
    4-bit base would pack. calls: whether the adapted layers call their base layers. If they do not, the Method stores
    the weights in its own form.
    """
    if not calls:
        return {OWN: every - storage_bytes(frozen)}
    sizes = Counter(weight.numel() for weight in frozen)
    packed = {base: sum(number * (n * dtype.itemsize - state_sizes.packed_bytes(n, base)) for n, number in sizes.items())
              for base in BASES if base != "none" and sizes}  # fmt: skip
    return {"none": every} | {base: every - saved for base, saved in packed.items()}


def _frozen(layers: Mapping[str, Any]) -> list[Tensor]:
    """List the weights that a 4-bit base would pack: the frozen weights of linear layers."""
    under = [getattr(layer, "base", layer) for layer in layers.values()]
    return [layer.weight for layer in under if kind_of(layer) in surgery.LINEAR and not layer.weight.requires_grad]


def answer(request: CountRequest) -> ModelCount:
    """Return `count(**request)`. If the model cannot be built or counted, the result has only `error`."""
    try:
        return count(**request)
    except AssetError as error:
        return {"error": error.what}
    except structure.BUILD_ERRORS as error:
        return {"error": _sentence(error)}


def _sentence(error: BaseException) -> str:
    return f"its shape cannot be counted: {type(error).__name__}: {error}"
