"""Merging, unmerging, detaching, and coming back from disk."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import chain

import torch
from torch import Tensor, nn

from harness.conformance.beside import Draws, reference_runs
from harness.conformance.case import Case
from harness.conformance.drawn import inputs
from harness.conformance.observe import observe
from harness.conformance.results import at, judged, listed, skipped
from harness.conformance.subject import DTYPES, Subject, load
from harness.conformance.tolerance import exact, noise_floor, worst_of
from harness.records import CheckResult


def check_merge(subject: Subject, case: Case) -> CheckResult:
    """The merged layers compute what the float64 reference computes, whatever then becomes of the adapter; so do the
    layers after unmerging, which follow their adapter again.
    """
    if not subject.adapted.can_merge:
        return skipped(subject, case, "merge", "this Method has nothing to merge")
    if (fresh := case.anew()) is not None:
        # Some libraries merge into the base weight and unmerge by subtracting, which leaves a rounding behind.
        load(fresh.adapted, subject.adapted.tensors(), subject.state())
        subject = fresh
    xs = _inputs(subject, case)
    added = subject.added()
    held = {name: t.detach().clone() for name, t in added.items()}
    modes = {path: layer.training for path, layer in subject.adapted.layers.items()}
    with torch.no_grad():
        for layer in subject.adapted.layers.values():
            layer.eval()
        truth, draws = _expected(subject, xs)
        subject.adapted.merge()
        for tensor in added.values():
            tensor.mul_(-3).add_(1)  # a merged layer no longer looks at its adapter
        for path in xs:
            subject.model.get_submodule(path).eval()  # whose result not every library returns
        merged = {path: subject.model.get_submodule(path)(x) for path, x in xs.items()}
        load(subject.adapted, held)
        subject.adapted.unmerge()
        after = {path: subject.model.get_submodule(path)(x) for path, x in xs.items()}
        for tensor in added.values():
            tensor.mul_(0.5)
        moved = {path: subject.model.get_submodule(path)(x) for path, x in xs.items()}
        moved_truth, moved_draws = _expected(subject, xs)
        load(subject.adapted, held)
    for path, training in modes.items():
        subject.adapted.layers[path].train(training)
    verdict = noise_floor(merged, truth, draws, subject.dtype, case.factor("merge"))
    if not verdict.passed:
        return judged(subject, case, "merge", verdict, "after merging")
    verdict = noise_floor(after, truth, draws, subject.dtype, case.factor("merge"))
    if not verdict.passed:
        return judged(subject, case, "merge", verdict, "after unmerging")
    verdict = noise_floor(moved, moved_truth, moved_draws, subject.dtype, case.factor("merge"))
    return judged(subject, case, "merge", verdict, "" if verdict.passed else "unmerged, with another adapter")


def check_detach(subject: Subject, case: Case) -> CheckResult:
    """Detaching puts the very base layers back, and with their weights what the base model computed."""
    fresh = case.anew()
    if fresh is None or fresh.original.model is None:
        return skipped(subject, case, "detach", "the case cannot attach anew")
    xs = _inputs(fresh, case)
    fresh.adapted.detach()
    strange = [f"{p} is not the base layer" for p, b in fresh.bases.items() if fresh.model.get_submodule(p) is not b]
    if strange:
        return listed(subject, case, "detach", strange)
    with torch.no_grad():
        mine = {path: fresh.model.get_submodule(path)(x) for path, x in xs.items()}
        base = {path: fresh.original_base(path)(x) for path, x in xs.items()}
    return judged(subject, case, "detach", exact(mine, base))


def check_save(subject: Subject, case: Case) -> CheckResult:
    """`tensors()` and `state()` are all there is: copied into a freshly attached model they give the same outputs and
    gradients, to the last bit.
    """
    fresh = case.anew()
    if fresh is None:
        return skipped(subject, case, "save", "the case cannot attach anew")
    saved, places = ({*s.adapted.tensors(), *s.state()} for s in (subject, fresh))
    if odd := sorted(places ^ saved):
        return listed(subject, case, "save", [f"{name} is on one side only" for name in odd])
    load(fresh.adapted, subject.adapted.tensors(), subject.state())
    found = []
    for index, (path, layer) in enumerate(subject.adapted.layers.items()):
        x, dy = inputs(subject.original_base(path), case.tokens, DTYPES[subject.dtype], case.generator(index))
        mine = observe(layer, subject.tensors_of(path), x, dy)
        found.append(at(path, exact(observe(fresh.adapted.layers[path], fresh.tensors_of(path), x, dy), mine)))
    return judged(subject, case, "save", worst_of(found, "exact"))


def _expected(subject: Subject, xs: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Draws]:
    """Return what the layers should compute, and draws of what a program in the subject's dtype loses.

    The first is the reference merged in that dtype: a weight that the update was added to is rounded once more.
    """
    truth, each, merged = {}, list[Iterable[dict[str, Tensor]]](), {}
    for path, x in xs.items():
        exactly, draws = reference_runs(subject, path, x, x.new_zeros(()), look=_output)
        truth[path] = exactly["y"]
        # Draws that are yet to be made hold float64 layers: of a large model there is no room for all of them at once.
        each.append(draws if subject.twins is not None else list(draws))
        twin = subject.reference(path, subject.dtype)
        twin.adapted.merge()
        merged[path] = twin.adapted.model.get_submodule("layer").eval()(x)
    together = zip(*each, strict=True)
    drawn = ({path: draw["y"] for path, draw in zip(xs, several, strict=True)} for several in together)
    return truth, Draws(chain([merged], drawn))


def _output(layer: nn.Module, _: Mapping[str, Tensor], x: Tensor, __: Tensor) -> dict[str, Tensor]:
    return {"y": layer.eval()(x)}


def _inputs(subject: Subject, case: Case) -> dict[str, Tensor]:
    return {
        path: inputs(subject.original_base(path), case.tokens, DTYPES[subject.dtype], case.generator(index))[0]
        for index, path in enumerate(subject.adapted.layers)
    }
