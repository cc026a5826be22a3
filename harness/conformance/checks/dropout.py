"""Check of dropout in training and eval mode."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from harness.conformance.case import Case
from harness.conformance.checks import States, check
from harness.conformance.comparison.check_results import listed, skipped
from harness.conformance.comparison.inputs import inputs, takes_rows
from harness.conformance.comparison.layer_comparison import observe_with_reference, reference_runs
from harness.conformance.comparison.observations import observe
from harness.conformance.comparison.tolerance_policies import noise_floor, rows_within
from harness.conformance.subject import DTYPES, Subject
from harness.conformance.tolerance_constants import DROPOUT_SIGMAS, DROPOUT_SURE_BITS
from harness.records.record import CheckResult

FEATURES = 32
"""With this number of features or more, nearly every token drops at least one of them and retains at least one."""


@check(States.WARM)
def check_dropout(subject: Subject, case: Case) -> CheckResult:
    """Training mode drops features of the adapter's input as the config states; eval mode drops none.

    Each feature is dropped with probability p or scaled by 1/(1-p). The base gets all features, and the backward pass
    uses the mask of the forward pass. A mask must not drop a token of many features as a whole, must differ between
    tokens, and must differ between calls. The random numbers need not equal the reference's.

    Every token has only one feature that is not zero. Its output must equal the reference's, with that feature retained
    or dropped, which reveals the mask. The gradients are compared with those of the reference with this mask. The
    binomial distribution bounds the number of dropped features.
    """
    p = getattr(subject.config, "dropout", 0.0)
    if not p:
        return skipped(subject, case, "dropout", "the config has no dropout")
    problems: list[str] = []
    dropped = total = 0
    for index, (path, layer) in enumerate(subject.adapted.layers.items()):
        base = subject.original_base(path)
        if not takes_rows(base):
            continue
        x, dy = inputs(base, max(case.tokens, 64), DTYPES[subject.dtype], case.generator(index))
        only = torch.zeros_like(x)
        rows = torch.arange(len(x), device=x.device)
        where = torch.randint(0, x.shape[-1], (len(x),), generator=case.generator(index + 1)).to(x.device)
        only[rows, where] = 1 + x.abs().amax(-1)
        mine = observe(layer, subject.tensors_of(path), only, dy, training=True)
        is_retained, is_dropped = (_rows_as(subject, path, mine["y"], only, dy, mask) for mask in (1 / (1 - p), 0.0))
        if neither := int((~(is_retained | is_dropped)).sum()):
            problems.append(f"{path}: {neither} of {len(x)} outputs fit neither a retained nor a dropped feature")
            continue
        total += int((is_retained ^ is_dropped).sum())
        dropped += int((is_dropped & ~is_retained).sum())
        if bool((is_retained ^ is_dropped).all()):
            masked = partial(_masked, is_retained.double()[:, None] / (1 - p))
            truth, draws = reference_runs(subject, path, only, dy, look=masked)

            def known(seen: dict[str, Tensor], rows: Tensor = rows, where: Tensor = where) -> dict[str, Tensor]:
                """Return the observation without the gradients of features with an unknown mask."""
                return {**seen, "grad x": seen["grad x"][rows, where]}

            factor = case.factor("gradient")
            verdict = noise_floor(known(mine), known(truth), map(known, draws), subject.dtype, factor)
            if not verdict.passed:
                problems.append(f"{path}: with the forward pass's mask {verdict.tensor} is off by {verdict.error}")
            if x.shape[-1] >= FEATURES and (whole := _whole_tokens(subject, path, layer, x, dy, p)) > len(x) // 2:
                problems.append(f"{path}: {whole} of {len(x)} tokens are retained or dropped as a whole")
            problems += [f"{path}: {problem}" for problem in _repeats(subject, path, layer, p)]
        again = noise_floor(*observe_with_reference(subject, path, layer, x, dy), subject.dtype, case.factor("forward"))
        if not again.passed:
            problems.append(f"{path}: in eval mode {again.tensor} is off by {again.error} of {again.allowed}")
    spread = DROPOUT_SIGMAS * (total * p * (1 - p)) ** 0.5
    if not total and not problems:
        return skipped(subject, case, "dropout", "in this state the adapter adds nothing")
    if not problems and abs(dropped - p * total) > spread + 1:
        problems.append(f"{dropped} of {total} features were dropped, should be {p * total:.0f} +- {spread:.0f}")
    return listed(subject, case, "dropout", problems, f"{dropped} of {total} features dropped at p = {p:g}")


def _rows_as(subject: Subject, path: str, y: Tensor, x: Tensor, dy: Tensor, mask: float) -> Tensor:
    """Return a mask of the rows of `y` that equal the reference's output with `mask` in place of its dropout."""
    truth, draws = reference_runs(subject, path, x, dy, look=partial(_masked, mask))
    return rows_within(y, truth["y"], [draw["y"] for draw in draws], subject.dtype)


def _whole_tokens(subject: Subject, path: str, layer: nn.Module, x: Tensor, dy: Tensor, p: float) -> int:
    """Count the tokens of many features that training mode retains or drops as a whole."""
    y = observe(layer, {}, x, dy, training=True)["y"]
    retained, dropped = (_rows_as(subject, path, y, x, dy, mask) for mask in (1 / (1 - p), 0.0))
    return int((retained | dropped).sum())


def _repeats(subject: Subject, path: str, layer: nn.Module, p: float) -> Iterator[str]:
    """Yield a description of a mask that is the same for all tokens or for two calls.

    The check gives every token the same single feature.
    """
    tokens = math.ceil(DROPOUT_SURE_BITS / -math.log2(max(p, 1 - p)))
    x, dy = inputs(subject.original_base(path), tokens, DTYPES[subject.dtype], torch.Generator().manual_seed(0))
    only = torch.zeros_like(x)
    only[:, 0] = 1 + x.abs().amax()
    ys = [observe(layer, {}, only, dy, training=True)["y"] for _ in range(2)]
    retained = [_rows_as(subject, path, y, only, dy, 1 / (1 - p)) for y in ys]
    if bool(retained[0].all()) or not bool(retained[0].any()):
        yield f"a feature is retained or dropped in all of {tokens} tokens"
    elif bool((retained[0] == retained[1]).all()):
        yield f"two calls drop the feature in the same of {tokens} tokens"


def _masked(
    mask: Tensor | float, layer: nn.Module, tensors: Mapping[str, Tensor], x: Tensor, dy: Tensor
) -> dict[str, Tensor]:
    """Observe the reference's layer in training mode with a known mask (T, 1), or a factor, instead of its dropout."""
    for name, child in list(layer.named_modules()):
        if isinstance(child, nn.Dropout):
            parent, _, last = name.rpartition(".")
            setattr(layer.get_submodule(parent), last, _Times(mask))
    return observe(layer, tensors, x, dy, training=True)


class _Times(nn.Module):
    """Multiplication by a known mask instead of dropout."""

    def __init__(self, mask: Tensor | float) -> None:
        super().__init__()
        self.p, self.mask = 0.5, mask

    def forward(self, x: Tensor) -> Tensor:
        return x * (self.mask.to(x.dtype) if isinstance(self.mask, Tensor) else self.mask)
