"""Requests to the counting process and its answers, as JSON. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NotRequired, Required, TypedDict


class CountRequest(TypedDict):
    """A request to count the bytes of one model for several Methods."""

    config: Mapping[str, Any]
    """The model's config.json."""
    kind: str
    """`causal` or `encoder`."""
    dtype: str
    methods: dict[str, list[dict[str, Any]]]
    """Method -> configs to count."""
    targets: list[str]
    """Layers for configs without targets; empty for every linear layer except the output."""
    checkpoint: NotRequired[str]
    """Folder of an encoder's weights. Weights that it lacks train too. Empty for a shape, which lacks no weights."""


class MethodCount(TypedDict, total=False):
    """Bytes of one Method with one config. With an error, there are only `rank` and `error`."""

    rank: Required[int | None]
    error: Required[str]
    """Reason why the Method cannot be attached; else empty."""
    trainable: int
    """Trainable parameters."""
    untouched: int
    """Number of expert weights that do not train."""
    weights: dict[str, int]
    """Base -> bytes of everything except the adapter."""
    adapter: int
    gradients: int
    optimizer: dict[str, tuple[int, int]]
    """Optimizer -> bytes of its states (on the device, in host memory)."""
    step: int
    """Bytes that exist only while the optimizer steps."""
    layerwise: int
    """Bytes of gradients and of `step` with layer-wise updates, for which only the largest tensor counts."""
    activations: tuple[int, int] | None
    """Bytes per token (without, with) gradient checkpointing; None for a model without a formula."""


class ModelCount(TypedDict, total=False):
    """Counts of one model. It has only `error`, only `misfits`, or all other keys."""

    error: str
    """Reason why the model cannot be built or counted."""
    misfits: dict[str, str]
    """Requested target that matches no layer of any Method -> the reason."""
    parameters: int
    targets: list[str]
    """Layers that configs without targets adapt."""
    positions: int | None
    """Longest text that the model reads, in tokens; None without a limit."""
    logits: int | None
    """Bytes of logits per token; None for a model without a formula."""
    methods: dict[str, list[MethodCount]]


class StepRequest(TypedDict):
    """A request to take a Cell's training step on fake tensors."""

    cell: dict[str, Any]
    config: Mapping[str, Any]
    """The model's config.json."""
    kind: str
    """`causal` or `encoder`."""
    answer: int
    """Number of tokens with a loss in each text."""
    checkpoint: NotRequired[str]
    """See `CountRequest.checkpoint`."""
    largest: NotRequired[SearchOptions]
    """Options of a search for the largest step that fits; without this key, the request is for one step."""


class SearchOptions(TypedDict):
    """Arguments of `largest_batch.search`, and the field of a Cell's training that varies."""

    of: str
    """`batch` or `max_tokens`."""
    room: int
    first: int
    lasting: int
    most: int | None
    grain: NotRequired[float]


class StepAnswer(TypedDict, total=False):
    """The peak of a step, or the reason why there is no peak."""

    peak_B: int
    peak_by: str
    """Code that took the step, if it was not the Cell's own code."""
    no_peak: str
    """Reason why there is no peak."""
    tried: dict[int, int]
    """Batch or length of each step of a search -> its peak. JSON turns the keys into strings."""
