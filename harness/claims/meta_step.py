"""Count the operations of a training step on the meta device, or the bytes that the step saves for the backward pass.

A Method's reference is attached to a model without weights. The step runs forward and backward as in
`harness.cell.training.loop`. Gradients are computed only where a trainable tensor needs them: not for frozen weights,
and not before the first trainable layer. A deep model is counted with two and with three blocks. The difference between
these two counts is then added once for each further block.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from harness.assets import shapes, structure
from harness.cell.measure.latency import positions
from harness.cell.training.model import checkpointing
from harness.claims import attached_model
from harness.conformance.subject import DTYPES

_FEW = 2
"""A model with more blocks is counted with this number of blocks and with one more. The first block may differ from the
others, because nothing may need the gradient of its input."""
_FLAT_MASK = ("deberta", "deberta-v2")
"""Model types whose attention mask has one number per token; other masks have one number per pair of tokens."""


@dataclass(frozen=True)
class MetaStep:
    """A training step, for counting its operations or the bytes that it saves for the backward pass."""

    model: str
    method: str
    config: str
    """The Method's config in JSON."""
    tokens: int
    """Tokens per text."""
    batch: int
    """Number of texts."""
    checkpointing: bool = False
    dtype: str = "float32"


@dataclass(eq=False)
class _Saved:
    """The storage of a tensor that autograd saves.

    The object does not keep the tensor itself, because even a detached tensor refers to the tensor from which it comes.
    """

    storage: Any


@dataclass(frozen=True)
class StepCounts:
    """Count for a whole step: operations or bytes. It is the sum of the first blocks and of all further blocks."""

    few: int
    """Count of the first blocks, at most two, and of everything outside of blocks."""
    each: int
    """Count of each further block."""
    further: int
    """Number of further blocks."""

    @property
    def whole(self) -> int:
        """Count of the whole step."""
        return self.few + self.further * self.each

    def in_words(self, unit: str = "") -> str:
        """Return the sum as text, e.g. `100 + 30 x 40`."""
        more = f" + {self.further} x {self.each:,}" if self.further else ""
        return f"{self.few:,}{more}{unit}"


def step(model: str, method: str, config: Mapping[str, Any], tokens: int, batch: int, **others: Any) -> MetaStep:
    """Return the `MetaStep` with these arguments; it stores `config` as JSON. others: further fields of `MetaStep`."""
    return MetaStep(model, method, json.dumps(config), tokens, batch, **others)


@lru_cache(maxsize=128)
def operations(request: MetaStep) -> StepCounts:
    """Count the operations (multiplications and additions) of all matrix products with torch's FlopCounterMode.

    Raises ValueError for a config that does not fit the model, and for texts with more tokens than the model has
    positions.
    """
    return _of_all_blocks(request, _operations)


@lru_cache(maxsize=128)
def saved_bytes(request: MetaStep) -> StepCounts:
    """Count the bytes of tensors that autograd saves for the backward pass, without the model's parameters.

    Raises ValueError as `operations` does.
    """
    return _of_all_blocks(request, _saved)


def _of_all_blocks(request: MetaStep, count: Callable[[MetaStep, int], int]) -> StepCounts:
    blocks = shapes.blocks(shapes.config_of(request.model))
    if blocks <= _FEW:
        return StepCounts(count(request, blocks), 0, 0)
    few, more = count(request, _FEW), count(request, _FEW + 1)
    return StepCounts(few, more - few, blocks - _FEW)


def _operations(request: MetaStep, blocks: int) -> int:
    with _attached(request, blocks) as (model, adapted), FlopCounterMode(display=False) as counter:
        _loss(model, adapted, request).backward()
    return int(counter.get_total_flops())


def _saved(request: MetaStep, blocks: int) -> int:
    saved: WeakSet[_Saved] = WeakSet()  # only the graph refers to them: tensors freed in the forward pass do not count

    def save(t: Tensor) -> _Saved:
        saved.add(one := _Saved(t.untyped_storage()))
        return one

    with _attached(request, blocks) as (model, adapted):
        with torch.autograd.graph.saved_tensors_hooks(save, _never):
            loss = _loss(model, adapted, request)
        sizes = {one.storage._cdata: one.storage.nbytes() for one in saved}
        own = {p.untyped_storage()._cdata for p in model.parameters()}
        del loss
    return sum(size for storage, size in sizes.items() if storage not in own)


def _never(_: _Saved) -> Tensor:
    raise NotImplementedError("saved tensors are only counted, without a backward pass")


@contextmanager
def _attached(request: MetaStep, blocks: int) -> Iterator[tuple[Any, Any]]:
    config, kind = attached_model.config_and_kind(request.model)
    model = structure.build(shapes.first_blocks(config, blocks) | {"use_cache": False}, kind, DTYPES[request.dtype])
    if (most := positions(model)) is not None and request.tokens > most:
        raise ValueError(f"{request.tokens} tokens exceed the {most} positions of {request.model}")
    model.set_attn_implementation("eager")  # explicit matrix products: a fused kernel would hide them
    model.requires_grad_(False)
    with (
        checkpointing(model, request.checkpointing),
        attached_model.attached(model, request.method, json.loads(request.config)) as adapted,
    ):
        yield model, adapted


def _loss(model: nn.Module, adapted: Any, request: MetaStep) -> Tensor:
    """Return the mean loss over tokens (for a classifier: over texts), plus the Method's own loss term."""
    ids = torch.zeros(request.batch, request.tokens, dtype=torch.long, device="meta")
    config: Any = model.config
    flat = config.model_type in _FLAT_MASK
    # Without a mask, transformers searches the ids for padding. It does not read the numbers of a mask of pairs.
    shape = (request.batch, request.tokens) if flat else (request.batch, 1, request.tokens, request.tokens)
    mask = torch.ones(shape, device="meta", dtype=DTYPES[request.dtype])
    logits = model(input_ids=ids, attention_mask=mask).logits.flatten(0, -2)
    labels = torch.zeros(logits.shape[0], dtype=torch.long, device="meta")
    loss: Tensor = nn.functional.cross_entropy(logits.float(), labels)
    term = adapted.regularizer()
    return loss if term is None else loss + term
