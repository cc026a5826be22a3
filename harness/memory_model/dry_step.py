"""The peak of a training step, by a dry step: one of the Cell's own loop on tensors without data, whose bytes are counted.

It begins where `harness.cell.training.counted_step` does: the optimizer has its states, and there is no gradient. Nothing is
loaded: a shape of any size will do. Run it in a process of its own (`harness.memory_model.isolated_step`): programs keep tensors in
caches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from harness.assets import shapes, structure
from harness.cell.training import bypassed_layers, loop, optimizers
from harness.cell.training import model as models
from harness.cell.training.batches import Batch, Example, collate
from harness.cell.training.head import head_of, in_head, without_head_targets
from harness.cell.training.offloaded_weights import release, unused
from harness.conformance.comparison import whole_model
from harness.conformance.subject import DTYPES, adaptable_layers, configure
from harness.errors import UsageError
from harness.kernels.nf4_format import BLOCK2
from harness.kernels.torch import adamw8bit_step
from harness.kernels.torch.nf4_linear import Nf4Linear
from harness.kernels.torch.support import packed_weight
from harness.kernels.torch.support.compiled import LARGE
from harness.kernels.torch.support.packed_weight import PackedWeight
from harness.memory_model import state_sizes
from harness.memory_model.counting import SkipRandomDraws
from harness.memory_model.memory_tracker import MemoryTracker
from harness.methods.registry import Registry, discover
from harness.methods.spec import Adapted
from harness.records.record import Cell
from reference.shared.layers import replace as put

_FEW = (2, 3)
"""Blocks of the two models that stand for a deeper one: in fewer, one block is the first and the last."""


@dataclass(frozen=True)
class DryStep:
    """A Cell, its model's config.json (`request` of `harness.memory_model.plan_prediction` tells of which classes) and kind.

    lacks: names of an encoder's weights that its checkpoint lacks.
    """

    cell: Cell
    config: Mapping[str, Any]
    kind: str
    lacks: frozenset[str] = frozenset()


class _Fresh(PackedWeight):
    """A weight in 4 bits that is decoded into fresh memory each time, as libraries do it."""

    def lent(self, dtype: torch.dtype) -> Tensor:
        return self.decoded(dtype)


class _Packed(Nf4Linear):
    """A layer with a base in 4 bits as it is once packed: packing a large one takes thousands of operations."""

    def __init__(self, dense: nn.Linear, compute_dtype: torch.dtype, double: bool) -> None:
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
        return _Fresh(**vars(super().packed_weight))


@cache
def registry() -> Registry:
    """Return the implementations there are: read once, since that takes as long as many operations of a step."""
    return discover()


def longest_batches(cell: Cell, kind: str, answer: int) -> list[Batch]:
    """Return the parts of a batch of texts as long as the Cell lets them be. answer: tokens that carry loss, if causal."""
    training = cell.training
    rows, side = -(-training.batch // training.accumulate), "left" if kind == "causal" else "right"
    example = Example(
        "", (0,) * training.max_tokens, 0, min(answer, training.max_tokens - 1) if kind == "causal" else 0
    )
    return [collate([example] * rows, 0, side)] * training.accumulate


def peak(question: DryStep, parts: Sequence[Batch]) -> int:
    """Return the most bytes that tensors take at one time in a step over `parts`, these and other batches not counted.

    Of a model of many blocks that are all alike, two of few blocks are taken: each stage's peak is linear in their number.
    Raises what the libraries raise that cannot do without data.
    """
    blocks = _depth(question.config)
    # The first part finds no gradients, all others do: of these the largest tells the peak.
    parts = [*parts[:1], *sorted(parts[1:], key=lambda part: part.padded_tokens)[-1:]]
    if blocks is not None and blocks > max(_FEW):
        few, more = (_stages(_cut(question, count), parts, alike=True) for count in _FEW)
        if few is not None and more is not None:
            return max(few[s] + (blocks - _FEW[0]) * (more[s] - few[s]) for s in more)
    whole = _stages(question, parts)
    assert whole is not None  # noqa: S101
    return max(whole.values())


def _depth(config: Mapping[str, Any]) -> int | None:
    """Return how many blocks a model has; None where its config says more of them than their number."""
    number = next((config[key] for key in shapes.DEPTHS if key in config), None)
    listed = any(isinstance(value, list) and len(value) == number for value in config.values())
    return None if listed or not isinstance(number, int) else number


def _cut(question: DryStep, blocks: int) -> DryStep:
    key = next(key for key in shapes.DEPTHS if key in question.config)
    return replace(question, config={**question.config, key: blocks})


def _stages(question: DryStep, parts: Sequence[Batch], alike: bool = False) -> dict[str, int] | None:
    """Take a step; return the peak of each of its stages. alike: return None where the model's blocks are not all alike."""
    cell = question.cell
    model = structure.build(question.config, question.kind, DTYPES[cell.dtype])
    whole_model.one_by_one(model, DTYPES[cell.dtype])
    packed_weight.forget()  # what a worker decoded into is none of this step
    with MemoryTracker() as live, _few_chunks(), _decoded_at_once():
        _fill(model)
        head = head_of(model, question.kind, question.lacks)
        try:
            adapted, forms = _attached(question, model, head)
        except (ValueError, UsageError):
            if alike:  # a target that only a deeper model has
                return None
            raise
        if alike and not _alike(model, _depth(question.config)):
            return None
        for parameter in head.values():
            parameter.requires_grad_(True)
        optimizer = _stepped(adapted, list(head.values()), cell)
        layerwise = optimizers.layerwise(optimizer, cell.training)
        model.train()
        live.attaching = False
        with models.checkpointing(model, cell.training.checkpointing), _staged(live, model, optimizer):
            try:
                loop.step(adapted, parts, optimizer, seed=0)
            except AttributeError as error:
                if said := bypassed_layers.explain(error, adapted.layers):
                    raise UsageError(said) from error
                raise
    del forms, layerwise
    return dict(live.most)


def _fill(model: nn.Module) -> None:
    """Put tensors without data into the place of the model's, which are on the meta device; what is tied stays tied."""
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
    del old  # held until now, so that no two had one id


def _attached(question: DryStep, model: Any, head: Mapping[str, nn.Parameter]) -> tuple[Adapted, list[Any]]:
    """Put a base in 4 bits under it, and attach the Method; also return what a worker holds of the packing."""
    cell = question.cell
    config = configure(cell.method, cell.config)
    matched = adaptable_layers(model, config)
    packed = cell.base.quantization != "none"
    paths = [path for path in matched if not in_head(path, head)]
    config = without_head_targets(config, matched, head)
    del matched
    forms: list[Any] = []
    double = cell.base.quantization == "nf4-dq"
    for path in paths if packed else ():
        layer: Nf4Linear = _Packed(model.get_submodule(path), DTYPES[cell.dtype], double)
        if cell.base.implementation == "fused":  # then it is just such a layer, over which `fused` has ways of its own
            layer.__class__ = Nf4Linear
        put(model, path, layer)
        # What a worker holds to judge the codes by: constants that are in 8 bits are decoded in it.
        forms.append(
            torch.empty(-(-model.get_submodule(path).weight.numel() * 2 // state_sizes.BLOCK)) if double else None
        )
    bases = {path: model.get_submodule(path) for path in paths}
    with SkipRandomDraws(), _converting():
        implementation = registry().find("method", cell.method, cell.implementation)
        adapted = implementation(model, config, torch.Generator())
    release(unused(cell.method, adapted, bases))
    return adapted, forms


@contextmanager
def _converting() -> Iterator[None]:
    """Let `module.to(dtype)` write to parameters without data; torch would swap them, which weak references forbid."""

    def become(old: Tensor, new: Tensor) -> None:
        old.data = new.data

    swap = torch.utils.swap_tensors
    torch.utils.swap_tensors = become
    try:
        yield
    finally:
        torch.utils.swap_tensors = swap


def _stepped(adapted: Adapted, head: list[nn.Parameter], cell: Cell) -> torch.optim.Optimizer:
    """Return the Cell's optimizer after a step, so that it has its states; the gradients of that are gone."""
    optimizer, _ = optimizers.make(adapted, head, cell.training, cell.optimizer, cell.implementation)
    for parameter in loop.trainable(adapted, head):
        parameter.grad = torch.empty_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return optimizer


@contextmanager
def _few_chunks() -> Iterator[None]:
    """Let a step of 8-bit moments take three of its chunks, of thousands: they take as much memory as all.

    They are the first, the second, which begins while what the first made is there, as with any later one, and the last.
    """
    every = adamw8bit_step.firsts
    adamw8bit_step.firsts = lambda n, chunk: sorted({*(found := every(n, chunk))[:2], *found[-1:]})
    try:
        yield
    finally:
        adamw8bit_step.firsts = every


@contextmanager
def _decoded_at_once() -> Iterator[None]:
    """Let a large weight in 4 bits be decoded by one kernel, as compiled code does it: thousands of pieces take no more."""

    def decoded(self: PackedWeight, dtype: torch.dtype, out: Tensor | None) -> Tensor:
        if prod(self.shape) < LARGE:
            return by_pieces(self, dtype, out)
        self.constants()
        return torch.empty(self.shape, dtype=dtype) if out is None else out.view(self.shape)

    by_pieces = PackedWeight._decoded
    PackedWeight._decoded = decoded  # type: ignore[method-assign]  # of every layer's, also those that methods make
    try:
        yield
    finally:
        PackedWeight._decoded = by_pieces  # type: ignore[method-assign]


def _lists(model: nn.Module) -> list[nn.ModuleList]:
    """Return the model's outermost lists of modules."""
    lists = {path: module for path, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    return [m for path, m in lists.items() if not any(path.startswith(f"{other}.") for other in lists)]


def _alike(model: nn.Module, blocks: int | None) -> bool:
    """Say whether the model has one list of blocks, as many as that, with tensors of the same names, sizes and dtypes."""
    lists = _lists(model)
    if len(lists) != 1 or len(lists[0]) != blocks:
        return False
    tensors = [{**dict(block.named_parameters()), **dict(block.named_buffers())} for block in lists[0]]
    facts = [{n: (t.shape, t.dtype, t.requires_grad) for n, t in of_block.items()} for of_block in tensors]
    return all(fact == facts[0] for fact in facts)


@contextmanager
def _staged(live: MemoryTracker, model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Let the stages begin where they do: forward with the head's way back, that of the last blocks, of the first, the step.

    Inside each, what exists grows or shrinks by as much with every block, so that its peak is at one end whatever the depth.
    """

    def enters(stage: str) -> Callable[..., None]:
        return lambda *_: live.enter(stage)

    def watched(stage: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            if torch._C._current_graph_task_id() == -1 and isinstance(hidden, Tensor) and hidden.requires_grad:
                hidden.register_hook(enters(stage))

        return hook

    hooks = [model.register_forward_pre_hook(enters("forward")), optimizer.register_step_pre_hook(enters("step"))]
    for blocks in _lists(model)[:1]:
        hooks += [blocks[0].register_forward_hook(watched("first block"))] if len(blocks) > 1 else []
        hooks += [blocks[-1].register_forward_hook(watched("blocks"))]
    live.most.clear()
    live.enter("forward")
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
