"""Compare a server's answers with the reference: noise floor, verdict and evidence."""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.conformance.adapter_files.adapter_file import AdapterFile
from harness.conformance.served import causes, noise
from harness.conformance.served.client import TOKEN_VARIABLE
from harness.conformance.served.noise import Errors
from harness.conformance.served.report import SubjectFinding, SubjectResult, SubjectVerdict
from harness.conformance.served.rows import ScoredAnswer, distances, measure, of_phase
from harness.conformance.served.scores import score
from harness.conformance.served.session import BASE, FailedRequest, Request, RequestPhase, ServedAnswer
from harness.conformance.tolerance_constants import SERVED_WEAK
from harness.errors import UsageError, plural

_LONG = 64
"""Number of tokens of a request that only keeps the server busy while another request is sent."""
_EFFECT = 0.125
"""Relative error of a simulated wrong scaling. From its effect follows the smallest error that the check would notice."""


@dataclass(frozen=True)
class NoiseFloor:
    """Errors of the server's answers for the base model. They decide how large errors of adapters may be."""

    dtype: str
    """Dtype whose rounding errors explain the errors of the answers for the base model."""
    measured: Errors | None
    """Errors of the answers for the base model. None if these answers are wrong: all have NaN, or an adapter gave them."""


@dataclass(frozen=True)
class AnswerComparison:
    """Compares the answers of one server with the reference."""

    url: str
    base: Path
    adapters: Mapping[str, AdapterFile]
    """Name on the server -> adapter."""
    body_of: Callable[[Request, int], dict[str, Any]]
    """Function (request, tokens) that returns the body to send a request again. tokens: number of tokens to generate; 0
    for as many as the first time."""

    def noise_floor(self, alone: Sequence[ServedAnswer], dtypes: Sequence[str]) -> NoiseFloor:
        """Return the noise floor of the server.

        alone: the answers for the base model. Answers with NaN are left out, because no dtype explains them. dtypes:
        dtypes that the server may use, the one with the smallest rounding errors first. Raises UsageError if the
        answers fit neither the base nor one of the adapters.
        """
        alone = [one for one in alone if not one.missing]
        if not alone:
            return NoiseFloor(dtypes[-1], None)
        rows = self._rows(None, alone)
        measured = noise.errors([row.flat for row in rows])
        limits: dict[str, Errors] = {}
        for dtype in dtypes:
            limits[dtype] = self._allowed(None, rows, NoiseFloor(dtype, None))
            if measured.at_most(limits[dtype]):
                return NoiseFloor(dtype, measured)
        for adapter in self.adapters.values():
            errors = noise.errors([row.flat for row in self._rows(adapter, alone)])
            for dtype, limit in limits.items():
                if errors.at_most(limit):
                    return NoiseFloor(dtype, None)
        raise UsageError(
            f"the server does not answer as this base model: log-probabilities differ by up to {measured.largest:.2g} "
            f"nats, and {dtypes[-1]} explains {limits[dtypes[-1]].largest:.2g}",
            where=f"--base-model {self.base}",
            hint="give the weights that the server loads; quantised weights, or a server that changes base rows while "
            "an adapter is loaded, fail here too",
        )  # fmt: skip

    def judge(
        self, name: str, every: Sequence[ServedAnswer], floor: NoiseFloor, failures: Sequence[FailedRequest] = ()
    ) -> SubjectResult:
        """Return the result of the adapter `name`, or of the base if `name` is BASE.

        every: the answers of all adapters and of the base. failures: the requests that the server failed to answer.
        """
        observed = [one for one in every if one.request.subject == name]
        failed = [one for one in failures if one.request.subject == name]
        adapter = self.adapters[name] if name != BASE else None
        folder = str(adapter.folder if adapter else self.base)
        if not observed:
            verdict = SubjectVerdict.NONCONFORMING if failed else SubjectVerdict.NOT_COMPARED
            return SubjectResult(name, folder, verdict, failed[0].what if failed else "no request was answered")
        rows = self._rows(adapter, observed)
        limit = self._allowed(adapter, rows, floor)
        notices = None if adapter is None else self._notices(adapter, rows, limit)
        counts = Counter(one.request.phase for one in failed)
        phases = tuple(
            measure(phase, some, limit, counts[phase])
            for phase in RequestPhase
            if (some := of_phase(rows, phase)) or counts[phase]
        )
        # If no single answer is wrong, all of them together may be.
        if (
            failed
            or any(row.is_wrong(limit) for row in rows)
            or not noise.errors([r.flat for r in rows]).at_most(limit)
        ):
            finding = self._finding(name, rows, failed, limit, every)
            return SubjectResult(name, folder, SubjectVerdict.NONCONFORMING, "", limit, notices, phases, finding)
        weak = notices is not None and notices > SERVED_WEAK
        return SubjectResult(
            name, folder, SubjectVerdict.CANNOT_TELL if weak else SubjectVerdict.CONFORMS, "", limit, notices, phases
        )

    def _rows(self, adapter: AdapterFile | None, observed: Sequence[ServedAnswer]) -> list[ScoredAnswer]:
        return [ScoredAnswer(*pair) for pair in zip(observed, score(self.base, adapter, observed), strict=True)]

    def _allowed(self, adapter: AdapterFile | None, rows: Sequence[ScoredAnswer], floor: NoiseFloor) -> Errors:
        rounded = score(self.base, adapter, [row.observation for row in rows], floor.dtype)
        own = noise.errors(distances(rounded, [row.score for row in rows]))
        return noise.allowed(own, floor.measured, [_numbers(row) for row in rows], floor.dtype)

    def _notices(self, adapter: AdapterFile, rows: Sequence[ScoredAnswer], limit: Errors) -> float:
        """Return the smallest relative error of the adapter's scaling that the check would notice."""
        scaled = score(self.base, causes.rescaled(adapter, 1 + _EFFECT), [row.observation for row in rows])
        effect = noise.errors(distances(scaled, [row.score for row in rows]))
        return noise.smallest_noticed(effect, _EFFECT, limit)

    def _finding(
        self,
        name: str,
        rows: Sequence[ScoredAnswer],
        failed: Sequence[FailedRequest],
        limit: Errors,
        every: Sequence[ServedAnswer],
    ) -> SubjectFinding:
        """Return the evidence that an adapter, or the base, does not conform.

        rows: the answers for `name`. If no single answer is wrong and no request failed, the errors of all answers
        together are too large.
        """
        company = next((one for one in every if one.request.subject not in (BASE, name)), None)
        others = {other: adapter for other, adapter in self.adapters.items() if other != name}
        wrong = [row for row in rows if row.is_wrong(limit)] or ([] if failed else rows)
        found = [_failures(failed)] if failed else []
        if wrong:
            found.append(causes.cause(self.base, self.adapters.get(name), others, wrong, limit))
        found += _lengths([row.observation for row in rows], [row.observation for row in wrong], failed)
        if wrong:
            worst = max(wrong, key=lambda row: (max(row.flat) > limit.largest, max(row.score.margins), max(row.flat)))
            text, request = _worst(worst, limit), worst.observation.request
        else:
            text, request = _failures(failed[:1]), failed[0].request
        command = self._command(request)
        phases = {row.observation.request.phase for row in wrong} | {one.request.phase for one in failed}
        if company is not None and RequestPhase.ALONE not in phases:
            command = f"{self._command(company.request, tokens=_LONG)} & sleep 1; {command}"  # wrong only beside others
        return SubjectFinding("; ".join(found), text, command)

    def _command(self, one: Request, tokens: int = 0) -> str:
        """Return a curl command that sends a request again. tokens: number of tokens to generate; 0 for as many as
        before.
        """
        body = self.body_of(one, tokens)
        headers = f"""-H "Authorization: Bearer ${TOKEN_VARIABLE}" -H 'Content-Type: application/json'"""
        return f"curl {shlex.quote(self.url + '/v1/completions')} {headers} -d {shlex.quote(json.dumps(body))}"


def _numbers(row: ScoredAnswer) -> list[float]:
    return [one for several in row.score.values for one in several]


def _failures(failed: Sequence[FailedRequest]) -> str:
    """Return a text about requests that the server failed to answer."""
    return (
        f"{plural(len(failed), 'request')} failed: {failed[0].what}; many servers fail so if a log-probability is NaN"
    )


def _lengths(
    every: Sequence[ServedAnswer], wrong: Sequence[ServedAnswer], failed: Sequence[FailedRequest]
) -> list[str]:
    """Return a list with one sentence if all wrong answers have longer prompts than all right ones, otherwise []."""
    # An answer with `echo` begins after the first token, so its context is not the prompt.
    asked: list[ServedAnswer | FailedRequest] = [*every, *failed]
    asked = [one for one in asked if one.request.phase is not RequestPhase.ECHO]
    bad = {len(one.context) for one in asked if one in wrong or one in failed}
    right = {len(one.context) for one in asked if one not in wrong and one not in failed}
    if not right or not bad or max(right) >= min(bad):
        return []
    return [f"prompts of at most {max(right)} tokens have right answers, those of {min(bad)} tokens or more have not"]


def _worst(row: ScoredAnswer, limit: Errors) -> str:
    """Return a text about the worst token of an answer."""
    observation = row.observation
    place = f"{observation.request.phase.value}, prompt {observation.request.prompt}, position"
    if not row.inaccurate(limit) and (unlikely := row.unlikely(limit)):
        i = max(unlikely, key=lambda i: row.score.margins[i])
        likely = f"token {row.score.best[i]} is more likely by {row.score.margins[i]:.3g} nats"
        return f"{place} {i}: token {observation.tokens[i]}, but {likely}"
    position = max(range(len(row.differences)), key=lambda i: max(row.differences[i]))
    several = row.differences[position]
    index, one = several.index(max(several)), observation.positions[position]
    token = (one.token, *one.others)[index]
    want = row.score.values[position][index]
    return f"{place} {position}, token {token}: {one.values[index]:.6f} nats, should be {want:.6f}"
