"""Check of process-wide settings."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

import torch

from harness.conformance import process_settings
from harness.conformance.case import Case
from harness.conformance.checks import States, check
from harness.conformance.comparison.call_histories import is_packed
from harness.conformance.comparison.check_results import from_problems, skipped
from harness.conformance.comparison.inputs import inputs
from harness.conformance.comparison.observations import observe
from harness.conformance.comparison.tolerance_policies import unchanged
from harness.conformance.normal_noise import normal_noise
from harness.conformance.operation import OperationSubject
from harness.conformance.subject import DTYPES, Subject
from harness.methods.spec import method_info
from harness.records.record import CheckResult


@check(States.INIT, depends_on_sizes=False, in_minor_examples=True)
def check_settings(subject: Subject | OperationSubject, case: Case) -> CheckResult:
    """Attaching and computing change no process-wide setting, and seed no random numbers.

    Settings are torch's default dtype and device, gradient mode, threads, determinism, precision, autocast, anomaly
    detection and kernels of attention, and numpy's reaction to floating-point errors. Attaching and a call leave them as
    they are even if a program has chosen others: another default dtype, gradients off, another number of threads,
    deterministic algorithms. Attaching adds no filter of Python's warnings.

    Random numbers are torch's, numpy's and Python's. Drawing them is allowed. Seeding is not, because code that runs
    later would depend on it. This also holds for merging, unmerging, loading a state_dict, a step of the Method's own
    optimizer, and `after_step`. The tensors that attaching puts into `state()`, such as VeRA's projections, do not
    depend on torch's default dtype, nor do the dtypes of the tensors that train. These tensors train even if gradients are
    off when the adapter is attached.
    """
    if isinstance(subject, OperationSubject):
        with process_settings.restored() as changed:
            seeded = process_settings.find_seeding(subject.call)
        # `calls` judges exceptions. Triton's interpreter raises one in bfloat16 if torch's default dtype is float64.
        with process_settings.others() as changed_others, contextlib.suppress(Exception):
            subject.call()
        others = [f"in a call under other settings, {one}" for one in changed_others]
        return from_problems(subject, case, "settings", [*changed, *seeded, *others])
    if case.attach_fresh is None:
        return skipped(subject, case, "settings", "the case cannot attach again")
    with process_settings.restored() as changed:
        seeded = process_settings.find_seeding(lambda: _use(case.attach_again(), case))
    odd = [*subject.disturbed, *changed, *seeded, *_by_default_dtype(subject, case)]
    return from_problems(subject, case, "settings", odd or [*_under_other_settings(subject, case)])


def _under_other_settings(subject: Subject, case: Case) -> Iterator[str]:
    """Attach, and call a layer, while process-wide settings have unusual values. Yield a message for each changed setting.

    Also yield a message for each filter of Python's warnings that attaching adds. All filters are removed before,
    because Python would move an equal filter to the front instead of adding another one.
    """
    with warnings.catch_warnings(record=True), process_settings.others() as changed:
        warnings.resetwarnings()
        other = case.attach_again()
        left = [f"the filter of warnings {one} was added" for one in warnings.filters]
    yield from (f"after attaching under other settings, {one}" for one in changed)
    yield from left
    with process_settings.others() as changed:
        for index, (path, layer) in enumerate(subject.adapted.layers.items()):
            layer(inputs(subject.original_base(path), case.tokens, DTYPES[subject.dtype], case.generator(index))[0])
    yield from (f"in a call under other settings, {one}" for one in changed)
    if other is not None:
        usual, now = ({n for n, t in one.adapted.tensors().items() if t.requires_grad} for one in (subject, other))
        lost = sorted(usual - now)
        yield from (f"{name} does not train if gradients are off when it is attached" for name in lost)


def _by_default_dtype(subject: Subject, case: Case) -> Iterator[str]:
    """Yield a message for each tensor that depends on torch's default dtype at the time of attaching.

    The tensors of `state()` are compared, and the dtypes of the tensors that train. A tensor from an SVD of the weight is
    not compared, because a randomised SVD may depend on the default dtype.
    """
    from_weight = method_info(subject.method).spec.start_from_weight
    usual = {name: t for name, t in subject.state().items() if name.rpartition(".")[2] not in from_weight}
    unusual = torch.float64 if subject.dtype == "bfloat16" else torch.bfloat16
    for dtype in (torch.float64, torch.bfloat16) if usual else (unusual,):
        with process_settings.restored():
            torch.set_default_dtype(dtype)
            other = case.attach_again()
        state, trained = ({}, {}) if other is None else (other.state(), other.adapted.tensors())
        odd = [n for n, t in usual.items() if n in state and not unchanged({n: state[n]}, {n: t}).passed]
        odd += [n for n, t in subject.adapted.tensors().items() if n in trained and trained[n].dtype != t.dtype]
        yield from (f"{name} differs if torch's default dtype is {dtype} when the adapter is attached" for name in odd)


def _use(subject: Subject | None, case: Case) -> None:
    """Run every layer of a freshly attached subject forward and backward, in training mode and in eval mode.

    Afterwards, merge and unmerge it if possible, and let the model load its own state_dict. Then take a step with the
    Method's optimizer, if it has one, and call `after_step`.
    """
    if subject is None:
        return
    adapted = subject.adapted
    for index, (path, layer) in enumerate(subject.adapted.layers.items()):
        x, dy = inputs(subject.original_base(path), case.tokens, DTYPES[subject.dtype], case.generator(index))
        for training in (True, False):
            observe(layer, subject.tensors_of(path), x, dy, training=training)
    if adapted.can_merge:
        adapted.merge()
        adapted.unmerge()
    # bitsandbytes' packed layers load no state_dict.
    if not subject.packed and not any(map(is_packed, adapted.layers.values())):
        subject.model.load_state_dict(subject.model.state_dict())
    optimizer = adapted.optimizer(0.1, 0.0)
    # GaLore's SVD takes long, so only one layer gets gradients.
    tensors = adapted.parameters() if optimizer is None else subject.tensors_of(next(iter(adapted.layers))).values()
    for number, tensor in enumerate(tensors):
        drawn = normal_noise(tensor.shape, case.generator(number))
        tensor.grad = drawn.to(tensor.device, tensor.dtype)
    if optimizer is not None:
        optimizer.step()
    adapted.after_step(1)
