"""Types of the JSON messages to and from the counting process. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NotRequired, Required, TypedDict

from harness.assets.misfit import Misfit


class CountRequest(TypedDict):
    """A request to count the bytes of one model for several Methods."""

    config: Mapping[str, Any]
    """Content of the model's config.json."""
    kind: str
    """Kind of the model, `causal` or `encoder`."""
    dtype: str
    methods: dict[str, list[dict[str, Any]]]
    """Method -> the configs to count."""
    targets: list[str]
    """Layers to adapt for configs without targets. An empty list means every linear layer except the output layer."""
    checkpoint: NotRequired[str]
    """Folder with an encoder's checkpoint. Weights that are missing from the checkpoint train, too. Empty if there is
    no checkpoint; then no weight counts as missing."""


class MethodCount(TypedDict, total=False):
    """Counts for one Method with one config. If the config failed, there are only `rank`, `error` and `refused`."""

    rank: Required[int | None]
    error: Required[str]
    """Reason why there are no counts. Empty if there are."""
    refused: bool
    """True if the reason is an error of the reference, which refuses the config for this model."""
    trainable: int
    """Number of trainable parameters."""
    untouched: int
    """Number of weights in experts that are frozen and have no adapter."""
    unpackable: str
    """Reason why a 4-bit base excludes the targets. Empty if it packs them."""
    weights: dict[str, int]
    """Base (`none`, `nf4`, ...) -> bytes of all tensors except the adapter."""
    adapter: int
    gradients: int
    optimizer: dict[str, tuple[int, int]]
    """Optimizer -> bytes of its states, as a pair: on the device, in host memory."""
    step: int
    """Bytes that exist only while the optimizer steps."""
    layerwise: int
    """Bytes of `gradients` plus `step` if updates are layer-wise. Only the largest trainable tensor is included then.
    """
    activations: tuple[int, int] | None
    """Bytes of saved activations per token, as a pair: without and with gradient checkpointing. None for a model
    without a formula."""


class ModelCount(TypedDict, total=False):
    """Counts of one model. It has only `error`, only `misfits`, or all other keys."""

    error: str
    """Reason why the model cannot be built or counted."""
    misfits: dict[str, Misfit]
    """Requested targets that match no layer that can be adapted."""
    parameters: int
    targets: list[str]
    """Layers to adapt for configs without targets."""
    positions: int | None
    """Number of tokens of the longest text that the model reads. None if there is no limit."""
    logits: int | None
    """Bytes per token of the logits and of what the loss computes from them. None for a model without a formula."""
    methods: dict[str, list[MethodCount]]


class StepRequest(TypedDict):
    """A request to take a Cell's training step on fake tensors."""

    cell: dict[str, Any]
    config: Mapping[str, Any]
    """Content of the model's config.json."""
    kind: str
    """Kind of the model, `causal` or `encoder`."""
    loss_tokens: int
    """Number of tokens with a loss in each text."""
    checkpoint: NotRequired[str]
    """Folder with an encoder's checkpoint. Weights that are missing from the checkpoint train, too. Empty if there is
    none."""
    largest: NotRequired[SearchOptions]
    """Options of a search for the largest step that fits. Without this key, the request is for one step."""


class SearchOptions(TypedDict):
    """Arguments of `largest_batch.search`, and the name of the training option that the search varies."""

    of: str
    """Training option that the search varies: `batch` or `max_tokens`."""
    room: int
    first: int
    lasting: int
    most: int | None
    grain: NotRequired[float]


class StepAnswer(TypedDict, total=False):
    """The peak of a step, or the reason why there is no peak."""

    peak_B: int
    peak_by: str
    """Description of the code that took the step. Empty if it was the Cell's own code."""
    no_peak: str
    """Reason why there is no peak."""
    transient: bool
    """True if another attempt may have another answer: a step took too long, its process died, or a file could not be
    read. If not, the key is absent."""
    tried: dict[int, int]
    """Batch or text length of each step of a search -> its peak in bytes. JSON turns the keys into strings."""
