"""Check of the state from which training starts.

A start is one such state: the adapter's tensors right after attaching.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from itertools import chain

import torch

from harness.conformance import process_settings
from harness.conformance.case import Case
from harness.conformance.checks import States, check
from harness.conformance.comparison.check_results import from_problems
from harness.conformance.subject import Subject, drawn_tensors, initial_tensors
from harness.conformance.tolerance_constants import INITIAL_SIGMAS, RANDOM_SHARE
from harness.methods.spec import method_info
from harness.records.record import CheckResult

_LEAST_SAMPLE = 64
"""Smallest number of random elements for which the mean square is nearly normally distributed. For a smaller tensor,
the check joins the elements of several starts."""
_LARGE = 1.8
"""Multiple of the root mean square above which a number of a drawn tensor counts as large: 7 % of normal numbers, and no
uniform number."""
_STARTS = 64
"""Number of further starts of the reference that are compared if the first has another mean square or another share of
large numbers."""
_LONG = 8
"""Smallest length of rows that are compared: shorter ones may be equal by chance in 16 bits."""


@check(States.INIT, in_minor_examples=False)
def check_initial(subject: Subject, case: Case) -> CheckResult:
    """At the start, the adapter's tensors have the reference's distribution, and the same tensors are zero.

    A tensor that the reference fills with one value must hold that value. A tensor that the reference draws or computes
    must have the mean and mean square of the reference, up to a multiple of the standard error for samples of its size,
    or of the spread of the mean square among other starts of the reference. About as many of its numbers as in the
    reference must exceed 1.8 times the root mean square. No two long rows or columns of a drawn tensor may be equal.
    Random numbers come only from the generator that `attach` gets: its seed decides the start, and two layers of one
    shape start differently, as do two models that get one generator (unless it only lends its seed to a library). A
    change of the first adapter does not change the start of a second one. If the start comes from an SVD of the weight,
    two starts with one seed are equal up to rounding. The sign of singular vectors is arbitrary, so a tensor with one
    element may have the other sign.
    """
    bases = {path: subject.original_base(path) for path in subject.bases}
    wanted = initial_tensors(subject.method, bases, subject.config, case.generator(salt=2))
    drawn = drawn_tensors(subject.method, bases, subject.config)
    from_weight = method_info(subject.method).spec.start_from_weight
    problems = []
    fresh = case.attach_again()
    have = (subject if fresh is None else fresh).added()
    for name, want in wanted.items():
        if name not in have or have[name].shape != want.shape:
            continue  # the check `parameters` reports it
        mine, want = have[name].detach().double(), want.double()
        any_sign = from_weight and want.numel() == 1
        is_single = name in drawn and want.numel() >= _LEAST_SAMPLE  # otherwise several starts are joined
        if name in drawn and want.numel() < _LEAST_SAMPLE:
            if fresh is None:
                continue  # the model of a Cell cannot be attached again
            mine, want = _several_starts(subject, case, name, -(-_LEAST_SAMPLE // want.numel()))
        elif not any_sign and bool((want == want.flatten()[0]).all()):
            if not bool((mine == want.to(mine.dtype)).all()):
                problems.append(
                    f"{name} starts at up to {float(mine.abs().max()):.3g}, should be {float(want.flatten()[0]):g}"
                )
            continue
        # The standard deviation of a mean of n squares is at most sqrt(2 / n) of this mean, as for normal numbers.
        bound = INITIAL_SIGMAS * (2 / mine.numel() + 2 / want.numel()) ** 0.5
        own = float(mine.square().mean())
        ratio = own / float(want.square().mean())
        if abs(ratio - 1) > bound and not (is_single and _is_usual(own, subject, case, name)):
            problems.append(f"{name}: mean square is {ratio:.3g} of the reference's, should be 1 +- {bound:.2g}")
        spread = INITIAL_SIGMAS * (2 * float(want.var(correction=0)) / mine.numel()) ** 0.5
        if not any_sign and abs(float(mine.mean() - want.mean())) > spread:
            problems.append(
                f"{name}: mean is {float(mine.mean()):.3g}, should be {float(want.mean()):.3g} +- {spread:.2g}"
            )
        if name in drawn:
            further = (_other_start(subject, case, name, n) for n in range(_STARTS)) if is_single else ()
            problems += (f"{name}: {one}" for one in [*_tails(mine, want, further), *_equal_rows(mine, want)])
    return from_problems(subject, case, "initial", [*problems, *_generator_problems(case)])


def _is_usual(mean_square: float, subject: Subject, case: Case, name: str) -> bool:
    """Return whether the mean square of a start is within INITIAL_SIGMAS standard deviations of those of other starts.

    If few random numbers decide a start, as in LoRA's orthogonal start, the numbers of a tensor are not independent:
    its mean square then varies more than that of as many independent numbers.
    """
    others = torch.stack([_other_start(subject, case, name, n).square().mean() for n in range(_STARTS)])
    return abs(mean_square - float(others.mean())) <= INITIAL_SIGMAS * float(others.std())


def _tails(mine: torch.Tensor, want: torch.Tensor, further: Iterable[torch.Tensor]) -> Iterator[str]:
    """Yield a message if the share of large numbers differs from the reference's. No uniform number is large.

    further: other starts of the reference. If the rows of a start have random sizes, as in LoRA's orthogonal start, its
    share of large numbers may be far from that of one other start, but not from those of many.
    """
    limit = _LARGE * want.square().mean().sqrt()
    found = int((mine.abs() > limit).sum())
    for other in chain([want], further):
        expected = int((other.abs() > limit).sum())
        share = (found + expected) / (mine.numel() + other.numel())
        spread = INITIAL_SIGMAS * (share * (1 - share) * (1 / mine.numel() + 1 / other.numel())) ** 0.5
        if found + expected < _LEAST_SAMPLE or abs(found / mine.numel() - expected / other.numel()) <= spread:
            return
    yield f"{found} of {mine.numel()} numbers exceed {limit:.3g}; in the reference, {expected} of {want.numel()}"


def _equal_rows(mine: torch.Tensor, want: torch.Tensor) -> Iterator[str]:
    """Yield a message if two long rows or columns of a drawn tensor are equal, and none of the reference's are."""
    for name, start in (("rows", 0), ("columns", -1)):
        flat = [one.transpose(0, start).flatten(1) for one in (mine, want) if one.dim() > 1]
        equal = [len(one) - len(one.unique(dim=0)) for one in flat if one.shape[1] >= _LONG]
        if len(equal) == len((mine, want)) and equal[0] and not equal[1]:
            yield f"{equal[0]} of its {name} are equal to others"


def _other_start(subject: Subject, case: Case, name: str, number: int) -> torch.Tensor:
    """Return the tensor `name` of another start of the reference."""
    bases = {path: subject.original_base(path) for path in subject.bases}
    return initial_tensors(subject.method, bases, subject.config, case.generator(salt=1000 + number))[name].double()


def _several_starts(subject: Subject, case: Case, name: str, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the tensor `name` from `number` starts of the subject, and from as many starts of the reference.

    Both results are flat float64 tensors that join the starts.
    """
    bases = {path: subject.original_base(path) for path in subject.bases}
    mine = [one.added()[name] for n in range(number) if (one := case.attach_again(seed=n)) is not None]
    generators = (case.generator(salt=3 + n) for n in range(number))
    wanted = [initial_tensors(subject.method, bases, subject.config, one)[name] for one in generators]
    return torch.stack(mine).detach().double().flatten(), torch.stack(wanted).detach().double().flatten()


def _generator_problems(case: Case) -> Iterator[str]:
    # The global generator is in another state for the second subject, so that a draw from it shows.
    generator = torch.Generator().manual_seed(1)
    before = generator.get_state()
    one = _attached(case, generator, 1)
    if one is None:
        return
    mine = {name: t.detach().clone() for name, t in one.added().items()}
    state = {name: t.detach().clone() for name, t in one.adapted.state().items()}
    for t in (*one.added().values(), *one.adapted.state().values()):
        t.data.zero_()  # as training or loading a file changes them
    again, other = _attached(case, 1, 2), _attached(case, 2, 1)
    if again is None or other is None:
        return
    bases = {path: one.original_base(path) for path in one.bases}
    same_seed, other_seed = again.added(), other.added()
    for name, t in again.adapted.state().items():
        if name in state and bool((t == 0).all()) and bool((state[name] != 0).any()):
            yield f"setting {name} of one adapter to 0 also sets it to 0 in a second adapter: they share memory"
    if method_info(one.method).spec.start_from_weight:
        for name, tensor in mine.items():
            distance = (tensor.detach().double() - same_seed[name].detach().double()).norm()
            if float(distance) > RANDOM_SHARE * float(tensor.detach().double().norm()):
                yield f"{name} starts differently with a generator of the same seed: its SVD draws from another generator"
    drawn = sorted(drawn_tensors(one.method, bases, one.config) & mine.keys())
    if drawn and torch.equal(generator.get_state(), before):
        torch.rand(1, generator=generator)
        later = _attached(case, generator, 1)
        if later is not None and not all(torch.equal(later.added()[name], mine[name]) for name in drawn):
            yield "attaching draws from a copy of its generator, so a second model would start with the same values"
    for name in drawn:
        if not torch.equal(mine[name], same_seed[name]):
            yield f"{name} starts differently with a generator of the same seed: it is drawn from another generator"
        elif torch.equal(mine[name], other_seed[name]):
            yield f"{name} starts with the same values for two seeds"
    for name, other_name in itertools.combinations(drawn, 2):
        if mine[name].shape == mine[other_name].shape and torch.equal(mine[name], mine[other_name]):
            yield f"{name} and {other_name} start with the same values"


def _attached(case: Case, seed: int | torch.Generator, global_seed: int) -> Subject | None:
    process_settings.seed(global_seed)
    return case.attach_again(seed=seed, square=True)
