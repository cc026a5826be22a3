"""Check of several adapters in one batch: each row must equal the result of its own adapter. A row is one text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial

import torch
from torch import Tensor, nn

from harness.conformance import parity_suite
from harness.conformance.case import Case
from harness.conformance.comparison.check_results import judged, prefix_tensor
from harness.conformance.comparison.layer_comparison import reference_runs
from harness.conformance.comparison.tolerance_policies import noise_floor, worst_of
from harness.conformance.normal_noise import normal_noise
from harness.conformance.subject import Subject
from harness.errors import Unsupported
from harness.records.record import CheckResult

Adapters = Sequence[Mapping[str, Tensor]]
"""One dict per adapter: name, as in `Adapted.tensors()` -> tensor."""
Mixed = Callable[[Adapters], AbstractContextManager[None]]
"""Function that returns a context in which adapter n computes row n of every batch."""

NAME = "multi-adapter"


def check_rows(
    subject: Subject, adapters: Adapters, mixed: Mixed, forward: Callable[[], object], seed: int
) -> CheckResult:
    """Compare the outputs of every adapted layer in the model with the reference. Return the result of the check.

    Row n of a layer's output must equal the output of the float64 reference with adapter n. The allowed error is that
    of a single adapter. forward: runs the model on a batch with one row per adapter.
    """
    case = Case("trained", seed=seed, factors=parity_suite.load(subject.method).factors())
    with mixed(adapters):
        calls = _observe_layers(subject, forward)
    found = []
    for path in list(calls):
        x, y = calls.pop(path)
        truth, draws = reference_runs(subject, path, x, x.new_zeros(()), run=_row_by_row(path, adapters))
        found.append(prefix_tensor(path, noise_floor({"y": y}, truth, draws, subject.dtype, case.factor("forward"))))
    verdict = worst_of(found, "no adapted layer was run")
    return judged(subject, case, NAME, verdict, "" if verdict.passed else "rows do not follow their own adapters")


def rows_must_reach(subject: Subject, count: int, forward: Callable[[], object]) -> None:
    """Run the model. Raise Unsupported if the input of an adapted layer does not have `count` rows."""
    for path, (x, _) in _observe_layers(subject, forward).items():
        if len(x) != count:
            raise Unsupported(f"{path} gets {len(x)} rows for a batch of {count}, which cannot be assigned to adapters")


def _observe_layers(subject: Subject, forward: Callable[[], object]) -> dict[str, tuple[Tensor, Tensor]]:
    """Run the model, and return the input and the output of each adapted layer, by path.

    Raises Unsupported for a layer that gets its input as a keyword argument.
    """
    calls: dict[str, tuple[Tensor, Tensor]] = {}

    def hook(path: str, _: nn.Module, arguments: tuple[Tensor, ...], y: Tensor) -> None:
        if not arguments:
            raise Unsupported(f"{path} is called by keyword, so its input cannot be observed")
        calls[path] = arguments[0].detach().clone(), y.detach().clone()

    with torch.no_grad(), ExitStack() as hooks:
        for path in subject.adapted.layers:
            layer = subject.model.get_submodule(path)
            hooks.callback(layer.register_forward_hook(partial(hook, path)).remove)
        forward()
    return calls


def draw_adapters(subject: Subject, count: int, seed: int) -> list[dict[str, Tensor]]:
    """Return `count` adapters: the subject's own, then random ones of the same shapes and magnitude."""
    own = {name: t.detach().clone() for name, t in subject.adapted.tensors().items()}
    generator = torch.Generator().manual_seed(seed)

    def like(t: Tensor) -> Tensor:
        noise = normal_noise(t.shape, generator).to(t.device)
        # A matrix that is still zero after training must become random: the check would see nothing of a zero adapter.
        spread = float(t.double().std()) if t.numel() > 1 and bool(t.any()) else max(t.shape[-1], 1) ** -0.5
        return (noise * spread).to(t.dtype)

    return [own, *({name: like(t) for name, t in own.items()} for _ in range(count - 1))]


def _row_by_row(path: str, adapters: Adapters) -> Callable[..., dict[str, Tensor]]:
    """Return a function that runs the reference's layer on each row of x, and returns all outputs.

    The layer gets the tensors of adapter n for row n.
    """
    start = f"{path}."

    def run(layer: nn.Module, tensors: Mapping[str, Tensor], x: Tensor, _: Tensor) -> dict[str, Tensor]:
        rows = []
        with torch.no_grad():
            for row, adapter in zip(x, adapters, strict=True):
                for name, tensor in tensors.items():
                    tensor.copy_(adapter[start + name])
                rows.append(layer.eval()(row))
        return {"y": torch.stack(rows)}

    return run
