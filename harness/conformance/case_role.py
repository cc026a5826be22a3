"""Role of a case: why `check` tries it, and so which checks it tries. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Dtype = Literal["float64", "float32", "bfloat16", "float16"]


@dataclass(frozen=True, kw_only=True)
class CaseRole:
    """Origin of a case, and which checks it tries. A loader's case has none of these roles, except `typical`."""

    sampled: bool = False
    """True if `harness.conformance.drawing.sample` made the case by varying sizes and settings. It tries only the checks
    that depend on these, and checks of a Method only in the suite's last state, where they notice most."""
    drawn: bool = False
    """True if Hypothesis drew the case."""
    typical: bool = False
    """True for the suite's typical case: the most ordinary one. Without `--wide`, some long checks run only in this case."""
    representative: bool = False
    """True for the first case of each kind of layer, for the first of a linear layer or an Operation in 16 and in 32 bits,
    and for the first of an Operation with each value of a switch, unless the typical case is like that."""
    minor: bool = False
    """True for every other example of a suite, and for cases that only the check `dropout` tries. Without `--wide`,
    some checks leave it out, and those of a Method run only in the suite's last state."""
    is_brief: bool = False
    """True if the case tries fewer checks (`suite_run.run_case`)."""
    stays_brief: bool = False
    """True if the case is brief also when the selection is wide: a tensor is so large that `calls` would take a minute."""
    checks: tuple[str, ...] = ()
    """Names of the only checks to run. If empty, all checks of the suite run."""
    is_large: bool = False
    """True if a tensor is very large."""
    first: CaseRole | None = None
    """The suite's typical case, in which the checks run that must precede all others (`Check.calls_first`). None except in
    the first case of an Operation."""
