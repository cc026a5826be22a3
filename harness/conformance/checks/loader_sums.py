"""Checks of adapter files that are combined, merged, scaled or switched off.

The effective update of a parameter is its value with the adapter minus its value in the base. The expected result of a
combination is the base plus the weighted sum of the effective updates, computed in float64. An adapter with the weight
w adds w s B A for LoRA, w s c for the bias c of B (lora_bias), and w (P' - P) for modules_to_save. For DoRA it adds w
(m (W + s B A) / ||W + s B A|| - W). A program that cannot represent a sum should refuse it (harness.Unsupported).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from harness.conformance.adapter_files import variants
from harness.conformance.adapter_files.reference_logits import WeightedAdapterFile
from harness.conformance.adapter_files.subject import FIRST, SECOND, LoaderSubject
from harness.conformance.case import Case
from harness.conformance.checks import check
from harness.conformance.comparison.check_results import judged
from harness.errors import Unsupported
from harness.records.record import CheckResult

_WEIGHTS = (0.75, -0.5)
_SUM = "sum"
_FACTORS = (0.0, 0.5, 1.0)
_ROUNDS = 3
"""Number of times that `check_merge_undone` merges and unmerges an adapter."""


@check()
def check_combine_one(subject: LoaderSubject, case: Case) -> CheckResult:
    """A combination of one adapter with the weight 1 gives this adapter's logits, and does not change the adapter."""
    return _combined(subject, case, "combine_one", (FIRST,), (1.0,))


@check()
def check_combine_two(subject: LoaderSubject, case: Case) -> CheckResult:
    """A combination of two adapters gives the base plus the weighted sum of their updates.

    One weight is positive and one is negative. The two adapters differ in rank, alpha and values. The check tries every
    way of combining that the program offers.
    """
    return _combined(subject, case, "combine_two", (FIRST, SECOND), _WEIGHTS)


def _combined(
    subject: LoaderSubject, case: Case, name: str, names: Sequence[str], weights: Sequence[float]
) -> CheckResult:
    folders = (subject.adapter.folder, subject.another)
    parts = [WeightedAdapterFile(folder, weight) for folder, weight in zip(folders, weights, strict=False)]
    have, want = {}, {}
    raised: list[Exception] = []
    for way in subject.fresh().combinations:
        loader = subject.loaded()
        if len(names) > 1:
            loader.load(subject.another, SECOND)
        label = " ".join(filter(None, (way, _SUM)))
        try:
            loader.combine(names, weights, _SUM, way)
            have[label], want[label] = loader.logits(subject.prompts, _SUM), parts
        except (Unsupported, RuntimeError) as error:  # raised below: one way must not hide the others
            raised.append(error)
            continue
        have[f"{FIRST} after {label}"] = loader.logits(subject.prompts, FIRST)
        want[f"{FIRST} after {label}"] = [WeightedAdapterFile(folders[0])]
    verdict = subject.compare(have, want) if have else None
    broken = [error for error in raised if not isinstance(error, Unsupported)]
    if verdict is None or (verdict.passed and broken):
        raise (broken or raised)[0]
    return judged(subject, case, name, verdict)


@check()
def check_merge_two(subject: LoaderSubject, case: Case) -> CheckResult:
    """Two adapters merged in either order give the base with the sum of their updates."""
    parts = (WeightedAdapterFile(subject.adapter.folder), WeightedAdapterFile(subject.another))
    have = {}
    for first, second in ((FIRST, SECOND), (SECOND, FIRST)):
        loader = subject.loaded_both()
        loader.merge([first, second])
        have[f"{first}, then {second}"] = loader.logits(subject.prompts, None)
    return judged(subject, case, "merge_two", subject.compare(have, dict.fromkeys(have, parts)))


@check()
def check_merge_training(subject: LoaderSubject, case: Case) -> CheckResult:
    """An adapter that is merged in training mode gives the same logits as one that is merged in evaluation mode.

    The adapter's config has dropout, which must not be merged. The logits are compared in evaluation mode.
    """
    have = {}
    for training in (True, False):
        loader = subject.fresh()
        loader.load(variants.with_dropout(subject.adapter.folder, subject.adapter.base), FIRST)
        loader.train(training)
        loader.merge([FIRST])
        loader.train(False)
        have[f"merged in {'training' if training else 'evaluation'} mode"] = loader.logits(subject.prompts, None)
    verdict = subject.compare(have, dict.fromkeys(have, (WeightedAdapterFile(subject.adapter.folder),)))
    return judged(subject, case, "merge_training", verdict)


@check()
def check_merge_undone(subject: LoaderSubject, case: Case) -> CheckResult:
    """After merging and unmerging three times, the base and the adapter compute what they computed before.

    Rounding errors in the dtype of the base are allowed. The result says whether the logits of the base are restored to
    the last bit.
    """
    loader, prompts = subject.loaded(), subject.prompts
    before = loader.logits(prompts, None)
    for _ in range(_ROUNDS):
        loader.merge([FIRST])
        loader.unmerge()
    have = {"base": loader.logits(prompts, None), FIRST: loader.logits(prompts, FIRST)}
    equal = all(torch.equal(one, other) for one, other in zip(have["base"], before, strict=True))
    detail = "restored to the last bit" if equal else "restored with rounding errors"
    verdict = subject.compare(have, {"base": [], FIRST: [WeightedAdapterFile(subject.adapter.folder)]})
    return judged(subject, case, "merge_undone", verdict, detail if verdict.passed else "")


@check()
def check_disabled(subject: LoaderSubject, case: Case) -> CheckResult:
    """While adapters are disabled, the model gives the base's logits. Afterwards it gives the adapter's logits again."""
    loader, prompts = subject.loaded(), subject.prompts
    with loader.disabled():
        have = {"disabled": loader.logits(prompts, FIRST)}
    have["enabled again"] = loader.logits(prompts, FIRST)
    want = {"disabled": [], "enabled again": [WeightedAdapterFile(subject.adapter.folder)]}
    return judged(subject, case, "disabled", subject.compare(have, want))


@check()
def check_scale(subject: LoaderSubject, case: Case) -> CheckResult:
    """An adapter whose scaling is multiplied by f gives the same logits as a file whose alpha is multiplied by f.

    With f = 0, a LoRA gives the base and a DoRA gives m W / ||W||. Modules that a file replaces stay replaced. The
    factor f multiplies the scaling of the file, even if an earlier call has set another factor.
    """
    loader, have, want = subject.loaded(), {}, {}
    for factor in _FACTORS:
        loader.set_scale(FIRST, factor)
        have[f"factor {factor:g}"] = loader.logits(subject.prompts, FIRST)
        want[f"factor {factor:g}"] = [WeightedAdapterFile(subject.adapter.folder, factor=factor)]
    return judged(subject, case, "scale", subject.compare(have, want))
