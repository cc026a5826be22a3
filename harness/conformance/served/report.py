"""Results of `check --served`: metrics, verdicts, findings, exit code and JSON document. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

from harness.conformance.served.noise import Errors
from harness.conformance.served.session import RequestPhase
from harness.errors import Exit


class SubjectVerdict(StrEnum):
    """Judgement of one adapter, or of the base."""

    CONFORMS = "conforms"
    NONCONFORMING = "nonconforming"
    CANNOT_TELL = "cannot tell"
    """The adapter changes the log-probabilities too little to distinguish a wrong scaling from a right one."""
    NOT_COMPARED = "not compared"


@dataclass(frozen=True)
class PhaseResult:
    """Metrics of the answers for one adapter, or for the base, in one phase of the check (see `session.RequestPhase`)."""

    phase: RequestPhase
    requests: int
    wrong: int
    """Number of wrong requests: those with an error above the allowed error, with a token that is not the most likely
    one, or without an answer because the server failed (status 500)."""
    largest: float
    """Largest difference of a log-probability from the reference, in nats."""
    mean: float
    """Mean absolute difference of the log-probabilities, in nats."""
    mean_exp: float
    """Mean of exp(d) over all tokens, where d is the absolute difference of a token's own log-probability from the
    reference. It is 1 if there is no difference."""
    tokens: int
    """Number of tokens in the answers: generated ones or, in the phase `echo`, those of the prompts."""
    differ: int
    """Number of generated tokens that are not the reference's most likely token, without those in `ties`."""
    ties: int
    """Number of generated tokens that are not the reference's most likely token, but nearly as likely: within twice the
    allowed error, in nats, so that rounding may decide."""
    margin: float
    """Largest amount, in nats, by which the reference's log-probability of its most likely token exceeds that of a
    different token from the server. 0 if no token differs."""


@dataclass(frozen=True)
class SubjectFinding:
    """The evidence that one adapter, or the base, does not conform."""

    cause: str
    """Text about failed requests, the mistake that explains wrong answers, and the lengths of prompts with wrong answers.
    A part that does not apply is left out."""
    worst: str
    """Text about one token of the worst answer: phase, prompt and position, its log-probability in nats, and the right
    log-probability. If all log-probabilities are right, but a generated token is not the most likely one, the text names
    the more likely token instead. If requests failed and no answer is wrong, it is the error of the first failed request."""
    request: str
    """A curl command that repeats the request of `worst`. It first sends a request to another adapter if the requests
    that were sent alone show no error."""


@dataclass(frozen=True)
class SubjectResult:
    """Result of one adapter, or of the base."""

    name: str
    """Name of the adapter on the server. Empty for the base."""
    folder: str
    """Folder of the adapter, or of the base."""
    verdict: SubjectVerdict
    reason: str = ""
    """Reason why nothing was compared. Otherwise empty."""
    allowed: Errors | None = None
    """Largest errors that a right server may have."""
    notices: float | None = None
    """Smallest relative error of the scaling that the check would notice. None for the base."""
    phases: tuple[PhaseResult, ...] = ()
    finding: SubjectFinding | None = None


@dataclass(frozen=True)
class ServedReport:
    """Findings of one run of `check --served`."""

    url: str
    dtype: str
    """Dtype whose rounding errors explain the errors of the server's answers for the base model."""
    subjects: Sequence[SubjectResult]
    """The base first, then the adapters."""
    not_offered: Mapping[str, str] = field(default_factory=dict)
    """Feature of servers, such as `hot-swap` -> reason why this server does not offer it."""
    findings: Sequence[str] = ()
    """Mistakes of the server that do not concern a single adapter, as sentences."""
    stopped: str = ""
    """Error that ended the requests early. Empty if all requests were answered."""
    stopped_exit: Exit = Exit.INFRASTRUCTURE
    """Exit code of the error in `stopped`."""
    notes: Sequence[str] = ()
    """Messages in addition to the results, e.g. that an adapter is still loaded."""
    software: Mapping[str, str] = field(default_factory=dict)
    """Library -> version."""

    @property
    def exit(self) -> Exit:
        """The exit code. The first of these rules that applies decides.

        `stopped_exit`: the requests ended early. 1: an adapter or the base does not conform, or `findings` has a
        mistake. 5: an adapter or the base was not compared. 3: an adapter changes too little to be judged. 0:
        otherwise.
        """
        verdicts = [one.verdict for one in self.subjects]
        if self.stopped:
            return self.stopped_exit
        if SubjectVerdict.NONCONFORMING in verdicts or self.findings:
            return Exit.FAIL
        if SubjectVerdict.NOT_COMPARED in verdicts:
            return Exit.NOTHING_COMPARED
        return Exit.INCONCLUSIVE if SubjectVerdict.CANNOT_TELL in verdicts else Exit.PASS

    def document(self) -> dict[str, object]:
        """Return the document that `--json` prints."""
        served = {
            "url": self.url, "dtype": self.dtype, "subjects": [_finite(asdict(one)) for one in self.subjects],
            "not_offered": dict(self.not_offered), "findings": list(self.findings), "stopped": self.stopped,
            "notes": list(self.notes),
        }  # fmt: skip
        return {"schema": 2, "exit": int(self.exit), "software": dict(self.software), "served": served}


def _finite(value: Any) -> Any:
    """Copy a JSON document, with null in place of NaN and infinity, which JSON cannot represent."""
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
