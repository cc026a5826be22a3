"""One training step of a shape on the meta device, a Method's reference attached: what it computes and what it keeps.

It is run as `harness.cell.training.loop` runs one, forward and backward: a gradient is computed where something that trains wants
it, so not for frozen weights, and not before the first layer that trains. Of a deep model two and three blocks are run;
what a block more takes is the same for each further one.
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
from harness.conformance.subject import DTYPES, configure
from harness.memory_model import counting, model_shapes

_FEW = 2
"""From so many blocks on each further one takes the same: the first may lack the gradient of its input."""
_FLAT_MASK = ("deberta", "deberta-v2")
"""Model types whose mask has a number a token; others take one for every pair of tokens as it is."""


@dataclass(frozen=True)
class MetaStep:
    """What is run: a shape, a Method and its config (JSON), and texts. tokens: of each text."""

    model: str
    method: str
    config: str
    tokens: int
    batch: int
    checkpointing: bool = False
    dtype: str = "float32"


@dataclass(eq=False)
class _Held:
    """What a tensor that autograd keeps lies in; not the tensor, for a detached one knows what it was detached from."""

    storage: Any


@dataclass(frozen=True)
class StepCounts:
    """A number of few blocks, and what each further block adds to it; blocks: how many there are in all."""

    few: int
    each: int
    further: int

    @property
    def whole(self) -> int:
        """Of all blocks."""
        return self.few + self.further * self.each

    def in_words(self, unit: str = "") -> str:
        """Write the sum down."""
        more = f" + {self.further} x {self.each:,}" if self.further else ""
        return f"{self.few:,}{more}{unit}"


def step(model: str, method: str, config: Mapping[str, Any], tokens: int, batch: int, **others: Any) -> MetaStep:
    """Return a step as its arguments say; `others` as of `Step`."""
    return MetaStep(model, method, json.dumps(config), tokens, batch, **others)


@lru_cache(maxsize=128)
def operations(asked: MetaStep) -> StepCounts:
    """Count the operations of all products of matrices, a multiplication and an addition each; see torch's FlopCounterMode.

    Raises ValueError for a config that does not fit the model, or texts longer than it takes.
    """
    return _of_all_blocks(asked, _operations)


@lru_cache(maxsize=128)
def kept_bytes(asked: MetaStep) -> StepCounts:
    """Count the bytes of tensors that autograd keeps from the forward for the backward pass, beside the model's parameters.

    Raises ValueError as `operations`.
    """
    return _of_all_blocks(asked, _kept)


def _of_all_blocks(asked: MetaStep, count: Callable[[MetaStep, int], int]) -> StepCounts:
    blocks = shapes.blocks(shapes.config_of(asked.model))
    if blocks <= _FEW:
        return StepCounts(count(asked, blocks), 0, 0)
    few, more = count(asked, _FEW), count(asked, _FEW + 1)
    return StepCounts(few, more - few, blocks - _FEW)


def _operations(asked: MetaStep, blocks: int) -> int:
    with _attached(asked, blocks) as (model, adapted), FlopCounterMode(display=False) as counter:
        _loss(model, adapted, asked).backward()
    return int(counter.get_total_flops())


def _kept(asked: MetaStep, blocks: int) -> int:
    held: WeakSet[_Held] = WeakSet()  # the graph alone keeps them: what it lets go in the forward pass is not kept

    def hold(t: Tensor) -> _Held:
        held.add(one := _Held(t.untyped_storage()))
        return one

    with _attached(asked, blocks) as (model, adapted):
        with torch.autograd.graph.saved_tensors_hooks(hold, _never):
            loss = _loss(model, adapted, asked)
        sizes = {one.storage._cdata: one.storage.nbytes() for one in held}
        own = {p.untyped_storage()._cdata for p in model.parameters()}
        del loss
    return sum(size for storage, size in sizes.items() if storage not in own)


def _never(_: _Held) -> Tensor:
    raise NotImplementedError("what is kept is counted, and no backward pass asks for it")


@contextmanager
def _attached(asked: MetaStep, blocks: int) -> Iterator[tuple[Any, Any]]:
    config, preset = shapes.config_of(asked.model), shapes.preset(asked.model)
    kind = preset.kind if preset else model_shapes.model_kind(config)
    facts = shapes.first_blocks(config, blocks) | {"use_cache": False}
    model = structure.build(facts, kind, DTYPES[asked.dtype])
    if (most := positions(model)) is not None and asked.tokens > most:
        raise ValueError(f"{asked.tokens} tokens are more than the {most} positions of {asked.model}")
    model.set_attn_implementation("eager")  # products of matrices, written out: what a kernel fuses would not be seen
    model.requires_grad_(False)
    with (
        checkpointing(model, asked.checkpointing),
        counting.attached(model, asked.method, configure(asked.method, json.loads(asked.config))) as adapted,
    ):
        yield model, adapted


def _loss(model: nn.Module, adapted: Any, asked: MetaStep) -> Tensor:
    """Return the loss of every token (of a classifier: of every text) with the Method's own term."""
    ids = torch.zeros(asked.batch, asked.tokens, dtype=torch.long, device="meta")
    config: Any = model.config
    flat = config.model_type in _FLAT_MASK
    # Given, or transformers would look whether there are pads among the ids; of a mask of pairs it looks at no number.
    shape = (asked.batch, asked.tokens) if flat else (asked.batch, 1, asked.tokens, asked.tokens)
    mask = torch.ones(shape, device="meta", dtype=DTYPES[asked.dtype])
    logits = model(input_ids=ids, attention_mask=mask).logits.flatten(0, -2)
    labels = torch.zeros(logits.shape[0], dtype=torch.long, device="meta")
    loss: Tensor = nn.functional.cross_entropy(logits.float(), labels)
    term = adapted.regularizer()
    return loss if term is None else loss + term
