"""Trial of one mutant: run checks until one fails.

The trial runs the checks of the targets (Methods, Operations and quantised bases) whose code calls the changed
function. Every trial runs in its own forked process, because a mutant may hang, crash or change the process.
"""

from __future__ import annotations

import builtins
import importlib
import importlib.util
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import FrameType, ModuleType
from typing import Literal

import torch

from harness.conformance import parity_suite, self_test
from harness.conformance.case_selection import CaseSelection
from harness.conformance.drawing import sample
from harness.conformance.execution import suite_run
from harness.conformance.faults.patched_copy import PatchedCopy
from harness.conformance.findings.outcomes import CheckOutcome, CheckStatus, Execution
from harness.conformance.mutants import difference
from harness.conformance.mutants.mutant import Mutant
from harness.methods.implementations import fused
from harness.methods.registry import Implementation

Owner = Literal["reference", "fused"]
"""Owner of a module with mutants: the reference, or the implementation `fused`."""
_CODE = {"reference": ("reference.",), "fused": ("harness.kernels.torch.", f"{fused.methods.__name__}.")}
PROBE = "_mutant_is_reached"
"""Name of a function in `builtins` that exists only in the process of a trial. A mutant calls this function just before
the changed statement runs."""
_REACHED = "_mutant_was_reached"
"""Name of an attribute of `builtins` in the process of a trial. It is True once the changed statement has run."""
_MUTANT = "_mutant_name"
"""Name of an attribute of a changed module. Its value is the name of the mutant."""
DEFAULT, WIDE = "default", "wide"


class AlreadyImportedError(RuntimeError):
    """The original module was imported before its mutant, so the checks would try the original."""


@dataclass(frozen=True)
class Catch:
    """The check that caught a mutant."""

    form: str
    """Run of `check` that catches the mutant: `default` for plain `check`, or `wide` for `check --wide`."""
    check: str
    """Name of the check that failed, or `import: ` and the exception if the mutant could not be imported."""
    raised: bool
    """True if the mutant raised an exception. False if a check found a wrong result."""


def owner(module: str) -> Owner:
    """Return `reference` for a module of the reference, and `fused` for every other module."""
    return "reference" if module.startswith("reference.") else "fused"


def implementation(target: str, of: Owner, mutant: Mutant | None) -> Implementation:
    """Return an implementation of a target with the mutant's change, or without any change if `mutant` is None.

    of: `reference` for a copy of the reference, `fused` for the implementation `fused` itself. A process can try only
    one mutant of `fused`, because the changed module stays imported.
    """
    torch.set_num_threads(1)  # remakes torch's pool in this fork; two threads that did so at once would raise
    if of == "reference":
        copy = PatchedCopy(self_test.source_module(target))
        if mutant is not None:
            copy.replace_source(mutant.module, mutant.source(PROBE))
        return self_test.implementation(target, copy)
    if mutant is not None:
        _import_changed(mutant)
    return next(one for one in fused.implementations() if one.target == target)


def targets(of: Owner) -> list[str]:
    """List the Methods, Operations and quantised bases of the reference or of `fused` that have a parity suite."""
    if of == "reference":
        return [name for name in parity_suite.names() if parity_suite.kind_of(name) != "loader"]
    return [one.target for one in fused.implementations() if one.target in parity_suite.names()]


def called_functions(target: str, of: Owner) -> set[tuple[str, str]]:
    """Return the functions that a Method, Operation or quantised base calls in the float32 cases of the wide sample.

    Each function is a pair (module, qualified name). A nested function has the name of the outermost function around
    it. Code at module level has an empty name.
    """
    called: set[tuple[str, str]] = set()
    inside = _CODE[of]

    def trace(frame: FrameType, event: str, _: object) -> None:
        module = frame.f_globals.get("__name__", "")
        if event == "call" and isinstance(module, str) and module.startswith(inside):
            name = frame.f_code.co_qualname
            called.add((module, "" if name == "<module>" else name.split(".<locals>")[0]))

    sys.setprofile(trace)
    try:
        plan, traced = parity_suite.load_plan(target), implementation(target, of, None)
        for case in sample.fixed(plan, CaseSelection(wide=True), ["float32"]):
            difference.digest(traced, plan, case)
    finally:
        sys.setprofile(None)
    return called


def outcomes(of: Implementation, form: str) -> Iterator[CheckOutcome]:
    """Run every check on this implementation, and yield the outcomes.

    form: `default` for the cases that plain `check` tries, `wide` for the cases of `check --wide`.
    """
    plan = parity_suite.load_plan(of.target)
    wanted = CaseSelection(wide=form == WIDE)
    for case in sample.fixed(plan, wanted, of.dtypes):
        yield from suite_run.run_case(of, plan, case, wide=wanted.is_wide)


def caught(mutant: Mutant, targets: Iterable[str], form: str) -> Catch | None:
    """Run the checks of the targets on the mutant until one fails, and return the Catch. Return None if no check fails.

    form: `default` or `wide`, as in `Catch.form`. Call this in a fork in which no other mutant was tried.
    """
    try:
        made = [_changed(target, mutant) for target in targets]
    except AlreadyImportedError:
        raise
    except Exception as error:  # noqa: BLE001  # the changed module may raise anything while it is imported
        return Catch(form, f"import: {type(error).__name__}", True)
    for one in made:
        for outcome in outcomes(one, form):
            if outcome.status is CheckStatus.FAIL:
                return Catch(form, outcome.check, outcome.execution is Execution.RAISED)
    return None


def digests(target: str, of: Owner, mutant: Mutant | None) -> list[str]:
    """Return one digest per random case, of the results of the mutant, or of the original if `mutant` is None.

    Call this in a fork of its own. Earlier code in a process decides where buffers lie in memory, and this changes the
    last bit of matrix products.
    """
    return difference.digests(implementation(target, of, None) if mutant is None else _changed(target, mutant))


def is_reached() -> bool:
    """Return whether this process has run the changed statement."""
    return bool(getattr(builtins, _REACHED, False))


def _changed(target: str, mutant: Mutant) -> Implementation:
    setattr(builtins, _REACHED, is_reached() or mutant.probe[0] < 0)
    setattr(builtins, PROBE, lambda: setattr(builtins, _REACHED, True))
    return implementation(target, owner(mutant.module), mutant)


def _import_changed(mutant: Mutant) -> None:
    """Import the changed source under the module's name.

    Raises AlreadyImportedError if the original is already imported.
    """
    there = sys.modules.get(mutant.module)
    if there is not None and getattr(there, _MUTANT, None) == mutant.name:
        return
    if there is not None:
        raise AlreadyImportedError(f"{mutant.module} was imported before its mutant, which would not be tried")
    spec = importlib.util.find_spec(mutant.module)
    assert spec is not None  # noqa: S101
    module: ModuleType = importlib.util.module_from_spec(spec)
    setattr(module, _MUTANT, mutant.name)
    sys.modules[mutant.module] = module
    exec(compile(mutant.source(PROBE), spec.origin or mutant.module, "exec"), vars(module))  # noqa: S102  # our own source
    package, _, name = mutant.module.rpartition(".")
    setattr(importlib.import_module(package), name, module)
