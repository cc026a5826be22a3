"""The bytes of everything that a training step keeps, counted on a model that is built on the meta device: no weights.

What trains is counted by attaching the reference of each Method, and what an adapted layer keeps for its backward pass by
calling it; nothing is drawn and nothing computed. `counting_worker` runs it in a process of its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from harness.assets import structure
from harness.cell.measure.latency import positions
from harness.cell.measure.memory import model_tensors
from harness.cell.training import model as models
from harness.cell.training.head import head_of, in_head, without_head_targets
from harness.conformance.subject import DTYPES, adaptable_layers, attach_reference, configure
from harness.errors import AssetError, UsageError
from harness.memory_model import activations, saved_activations, state_sizes
from harness.memory_model.choices import BASES, OWN
from harness.methods import experts
from harness.methods.peft_config import UNREFERENCED
from reference.shared import layers as surgery
from reference.shared.layers import kind_of

_ERRORS = (ArithmeticError, AttributeError, ImportError, LookupError, OSError, RuntimeError, TypeError, ValueError)
"""What transformers and the references raise for a config that they cannot build; a prediction is never worth a Cell."""


@dataclass
class MethodCount:
    """What one Method keeps at one rank, in bytes. error: why it cannot be attached; then the rest is empty.

    weights: by base. optimizer: by its name, (on the device, in host memory). step: what exists only while it steps.
    untouched: weights of experts that do not train.
    layerwise: what gradients and that take with layer-wise updates: those of the largest tensor alone. activations: a token,
    (without, with) gradient checkpointing; None where there is no formula for the model.
    """

    rank: int | None
    error: str = ""
    trainable: int = 0
    untouched: int = 0
    weights: dict[str, int] = field(default_factory=dict)
    adapter: int = 0
    gradients: int = 0
    optimizer: dict[str, tuple[int, int]] = field(default_factory=dict)
    step: int = 0
    layerwise: int = 0
    activations: tuple[int, int] | None = None


class SkipRandomDraws(TorchFunctionMode):
    """Leave out what is drawn from a generator: here no number is looked at, and of a large model draws take minutes."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
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
) -> dict[str, Any]:
    """Count a model of this config.json in a dtype, for every config of each Method.

    checkpoint: the folder of an encoder's, for what it lacks trains too; empty: a shape's, which lacks nothing.
    targets: what a config without its own adapts; empty: every linear layer but those of the output. Where one fits no layer
    that any Method adapts, only `misfits` comes back: the name, and what is wrong with it.
    Raises ValueError for a model that transformers does not know, and AssetError for a checkpoint that cannot be read.
    """
    model, lacks = structure.build(config, kind, DTYPES[dtype]), models.lacks(checkpoint)
    head = head_of(model, kind, lacks)
    if misfits := structure.of_model(model, targets):
        return {"misfits": misfits}
    names = targets or default_targets(model)
    total = sum(p.numel() for p in model.parameters())
    shape = saved_activations.llama_shape(model, DTYPES[dtype])
    found: dict[str, list[dict[str, Any]]] = {}
    for method, configs in methods.items():
        found[method] = []
        for one in configs:
            try:
                counted = count_method(model, method, one, names, head, DTYPES[dtype])
            except _ERRORS as error:  # of this config: the others of the model are counted all the same
                counted = MethodCount(one.get("rank"), error=_sentence(error))
                model = structure.build(
                    config, kind, DTYPES[dtype]
                )  # of the old one some layers may have been replaced
                head = head_of(model, kind, lacks)
            found[method].append(asdict(counted))
    return {
        "parameters": total,
        "targets": names,
        "positions": positions(model),
        "logits": activations.logit_bytes_per_token(shape) if shape else None,
        "methods": found,
    }


def default_targets(model: Any) -> list[str]:
    """Return the names of all linear layers but those of the output: as few last parts of each as fit no other layer."""
    inner = surgery.targets(model, ("all-linear",), surgery.LINEAR)
    outside = {end for path, _ in model.named_modules() if path not in inner for end in _ends(path)}
    return list(dict.fromkeys(next((end for end in _ends(path) if end not in outside), path) for path in inner))


def _ends(path: str) -> list[str]:
    """List the ends of a dotted path, the shortest first and the whole of it last."""
    parts = path.split(".")
    return [".".join(parts[-n:]) for n in range(1, len(parts) + 1)]


@contextmanager
def attached(model: Any, method: str, config: Any) -> Iterator[Any]:
    """Attach the reference of a Method to a model on the meta device, and detach it at the end. Nothing is drawn.

    Raises ValueError for a config that does not fit the model.
    """
    adapted = _attach(model, method, config)
    try:
        yield adapted
    finally:
        adapted.detach()
        model.requires_grad_(False)


def _attach(model: Any, method: str, config: Any) -> Any:
    with SkipRandomDraws():
        return attach_reference(method, model, config, None, torch.Generator())


def count_method(
    model: Any,
    method: str,
    config: Mapping[str, Any],
    names: list[str],
    head: Mapping[str, nn.Parameter],
    dtype: torch.dtype,
) -> MethodCount:
    """Attach the reference of a Method, count, and detach it. `names` are the targets where the config has none."""
    rank = config.get("rank")
    if method in UNREFERENCED:
        return MethodCount(rank, error=f"there is no reference of `{method}` to count")
    own, shape = {id(p) for p in model.parameters()}, saved_activations.llama_shape(model, dtype)
    knobs = configure(method, {})
    chosen = configure(method, ({"targets": names} if hasattr(knobs, "targets") else {}) | dict(config))
    try:
        chosen = without_head_targets(chosen, adaptable_layers(model, chosen), head)
        adapted = _attach(model, method, chosen)
    except UsageError as error:
        return MethodCount(rank, error=error.what)
    except ValueError as error:
        return MethodCount(rank, error=str(error))
    layers = {path: layer for path, layer in adapted.layers.items() if not in_head(path, head)}
    added = [t for t in adapted.tensors().values() if id(t) not in own]
    for parameter in head.values():
        parameter.requires_grad_(True)
    trains = list({id(p): p for p in (*adapted.parameters(), *head.values())}.values())
    of_layers, calls = saved_activations.saved_by_layers(layers, dtype)
    every = bytes_of(model_tensors(model)) - bytes_of(added)
    own_optimizer, largest = adapted.optimizer(1e-3, 0.0) is not None, sorted(trains, key=nn.Parameter.numel)[-1:]
    found = MethodCount(
        rank=rank,
        trainable=sum(p.numel() for p in trains),
        untouched=experts.untouched(model),
        weights=_weights(every, _frozen(layers), calls, dtype),
        adapter=bytes_of(added),
        gradients=bytes_of(trains),
        optimizer=state_sizes.optimizer_bytes(adapted, trains, dtype),
        step=state_sizes.bytes_in_step(trains, dtype, own=own_optimizer),
        layerwise=bytes_of(largest) + state_sizes.bytes_in_step(largest, dtype, own=own_optimizer),
    )
    if shape is not None:
        inside = saved_activations.sum_over_llama(model, of_layers, layers.keys())
        found.activations = (
            activations.bytes_per_token(shape, inside),
            activations.bytes_per_token(shape, inside, checkpointing=True),
        )
    adapted.detach()
    model.requires_grad_(False)
    return found


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of the distinct storages under `tensors`, on the meta device too."""
    storages = [t.untyped_storage() for t in tensors]
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


def _weights(every: int, frozen: list[Tensor], calls: bool, dtype: torch.dtype) -> dict[str, int]:
    """Map each base that the Method can stand on to the bytes of all that is no adapter. frozen: weights under adapters.

    calls: whether the adapted layers call those under them; else the Method keeps the weights in a form of its own.
    """
    if not calls:
        return {OWN: every - bytes_of(frozen)}
    sizes = Counter(weight.numel() for weight in frozen)
    packed = {base: sum(number * (n * dtype.itemsize - state_sizes.packed_bytes(n, base)) for n, number in sizes.items())
              for base in BASES if base != "none" and sizes}  # fmt: skip
    return {"none": every} | {base: every - saved for base, saved in packed.items()}


def _frozen(layers: Mapping[str, Any]) -> list[Tensor]:
    """List the weights of linear layers that a packed base would keep in 4 bits: those that do not train."""
    under = [getattr(layer, "base", layer) for layer in layers.values()]
    return [layer.weight for layer in under if kind_of(layer) in surgery.LINEAR and not layer.weight.requires_grad]


def answer(asked: Mapping[str, Any]) -> dict[str, Any]:
    """Return what `count` gives for these arguments, or {"error": why} for a model that cannot be built or counted."""
    try:
        return count(**asked)
    except AssetError as error:
        return {"error": error.what}
    except _ERRORS as error:
        return {"error": _sentence(error)}


def _sentence(error: BaseException) -> str:
    return f"its shape cannot be counted: {type(error).__name__}: {error}"
