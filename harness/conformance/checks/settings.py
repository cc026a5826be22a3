"""Check of process-wide settings."""

from __future__ import annotations

from harness.conformance import process_settings
from harness.conformance.case import Case
from harness.conformance.checks import States, check
from harness.conformance.comparison.check_results import listed, skipped
from harness.conformance.comparison.inputs import inputs
from harness.conformance.comparison.observations import observe
from harness.conformance.operation import OperationSubject
from harness.conformance.subject import DTYPES, Subject
from harness.records.record import CheckResult


@check(States.INIT, of_sizes=False)
def check_settings(subject: Subject | OperationSubject, case: Case) -> CheckResult:
    """Attaching and computing change no process-wide setting, and seed no random numbers.

    Settings are torch's default dtype and device, gradient mode, threads, determinism, precision and autocast. Random
    numbers are torch's, numpy's and Python's: drawing them is allowed; seeding is not, because code that runs later
    would depend on it.
    """
    if isinstance(subject, OperationSubject):
        with process_settings.restored() as changed:
            seeded = process_settings.find_seeding(subject.call)
        return listed(subject, case, "settings", [*changed, *seeded])
    if case.fresh is None:
        return skipped(subject, case, "settings", "the case cannot attach again")
    with process_settings.restored() as changed:
        seeded = process_settings.find_seeding(lambda: _use(case.attach_again(), case))
    return listed(subject, case, "settings", [*subject.disturbed, *changed, *seeded])


def _use(subject: Subject | None, case: Case) -> None:
    """Run every layer of a freshly attached subject forward and backward, in training mode and in eval mode.

    Then merge and unmerge the subject.
    """
    if subject is None:
        return
    for index, (path, layer) in enumerate(subject.adapted.layers.items()):
        x, dy = inputs(subject.original_base(path), case.tokens, DTYPES[subject.dtype], case.generator(index))
        for training in (True, False):
            observe(layer, subject.tensors_of(path), x, dy, training=training)
    if subject.adapted.can_merge:
        subject.adapted.merge()
        subject.adapted.unmerge()
