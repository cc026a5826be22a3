"""Check and time a batch in which each row has a different adapter."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from harness.cell.measure.latency import BLOCKS, Prompt, interleaved
from harness.conformance.case import Case
from harness.conformance.cell_gate import multi_adapter
from harness.conformance.cell_gate.multi_adapter import Adapters, Mixed
from harness.conformance.comparison.check_results import skipped
from harness.conformance.findings import summary
from harness.conformance.subject import Subject
from harness.errors import ImplementationError, Unsupported
from harness.methods.registry import Registry
from harness.records.record import Cell, CheckResult, Latency, Outcome
from reference.shared.layers import replace

ADAPTERS = 4
"""Number of rows of the batch. Each row has its own adapter."""
_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    MemoryError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""Errors that a plug-in's `multi_lora_linear` or `mixed` may raise for unexpected layers, or if memory runs out."""
OPERATION, METHOD = "multi_lora_linear", "lora"


def measure(
    subject: Subject, cell: Cell, causal: bool, vocabulary: int, registry: Registry
) -> tuple[list[Latency], list[CheckResult]]:
    """Check and time a batch in which each row has its own adapter. Return the latencies and the result of the check.

    For comparison, the same batch is also timed with one adapter for all rows. Blocks with several adapters and with
    one adapter alternate. If the implementation cannot mix adapters, or the check fails, the latencies have a reason
    instead of times.

    An implementation can mix adapters in one of two ways. Either it has the Operation `multi_lora_linear`, or its
    adapted model (`Adapted`) has a method `mixed`. `mixed` takes several adapters, each a dict with the names of
    `Adapted.tensors()`, and returns a context manager.
    """
    prompt = Prompt(subject.model, causal, vocabulary, cell.evaluation, ADAPTERS)
    try:
        mixed = _mixer(subject, cell, registry)
        multi_adapter.rows_must_reach(subject, ADAPTERS, lambda: _run(prompt))
        adapters = multi_adapter.draw_adapters(subject, ADAPTERS, cell.seed)
        with torch.random.fork_rng():
            result = multi_adapter.check_rows(subject, adapters, mixed, lambda: _run(prompt), cell.seed)
    except Unsupported as error:
        return _untimed(prompt, str(error)), []
    except _ERRORS as error:
        return _failed(prompt, subject, cell, error)
    if result.outcome is not Outcome.PASS:
        refused = f"no speed without parity: {result.check} {result.outcome.value}: {summary.describe(result)}"
        return _untimed(prompt, refused), [result]
    try:
        for variant in interleaved(("unmerged", "multi-adapter"), BLOCKS):
            with mixed(adapters) if variant == "multi-adapter" else nullcontext():
                prompt.block(variant)
    except _ERRORS as error:
        prompt.samples.clear()
        return _failed(prompt, subject, cell, error)
    return prompt.latencies("unmerged", adapters=1) + prompt.latencies("multi-adapter", adapters=ADAPTERS), [result]


def _failed(
    prompt: Prompt, subject: Subject, cell: Cell, error: BaseException
) -> tuple[list[Latency], list[CheckResult]]:
    """Return latencies without times, and a skipped check, both with `error` as the reason. The Cell does not fail."""
    because = f"could not be tried: {type(error).__name__}: {error}".partition("\n")[0]
    case = Case("trained", seed=cell.seed)
    return _untimed(prompt, because), [skipped(subject, case, multi_adapter.NAME, because)]


def _untimed(prompt: Prompt, because: str) -> list[Latency]:
    """Return latencies without times, for one adapter and for several adapters.

    because: the reason why there are no times. Each latency has the number of adapters in its field `adapters`.
    """
    return prompt.latencies("unmerged", because, 1) + prompt.latencies("multi-adapter", because, ADAPTERS)


def _run(prompt: Prompt) -> None:
    options = {"use_cache": False} if prompt.causal else {}
    prompt.model(input_ids=prompt.ids, **options)


def _mixer(subject: Subject, cell: Cell, registry: Registry) -> Mixed:
    """Return the function that mixes adapters. Raises Unsupported if the implementation has no such function."""
    if (own := getattr(subject.adapted, "mixed", None)) is not None:
        return own  # type: ignore[no-any-return]
    if cell.method != METHOD:
        raise Unsupported(
            f"several adapters in one batch are an operation of {METHOD} ({OPERATION}); {cell.method} has none"
        )
    try:
        call = registry.find("operation", OPERATION, cell.implementation)
    except ImplementationError as error:
        raise Unsupported(f"{cell.implementation} offers neither {OPERATION} nor `mixed`") from error
    if subject.config.lora_bias:
        raise Unsupported(f"{OPERATION} takes A and B alone, and lora_bias gives B a bias")
    for path, base in subject.bases.items():
        if type(base) is not nn.Linear:
            kind = type(base).__name__
            raise Unsupported(f"{OPERATION} by {cell.implementation} takes a dense linear layer; {path} is a {kind}")
    return _by_operation(subject, call)


def _by_operation(subject: Subject, call: Callable[..., Any]) -> Mixed:
    @contextmanager
    def mixed(adapters: Adapters) -> Iterator[None]:
        layers = dict(subject.adapted.layers)
        try:
            for path in layers:
                replace(subject.model, path, _MixedLinear(call, subject.bases[path], path, adapters, subject.config))
            yield
        finally:
            for path, layer in layers.items():
                replace(subject.model, path, layer)

    return mixed


class _MixedLinear(nn.Module):
    """A linear layer that calls the Operation `multi_lora_linear`, so that each row has its own adapter."""

    def __init__(self, call: Callable[..., Any], base: Any, path: str, adapters: Adapters, config: Any) -> None:
        super().__init__()
        self.call, self.base = call, base
        self.As, self.Bs = ([adapter[f"{path}.{letter}"] for adapter in adapters] for letter in ("A", "B"))
        self.scalings, self.ids = [config.scaling] * len(adapters), torch.arange(len(adapters))
        self.train(base.training)

    def forward(self, x: Tensor) -> Tensor:
        """Return W x plus the bias, plus the update of each row by the row's own adapter. x: (N, ..., D)."""
        y: Tensor = self.call(x=x, W=self.base.weight, As=self.As, Bs=self.Bs, scalings=self.scalings, ids=self.ids)
        return y if self.base.bias is None else y + self.base.bias
