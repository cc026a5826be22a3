"""Count the bytes of a training step. The model is on the meta device, without weights.

The module attaches the reference of each Method to count its trainable tensors, and calls each adapted layer to count
the tensors that the layer saves. Nothing is computed. `counting_worker` runs this module in a separate process.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from harness.assets import structure
from harness.cell.base_quantisation import unpackable_target
from harness.cell.measure.latency import positions
from harness.cell.measure.memory import model_tensors, storage_bytes
from harness.cell.training import model as models
from harness.cell.training.head import adapted_layers, head_of, in_head
from harness.cell.training.offloaded_weights import unused
from harness.conformance.subject import DTYPES, attach_reference, configure
from harness.errors import AssetError, UsageError
from harness.memory_model import activations, equal_blocks, saved_activations, state_sizes
from harness.memory_model.activations import LlamaShape, SavedActivations
from harness.memory_model.ledger import BASES, OWN
from harness.memory_model.messages import CountRequest, MethodCount, ModelCount
from harness.methods import experts
from harness.methods.peft_config import UNREFERENCED
from harness.methods.spec import Adapted
from reference.shared import layers as surgery

_Counted = tuple[MethodCount, tuple[Any, ...] | None]
"""Count of one config, and the fields of its `SavedActivations`. None replaces the fields if there is no closed form."""


_FACTORIES = (torch.empty, torch.randn, torch.zeros)
"""torch functions that Methods call to create an adapter's tensors. `SkipRandomDraws` passes its `device` to them.

Tables of values, such as NF4's levels, come from other functions.
"""


class SkipRandomDraws(TorchFunctionMode):
    """A mode that skips the drawing of random numbers. Only sizes matter here, and drawing for a large model takes minutes.

    device: device of new tensors that the code makes without naming a device. None means torch's default.
    """

    def __init__(self, device: str | None = None) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in _FACTORIES and self.device:
            kwargs.setdefault("device", self.device)
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

    If a target matches no layer that can be adapted, the result has only `misfits`. Raises ValueError for a model that
    transformers does not know, and AssetError for an unreadable checkpoint.
    """
    lacks = models.lacks(checkpoint)

    def build() -> tuple[Any, dict[str, nn.Parameter]]:
        model = structure.build(config, kind, DTYPES[dtype])
        return model, head_of(model, kind, lacks)

    model, head = build()
    if misfits := structure.model_misfits(model, targets):
        return {"misfits": misfits}
    names = targets or default_targets(model)
    shape = saved_activations.llama_shape(model, DTYPES[dtype])
    path = equal_blocks.find_blocks(model, head)
    chosen = {name for configs in methods.values() for one in configs for name in one.get("targets", names)}
    counts = None
    if path and not any(map(equal_blocks.names_one_block, chosen)):

        def build_small(number: int) -> tuple[Any, dict[str, nn.Parameter]]:
            small, head = build()
            equal_blocks.keep_blocks(small, path, number)
            return small, head

        one, two = (_count_methods(partial(build_small, n), methods, names, dtype) for n in equal_blocks.SMALL)
        counts = equal_blocks.extrapolate(one, two, len(model.get_submodule(path)))
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "targets": names,
        "positions": positions(model),
        "logits": activations.logit_bytes_per_token(shape) if shape else None,
        "methods": {
            method: [_with_activations(counted, saved, shape) for counted, saved in of_method]
            for method, of_method in (counts or _count_methods(build, methods, names, dtype)).items()
        },
    }


def _count_methods(
    build: Callable[[], tuple[Any, dict[str, nn.Parameter]]],
    methods: Mapping[str, list[dict[str, Any]]],
    names: list[str],
    dtype: str,
) -> dict[str, list[_Counted]]:
    """Count every config of each Method.

    build: function that returns a new model on the meta device, and the parameters of its head.
    """
    model, head = build()
    found: dict[str, list[_Counted]] = {}
    for method, configs in methods.items():
        found[method] = []
        for one in configs:
            try:
                counted = count_method(model, method, one, names, head, DTYPES[dtype])
            except structure.BUILD_ERRORS as error:  # only this config fails; the others are still counted
                counted = {"rank": one.get("rank"), "error": _sentence(error)}, None
                model, head = build()  # the old model may be partly adapted
            found[method].append(counted)
    return found


def _with_activations(counted: MethodCount, saved: tuple[Any, ...] | None, shape: LlamaShape | None) -> MethodCount:
    """Return a count with its activations. saved: fields of `SavedActivations`; shape: sizes of the whole model."""
    if saved is None or shape is None:
        return counted
    fields = SavedActivations(*saved)
    plain, checkpointed = (activations.bytes_per_token(shape, fields, how) for how in (False, True))
    return {**counted, "activations": (plain, checkpointed)}


def default_targets(model: nn.Module) -> list[str]:
    """Return the shortest names that match every linear layer except the output layer, and no other module.

    Each name is a suffix of a layer's dotted path, such as `q_proj` or `self_attn.q_proj`.
    """
    inner = surgery.targets(model, ("all-linear",), surgery.LINEAR)
    outside = {end for path, _ in model.named_modules() if path not in inner for end in _ends(path)}
    return list(dict.fromkeys(next((end for end in _ends(path) if end not in outside), path) for path in inner))


def _ends(path: str) -> list[str]:
    """List the suffixes of a dotted path, the shortest first: `a.b.c` -> `c`, `b.c`, `a.b.c`."""
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
    with SkipRandomDraws("meta"):
        return attach_reference(method, model, config, None, torch.Generator())


def count_method(
    model: nn.Module,
    method: str,
    config: Mapping[str, Any],
    names: list[str],
    head: Mapping[str, nn.Parameter],
    dtype: torch.dtype,
) -> _Counted:
    """Attach the reference of a Method, count its bytes, detach it, and return the counts.

    The second result has the fields of `SavedActivations`. It is None if the model has no Llama blocks, or if an
    adapted layer is not linear. names: targets to use if the config has no targets. head: parameters of the model's
    head.
    """
    rank = config.get("rank")
    if method in UNREFERENCED:
        return {"rank": rank, "error": f"there is no reference of `{method}` to count"}, None
    own, is_llama = {id(p) for p in model.parameters()}, saved_activations.llama_shape(model, dtype) is not None
    targets = {"targets": names} if hasattr(configure(method, {}), "targets") else {}
    try:
        chosen, _ = adapted_layers(model, method, targets | dict(config), head)
        adapted = _attach(model, method, chosen)
    except (UsageError, ValueError) as error:
        why = error.what if isinstance(error, UsageError) else str(error)
        return {"rank": rank, "error": why, "refused": True}, None
    layers = {path: layer for path, layer in adapted.layers.items() if not in_head(path, head)}
    added = [t for t in adapted.tensors().values() if id(t) not in own]
    for parameter in head.values():
        parameter.requires_grad_(True)
    trains = list({id(p): p for p in (*adapted.parameters(), *head.values())}.values())
    of_layers = saved_activations.saved_by_layers(layers, dtype)
    bases = {path: getattr(layer, "base", layer) for path, layer in layers.items()}
    dropped, unpackable = list(unused(method, adapted, bases).values()), unpackable_target(bases)
    every = storage_bytes(model_tensors(model)) - storage_bytes(added)
    own_optimizer, largest = adapted.optimizer(1e-3, 0.0) is not None, sorted(trains, key=nn.Parameter.numel)[-1:]
    found = MethodCount(
        rank=rank,
        error="",
        trainable=sum(p.numel() for p in trains),
        untouched=experts.untouched(model),
        unpackable=unpackable,
        weights={OWN: every - storage_bytes(dropped)}
        if dropped
        else _weights(every, [] if unpackable else _frozen(bases), dtype),
        adapter=storage_bytes(added),
        gradients=storage_bytes(trains),
        optimizer=state_sizes.optimizer_bytes(adapted, trains, dtype),
        step=state_sizes.bytes_in_step(trains, dtype, own=own_optimizer),
        layerwise=storage_bytes(largest) + state_sizes.bytes_in_step(largest, dtype, own=own_optimizer),
        activations=None,
    )
    # The closed form knows no adapter of an embedding.
    has_form = is_llama and of_layers.keys() == layers.keys()
    saved = astuple(saved_activations.sum_over_llama(model, of_layers, layers.keys())) if has_form else None
    adapted.detach()
    model.requires_grad_(False)
    return found, saved


def _weights(every: int, frozen: list[Tensor], dtype: torch.dtype) -> dict[str, int]:
    """Map each base that the Method supports, e.g. `nf4`, to the number of bytes of everything except the adapter.

    every: bytes of everything except the adapter, with unpacked weights. frozen: weights of the adapted layers that a
    4-bit base would pack.
    """
    sizes = Counter(weight.numel() for weight in frozen)
    packed = {base: sum(number * (n * dtype.itemsize - state_sizes.packed_bytes(n, base)) for n, number in sizes.items())
              for base in BASES if base != "none" and sizes}  # fmt: skip
    return {"none": every} | {base: every - saved for base, saved in packed.items()}


def _frozen(bases: Mapping[str, Any]) -> list[Tensor]:
    """List the weights that a 4-bit base would pack: the frozen weights of linear layers."""
    return [base.weight for base in bases.values() if not base.weight.requires_grad]


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
