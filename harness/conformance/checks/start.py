"""Where training starts from."""

from __future__ import annotations

from harness.conformance.case import Case
from harness.conformance.results import listed
from harness.conformance.subject import Subject, initial_tensors
from harness.records import CheckResult
from harness.tolerances import INITIAL_SIGMAS


def check_initial(subject: Subject, case: Case) -> CheckResult:
    """The implementation's own start has the distribution that the reference states, and the same tensors are zero.

    A tensor that the reference fills with one value must hold that value. One that it draws or computes must have the
    reference's mean and mean square, within the standard errors of two samples of that size.
    """
    bases = {path: subject.original_base(path) for path in subject.bases}
    wanted = initial_tensors(subject.method, bases, subject.config, case.generator(salt=2))
    odd = []
    fresh = case.anew()
    have = (subject if fresh is None else fresh).added()
    for name, want in wanted.items():
        if name not in have or have[name].shape != want.shape:
            continue  # `parameters` says so
        mine, want = have[name].detach().double(), want.double()
        if bool((want == want.flatten()[0]).all()):
            if not bool((mine == want.to(mine.dtype)).all()):
                odd.append(
                    f"{name} starts at up to {float(mine.abs().max()):.3g}, should be {float(want.flatten()[0]):g}"
                )
            continue
        # The mean of n squares has a standard deviation of at most sqrt(2/n) of it, that of the normal distribution.
        bound = INITIAL_SIGMAS * (2 / mine.numel() + 2 / want.numel()) ** 0.5
        ratio = float(mine.square().mean() / want.square().mean())
        if abs(ratio - 1) > bound:
            odd.append(f"{name}: mean square is {ratio:.3g} of the reference's, should be 1 +- {bound:.2g}")
        spread = INITIAL_SIGMAS * (2 * float(want.var(correction=0)) / mine.numel()) ** 0.5
        if abs(float(mine.mean() - want.mean())) > spread:
            odd.append(f"{name}: mean is {float(mine.mean()):.3g}, should be {float(want.mean()):.3g} +- {spread:.2g}")
    return listed(subject, case, "initial", odd)
