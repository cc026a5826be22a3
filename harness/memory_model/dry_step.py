"""Compute the peak memory of a training step by a dry step: run the Cell's loop on fake tensors, and count their bytes.

A dry step begins, like `harness.cell.training.counted_step`, with the optimizer's states and without gradients. No
weights are loaded, so the model may have any size. Run dry steps in a separate process
(`harness.memory_model.isolated_step`), because libraries cache tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from harness.assets import shapes, structure
from harness.cell.base_quantisation import unpackable_target
from harness.cell.training import bypassed_layers, loop, optimizers
from harness.cell.training import model as models
from harness.cell.training.batches import Batch, Example, collate
from harness.cell.training.head import adapted_layers, head_of
from harness.cell.training.offloaded_weights import release, unused
from harness.cell.training.random_model import outermost_lists
from harness.conformance.comparison.stacked_experts import one_by_one
from harness.conformance.subject import DTYPES
from harness.errors import UsageError
from harness.kernels.nf4_format import BLOCK2
from harness.kernels.torch import adamw8bit_step, lora_experts, nf4
from harness.kernels.torch.nf4_linear import Nf4Linear
from harness.kernels.torch.support import packed_weight
from harness.kernels.torch.support.packed_weight import PackedWeight
from harness.memory_model import state_sizes
from harness.memory_model.counting import SkipRandomDraws
from harness.memory_model.memory_tracker import MemoryTracker
from harness.methods.registry import Registry, discover
from harness.methods.spec import Adapted
from harness.records.record import Cell
from reference.shared.layers import replace as replace_layer

_FEW = (2, 3)
"""Numbers of blocks of two small models. The peak of a deeper model is extrapolated from their peaks. One block would
be too few, because it would be both the first and the last block."""


@dataclass(frozen=True)
class DryStep:
    """A training step of a Cell, to be run on fake tensors."""

    cell: Cell
    config: Mapping[str, Any]
    """Content of the model's config.json, as `harness.memory_model.plan_prediction.count_request` prepares it."""
    kind: str
    """Kind of the model, `causal` or `encoder`."""
    lacks: frozenset[str] = frozenset()
    """Names of the encoder's weights that are missing from its checkpoint."""


class _DecodedAnew(PackedWeight):
    """A 4-bit weight that is decoded into new memory at every use, as in Implementations other than `fused`."""

    def in_buffer(self, dtype: torch.dtype) -> Tensor:
        return self.decoded(dtype)


class _Nf4StandIn(Nf4Linear):
    """A stand-in for a packed 4-bit layer. It has the sizes of such a layer, but no values.

    Packing a large weight would take thousands of operations.
    """

    def __init__(self, dense: Any, compute_dtype: torch.dtype, double: bool) -> None:
        nn.Linear.__init__(self, dense.in_features, dense.out_features, bias=False, device="meta")
        blocks = -(-dense.weight.numel() // state_sizes.BLOCK)
        of_second = 4 * -(-blocks // BLOCK2)
        sizes = {"absmax": blocks, "absmax2": of_second, "offset": 4} if double else {"absmax": 4 * blocks}
        for name in ("absmax", "absmax2", "offset"):
            self.register_buffer(name, torch.empty(sizes[name], dtype=torch.uint8) if name in sizes else None)
        self.compute_dtype, self.block = compute_dtype, state_sizes.BLOCK
        codes = torch.empty(-(-dense.weight.numel() // 2), dtype=torch.uint8)
        self.weight = nn.Parameter(codes, requires_grad=False)
        if dense.bias is not None:
            self.bias = nn.Parameter(torch.empty_like(dense.bias), requires_grad=False)
        self.train(dense.training)

    @property
    def packed_weight(self) -> PackedWeight:
        return _DecodedAnew(**vars(super().packed_weight))


@cache
def registry() -> Registry:
    """Return the registry of installed Implementations. Discovering them is slow, so it is done only once."""
    return discover()


def longest_batches(cell: Cell, kind: str, loss_tokens: int) -> list[Batch]:
    """Return the largest batch of a Cell as a list of its micro-batches. Every text has `max_tokens` tokens.

    loss_tokens: number of tokens with a loss in each text of a causal model.
    """
    training = cell.training
    rows, side = -(-training.batch // training.accumulate), "left" if kind == "causal" else "right"
    example = Example(
        "", (0,) * training.max_tokens, 0, min(loss_tokens, training.max_tokens - 1) if kind == "causal" else 0
    )
    return [collate([example] * rows, 0, side)] * training.accumulate


def peak(step: DryStep, parts: Sequence[Batch]) -> int:
    """Return the peak memory of a step over the micro-batches `parts`, in bytes, without the batches themselves.

    The peak of each stage is linear in the number of blocks. So the peak of a model with many equal blocks is
    extrapolated from two models with few blocks. A library that does not support fake tensors raises its own error.
    """
    blocks = _depth(step.config)
    # The first part starts without gradients. All later parts start with gradients, so the largest has the highest peak.
    parts = [*parts[:1], *sorted(parts[1:], key=lambda part: part.padded_tokens)[-1:]]
    if blocks is not None and blocks > max(_FEW):
        shallow = (replace(step, config=shapes.first_blocks(step.config, count)) for count in _FEW)
        few, more = (_stages(one, parts, uniform=True) for one in shallow)
        if few is not None and more is not None:
            return max(few[s] + (blocks - _FEW[0]) * (more[s] - few[s]) for s in more)
    whole = _stages(step, parts)
    assert whole is not None  # noqa: S101
    return max(whole.values())


def _depth(config: Mapping[str, Any]) -> int | None:
    """Return the number of blocks, or None if the config lacks it or has a list with an entry per block."""
    number = next((config[key] for key in shapes.DEPTHS if key in config), None)
    listed = any(isinstance(value, list) and len(value) == number for value in config.values())
    return None if listed or not isinstance(number, int) else number


def _stages(step: DryStep, parts: Sequence[Batch], uniform: bool = False) -> dict[str, int] | None:
    """Run the step on fake tensors, and return the peak of each stage in bytes. `_staged` defines the stages.

    uniform: if true, return None for a model whose blocks are not equal, or that lacks a target.
    """
    cell = step.cell
    model = structure.build(step.config, step.kind, DTYPES[cell.dtype])
    one_by_one(model, DTYPES[cell.dtype])
    packed_weight.forget()  # drop the buffer of decoded weights, which is not part of this step
    with MemoryTracker() as tracker, _few_chunks(), _decoded_at_once(), _equal_experts():
        _fill(model)
        head = head_of(model, step.kind, step.lacks)
        try:
            adapted, forms = _attached(step, model, head)
        except (ValueError, UsageError):
            if uniform:  # a target may exist only in a deeper model
                return None
            raise
        if uniform and not _is_uniform(model, _depth(step.config)):
            return None
        for parameter in head.values():
            parameter.requires_grad_(True)
        optimizer = _stepped(adapted, list(head.values()), cell)
        layerwise = optimizers.layerwise(optimizer, cell.training)
        model.train()
        tracker.attaching = False
        with models.checkpointing(model, cell.training.checkpointing), _staged(tracker, model, optimizer):
            try:
                loop.step(adapted, parts, optimizer, seed=0)
            except AttributeError as error:
                if reason := bypassed_layers.explain(error, adapted.layers):
                    raise UsageError(reason) from error
                raise
    del forms, layerwise
    return dict(tracker.peaks)


def _fill(model: nn.Module) -> None:
    """Replace the model's tensors, which are on the meta device, by fake tensors. Tied tensors stay tied."""
    filled: dict[int, Tensor] = {}

    def of(old: Tensor) -> Tensor:
        if id(old) not in filled:
            new = torch.empty_strided(old.shape, old.stride(), dtype=old.dtype)
            filled[id(old)] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
        return filled[id(old)]

    old = [tensor for module in model.modules() for tensor in (*module.parameters(False), *module.buffers(False))]
    for module in model.modules():
        tensors: Any
        for tensors in (module._parameters, module._buffers):
            tensors.update({name: of(tensor) for name, tensor in tensors.items() if tensor is not None})
    del old  # the old tensors live until here, so that ids are unique


def _attached(step: DryStep, model: nn.Module, head: Mapping[str, nn.Parameter]) -> tuple[Adapted, list[Tensor | None]]:
    """Replace layers by 4-bit layers if the Cell has a 4-bit base, and attach the Method.

    Return the adapted model, and tensors that must exist during the step: for a base in nf4-dq, one per replaced layer.
    A Cell's worker keeps the layer's decoded quantisation constants, and the tensor has their size.
    """
    cell = step.cell
    config, paths = adapted_layers(model, cell.method, cell.config, head)
    forms: list[Tensor | None] = []
    double = cell.base.quantization == "nf4-dq"
    packed = {path: model.get_submodule(path) for path in paths if cell.base.quantization != "none"}
    if reason := unpackable_target(packed):
        raise UsageError(reason)
    for path, dense in packed.items():
        layer: Nf4Linear = _Nf4StandIn(dense, DTYPES[cell.dtype], double)
        if cell.base.implementation == "fused":  # use the layer of `fused`, because `fused` has faster code for it
            layer.__class__ = Nf4Linear
        replace_layer(model, path, layer)
        # A worker stores the decoded constants for the check of the codes.
        forms.append(torch.empty(-(-layer.weight.numel() * 2 // state_sizes.BLOCK)) if double else None)
    bases = {path: model.get_submodule(path) for path in paths}
    with SkipRandomDraws(), _converting():
        implementation = registry().find("method", cell.method, cell.implementation)
        adapted = implementation(model, config, torch.Generator())
    release(unused(cell.method, adapted, bases))
    return adapted, forms


@contextmanager
def _replaced(owner: Any, name: str, value: object) -> Iterator[None]:
    """Replace an attribute of a module or class inside the context."""
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


def _converting() -> AbstractContextManager[None]:
    """Return a context in which `module.to(dtype)` assigns the converted data to the old parameters.

    Otherwise torch would swap the parameters, and a swap fails for tensors with weak references.
    """

    def become(old: Tensor, new: Tensor) -> None:
        old.data = new.data

    return _replaced(torch.utils, "swap_tensors", become)


def _stepped(adapted: Adapted, head: list[nn.Parameter], cell: Cell) -> torch.optim.Optimizer:
    """Take one step so that the Cell's optimizer has its states. Drop the gradients, and return the optimizer."""
    optimizer, _ = optimizers.make(adapted, head, cell.training, cell.optimizer, cell.implementation)
    for parameter in loop.trainable(adapted, head):
        parameter.grad = torch.empty_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return optimizer


def _few_chunks() -> AbstractContextManager[None]:
    """Return a context in which an optimizer with 8-bit moments updates only three chunks of a large tensor.

    A large tensor has thousands of chunks, and the three are the first, the second and the last. The peak stays the
    same: the second chunk begins while the results of the first exist, as the omitted chunks would.
    """
    every = adamw8bit_step.firsts
    return _replaced(adamw8bit_step, "firsts", lambda n, chunk: sorted({*(found := every(n, chunk))[:2], *found[-1:]}))


@contextmanager
def _decoded_at_once() -> Iterator[None]:
    """Inside the context, one operation decodes a 4-bit weight, without temporary tensors, as a kernel does."""

    def decoded(self: PackedWeight, dtype: torch.dtype, out: Tensor | None) -> Tensor:
        return torch.empty(self.shape, dtype=dtype) if out is None else out.view(self.shape)

    def expert(
        _: Tensor, __: Tensor, ___: int, shape: tuple[int, ...], dtype: torch.dtype, out: Tensor | None
    ) -> Tensor:
        return torch.empty(shape, dtype=dtype) if out is None else out.view(shape)

    # For the whole class, because Methods create further objects.
    with _replaced(PackedWeight, "_decoded", decoded), _replaced(nf4, "dequantize", expert):
        yield


def _equal_experts() -> AbstractContextManager[None]:
    """Return a context in which every expert of `fused` gets equally many rows, because fake tensors choose no experts."""
    every = lora_experts.grouped_lora_linear

    def grouped(x: Tensor, W: Any, A: Tensor, B: Tensor, scaling: float, _: Tensor) -> Tensor:
        rows, rest = divmod(len(x), len(W))
        return every(x, W, A, B, scaling, torch.tensor([rows + (k < rest) for k in range(len(W))]))

    return _replaced(lora_experts, "grouped_lora_linear", grouped)


def _is_uniform(model: nn.Module, blocks: int | None) -> bool:
    """Return whether the model has exactly one list of blocks, and this list has `blocks` equal blocks.

    Equal blocks have tensors with the same names, shapes and dtypes.
    """
    lists = list(outermost_lists(model).values())
    if len(lists) != 1 or len(lists[0]) != blocks:
        return False
    tensors = [{**dict(block.named_parameters()), **dict(block.named_buffers())} for block in lists[0]]
    facts = [{n: (t.shape, t.dtype, t.requires_grad) for n, t in of_block.items()} for of_block in tensors]
    return all(fact == facts[0] for fact in facts)


@contextmanager
def _staged(tracker: MemoryTracker, model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Divide a step into stages. Within a stage, every block of the model changes the memory by the same amount.

    The peak of a stage is then at its start or end. There are four stages: the forward pass with the head's backward
    pass, the backward pass of all blocks but the first, the backward pass of the first block, and the optimizer's step.
    """

    def enters(stage: str) -> Callable[..., None]:
        return lambda *_: tracker.enter(stage)

    def watched(stage: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: object, output: object) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            if torch._C._current_graph_task_id() == -1 and isinstance(hidden, Tensor) and hidden.requires_grad:
                hidden.register_hook(enters(stage))

        return hook

    hooks = [model.register_forward_pre_hook(enters("forward")), optimizer.register_step_pre_hook(enters("step"))]
    for blocks in list(outermost_lists(model).values())[:1]:
        hooks += [blocks[0].register_forward_hook(watched("first block"))] if len(blocks) > 1 else []
        hooks += [blocks[-1].register_forward_hook(watched("blocks"))]
    tracker.peaks.clear()
    tracker.enter("forward")
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
