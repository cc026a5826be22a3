"""Checks of a loader with several adapters: switch, rename, hot-swap, delete, copy."""

from __future__ import annotations

from contextlib import suppress

from torch import Tensor

from harness.conformance.adapter_files.reference_logits import WeightedAdapterFile
from harness.conformance.adapter_files.subject import FIRST, SECOND, LoaderSubject
from harness.conformance.case import Case
from harness.conformance.checks import check
from harness.conformance.comparison.check_results import judged
from harness.errors import Unsupported
from harness.records.record import CheckResult

_RENAMED = "renamed"
_HALF = 0.5


@check()
def check_switch(subject: LoaderSubject, case: Case) -> CheckResult:
    """With two adapters loaded, each call computes with the adapter that it names, or with the base alone.

    The adapter of an earlier call has no influence on a later call.
    """
    loader, first, second = (
        subject.loaded_both(),
        WeightedAdapterFile(subject.adapter.folder),
        WeightedAdapterFile(subject.another),
    )
    have: dict[str, list[Tensor]] = {}
    want: dict[str, list[WeightedAdapterFile]] = {}
    for name, part in ((None, []), (SECOND, [second]), (FIRST, [first]), (None, []), (FIRST, [first])):
        label = f"call {len(have) + 1}, {name or 'base'}"
        have[label], want[label] = loader.logits(subject.prompts, name), part
    return judged(subject, case, "switch", subject.compare(have, want))


@check()
def check_renamed(subject: LoaderSubject, case: Case) -> CheckResult:
    """An adapter file gives the same logits under a second name, also after it is deleted and loaded again."""
    loader, prompts = subject.loaded(), subject.prompts
    loader.load(subject.adapter.folder, _RENAMED)
    have = {name: loader.logits(prompts, name) for name in (_RENAMED, FIRST)}
    with suppress(Unsupported):
        loader.delete(_RENAMED)
        loader.load(subject.adapter.folder, _RENAMED)
        have["deleted and loaded again"] = loader.logits(prompts, _RENAMED)
    verdict = subject.compare(have, dict.fromkeys(have, (WeightedAdapterFile(subject.adapter.folder),)))
    return judged(subject, case, "renamed", verdict)


@check()
def check_hotswap(subject: LoaderSubject, case: Case) -> CheckResult:
    """An adapter that replaces another one in place gives the same logits as after a fresh load.

    The two adapters differ in rank, alpha and values. The check replaces the first by the second, and the second by the
    first. The base must not change.
    """
    loader, prompts = subject.fresh(), subject.prompts
    first, second = WeightedAdapterFile(subject.adapter.folder), WeightedAdapterFile(subject.another)
    loader.load(second.folder, FIRST)
    loader.hotswap(first.folder, FIRST)
    have = {"swapped": loader.logits(prompts, FIRST)}
    loader.hotswap(second.folder, FIRST)
    have |= {"swapped back": loader.logits(prompts, FIRST), "base": loader.logits(prompts, None)}
    want = {"swapped": [first], "swapped back": [second], "base": []}
    return judged(subject, case, "hotswap", subject.compare(have, want))


@check()
def check_hotswap_beside(subject: LoaderSubject, case: Case) -> CheckResult:
    """Replacing an adapter does not change a second adapter, even if the second name begins with the first name."""
    loader = subject.fresh()
    for name in (FIRST, SECOND):
        loader.load(subject.another, name)
    loader.hotswap(subject.adapter.folder, FIRST)
    have = {SECOND: loader.logits(subject.prompts, SECOND)}
    return judged(
        subject, case, "hotswap_beside", subject.compare(have, {SECOND: [WeightedAdapterFile(subject.another)]})
    )


@check()
def check_hotswap_scale(subject: LoaderSubject, case: Case) -> CheckResult:
    """After a hot-swap, a factor on the scaling multiplies the scaling of the new file, not of the replaced file."""
    loader = subject.fresh()
    loader.load(subject.another, FIRST)
    loader.hotswap(subject.adapter.folder, FIRST)
    loader.set_scale(FIRST, _HALF)
    have = {FIRST: loader.logits(subject.prompts, FIRST)}
    verdict = subject.compare(have, {FIRST: [WeightedAdapterFile(subject.adapter.folder, factor=_HALF)]})
    return judged(subject, case, "hotswap_scale", verdict)


@check()
def check_hotswap_merged(subject: LoaderSubject, case: Case) -> CheckResult:
    """A loader refuses to replace a merged adapter, or gives the right logits after unmerging.

    In both cases the base is unchanged.
    """
    loader, prompts = subject.fresh(), subject.prompts
    loader.load(subject.another, FIRST)
    loader.merge([FIRST])
    loaded, detail = WeightedAdapterFile(subject.adapter.folder), ""
    try:
        loader.hotswap(loaded.folder, FIRST)
    except Unsupported as error:
        loaded, detail = WeightedAdapterFile(subject.another), f"refused: {error}"
    loader.unmerge()
    have = {"base": loader.logits(prompts, None), FIRST: loader.logits(prompts, FIRST)}
    return judged(subject, case, "hotswap_merged", subject.compare(have, {"base": [], FIRST: [loaded]}), detail)


@check()
def check_delete(subject: LoaderSubject, case: Case) -> CheckResult:
    """Deleting an adapter changes neither the base nor another adapter, and its name can be used again."""
    loader, prompts = subject.loaded_both(), subject.prompts
    loader.delete(FIRST)
    have = {SECOND: loader.logits(prompts, SECOND), "base": loader.logits(prompts, None)}
    loader.load(subject.adapter.folder, FIRST)
    have[FIRST] = loader.logits(prompts, FIRST)
    want = {
        SECOND: [WeightedAdapterFile(subject.another)],
        "base": [],
        FIRST: [WeightedAdapterFile(subject.adapter.folder)],
    }
    return judged(subject, case, "delete", subject.compare(have, want))


@check()
def check_delete_last(subject: LoaderSubject, case: Case) -> CheckResult:
    """After the only adapter is deleted, the model gives the base's logits, and an adapter can be loaded again."""
    loader, prompts = subject.loaded(), subject.prompts
    loader.delete(FIRST)
    have = {"base": loader.logits(prompts, None)}
    loader.load(subject.adapter.folder, FIRST)
    have[FIRST] = loader.logits(prompts, FIRST)
    want = {"base": [], FIRST: [WeightedAdapterFile(subject.adapter.folder)]}
    return judged(subject, case, "delete_last", subject.compare(have, want))


@check()
def check_deepcopy(subject: LoaderSubject, case: Case) -> CheckResult:
    """A loader and its copy are independent: an adapter that is loaded or merged in one does not change the other."""
    loader, prompts = subject.loaded(), subject.prompts
    first, second = WeightedAdapterFile(subject.adapter.folder), WeightedAdapterFile(subject.another)
    twin = loader.copy()
    twin.load(second.folder, SECOND)
    with suppress(Unsupported):
        twin.merge([SECOND])
    have = {f"original, {FIRST}": loader.logits(prompts, FIRST), "original, base": loader.logits(prompts, None)}
    with suppress(Unsupported):
        twin.unmerge()
        loader.merge([FIRST])
    have |= {f"copy, {name or 'base'}": twin.logits(prompts, name) for name in (FIRST, SECOND, None)}
    want = {f"original, {FIRST}": [first], "original, base": []}
    want |= {f"copy, {FIRST}": [first], f"copy, {SECOND}": [second], "copy, base": []}
    return judged(subject, case, "deepcopy", subject.compare(have, want))
