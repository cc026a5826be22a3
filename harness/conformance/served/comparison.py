"""Compare what a server answered with the reference, and name the mistake behind wrong answers."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from harness.conformance.adapter_files.adapter_file import AdapterFile
from harness.conformance.served import noise, scores
from harness.conformance.served.client import TOKEN_VARIABLE, TOP
from harness.conformance.served.noise import Errors
from harness.conformance.served.report import Finding, PhaseResult, SubjectResult, Verdict
from harness.conformance.served.scores import Score, returned
from harness.conformance.served.session import BASE, Observation, Phase
from harness.conformance.tolerance_constants import SERVED_WEAK
from harness.errors import UsageError

NARROWEST_NOISE_FIRST = ("float32", "float16", "bfloat16")
_EFFECT = 0.125
"""Relative error of the scaling whose effect is computed, to find the smallest one that the check notices."""


@dataclass(frozen=True)
class NoiseFloor:
    """Errors of the base rows."""

    dtype: str
    """Dtype whose rounding errors explain them."""
    measured: Errors | None
    """Errors of the server. None if its base rows are wrong."""


@dataclass(frozen=True)
class Comparison:
    """Facts that all comparisons of a run share."""

    url: str
    base: Path
    adapters: Mapping[str, AdapterFile]
    """Name on the server -> adapter."""

    def noise_floor(self, alone: Sequence[Observation], dtypes: Sequence[str]) -> NoiseFloor:
        """Return the noise floor of the server from its base rows.

        dtypes: dtypes that the server may use, the one with the smallest errors first. Raises UsageError if the base
        rows are neither those of the base nor those of one of the adapters.
        """
        have = [returned(one) for one in alone]
        right = scores.score(self.base, None, alone)
        measured = noise.errors(have, _values(right))
        limits: dict[str, Errors] = {}
        for dtype in dtypes:
            limits[dtype] = self._allowed(None, alone, right, dtype, None)
            if measured.at_most(limits[dtype]):
                return NoiseFloor(dtype, measured)
        for adapter in self.adapters.values():
            other = noise.errors(have, _values(scores.score(self.base, adapter, alone)))
            for dtype in dtypes:
                if other.at_most(limits[dtype]):
                    return NoiseFloor(dtype, None)
        limit = limits[dtypes[-1]]
        raise UsageError(
            f"the base rows are not those of --base-model: log-probabilities differ by up to {measured.largest:.2g} nats "
            f"(root mean square {measured.rms:.2g}), {dtypes[-1]} explains {limit.largest:.2g} ({limit.rms:.2g})",
            where=str(self.base),
            hint="--base-model needs the weights that the server loads; a server with quantised weights, or one that "
            "changes base rows while an adapter is loaded, fails here too",
        )  # fmt: skip

    def judge(self, name: str, observed: Sequence[Observation], floor: NoiseFloor) -> SubjectResult:
        """Return the result of one adapter, or of the base, from all answers that it should have given."""
        adapter = self.adapters[name] if name != BASE else None
        folder = str(adapter.folder if adapter else self.base)
        if not observed:
            return SubjectResult(name, folder, Verdict.NOT_COMPARED, "no request was answered")
        right = scores.score(self.base, adapter, observed)
        limit = self._allowed(adapter, observed, right, floor.dtype, floor.measured)
        wrong = [_is_wrong(one, score, limit) for one, score in zip(observed, right, strict=True)]
        all_errors = noise.errors([returned(one) for one in observed], _values(right))
        notices = None if adapter is None else self._notices(adapter, observed, right, limit)
        phases = tuple(
            _phase_result(
                phase,
                [i for i, one in enumerate(observed) if one.request.phase is phase],
                observed,
                right,
                wrong,
                limit,
            )
            for phase in Phase
            if any(one.request.phase is phase for one in observed)
        )
        finding = None
        verdict = Verdict.CONFORMS
        if any(wrong) or not all_errors.at_most(limit):
            verdict = Verdict.NONCONFORMING
            finding = self._finding(name, observed, right, wrong, limit)
        elif notices is not None and notices > SERVED_WEAK:
            verdict = Verdict.CANNOT_TELL
        return SubjectResult(name, folder, verdict, "", limit, notices, phases, finding)

    def _allowed(
        self,
        adapter: AdapterFile | None,
        observed: Sequence[Observation],
        right: Sequence[Score],
        dtype: str,
        measured: Errors | None,
    ) -> Errors:
        want = _values(right)
        own = noise.errors(_values(scores.score(self.base, adapter, observed, dtype)), want)
        return noise.allowed(own, measured, want, dtype)

    def _notices(
        self, adapter: AdapterFile, observed: Sequence[Observation], right: Sequence[Score], limit: Errors
    ) -> float:
        scaled = scores.score(self.base, scores.rescaled(adapter, 1 + _EFFECT), observed)
        return noise.smallest_noticed(noise.errors(_values(scaled), _values(right)), _EFFECT, limit)

    def _finding(
        self, name: str, observed: Sequence[Observation], right: Sequence[Score], wrong: Sequence[bool], limit: Errors
    ) -> Finding:
        rows = [i for i, bad in enumerate(wrong) if bad] or list(range(len(observed)))
        phases = {
            phase: [sum(wrong[i] for i in of), len(of)]
            for phase in Phase
            if (of := [i for i, one in enumerate(observed) if one.request.phase is phase])
        }
        shown = ", ".join(f"{bad} of {n} answers {phase}" for phase, (bad, n) in phases.items() if bad)
        what = f"wrong: {shown or 'all answers together'}; allowed: {limit.largest:.2g} nats"
        cause = self._cause(name, [observed[i] for i in rows], limit)
        worst = max(rows, key=lambda i: _largest(observed[i], right[i]))
        return Finding(f"{what}; {cause}", _worst_number(observed[worst], right[worst]), self._request(observed[worst]))

    def _cause(self, name: str, wrong: Sequence[Observation], limit: Errors) -> str:
        """Return which mistake explains most of the wrong answers."""
        others = {other: adapter for other, adapter in self.adapters.items() if other != name}
        tried: list[tuple[str, AdapterFile | None]]
        if name == BASE:
            tried = [(f"adapter {other}: base rows get an adapter", adapter) for other, adapter in others.items()]
        else:
            tried = list(scores.mistakes(self.adapters[name], others))
        most, cause = 0, "no typical mistake explains them"
        for text, adapter in tried:
            explained = scores.score(self.base, adapter, wrong)
            count = sum(not _is_wrong(one, score, limit) for one, score in zip(wrong, explained, strict=True))
            if count > most:
                most, cause = count, f"{count} of {len(wrong)} wrong answers are those of {text}"
            if most == len(wrong):
                break
        return cause

    def _request(self, one: Observation) -> str:
        body = {
            "model": one.request.served_as, "prompt": list(one.context), "max_tokens": len(one.positions),
            "temperature": 0, "logprobs": TOP, "return_tokens_as_token_ids": True,
        }  # fmt: skip
        if not one.greedy:
            body |= {"prompt": [*one.context, *one.tokens], "max_tokens": 1, "echo": True}
        token = f'-H "Authorization: Bearer ${TOKEN_VARIABLE}" '
        return (
            f"curl {shlex.quote(self.url + '/v1/completions')} {token}-H 'Content-Type: application/json' "
            f"-d {shlex.quote(json.dumps(body))}"
        )


def _values(several: Sequence[Score]) -> list[tuple[float, ...]]:
    return [one.values for one in several]


def _is_wrong(observation: Observation, right: Score, limit: Errors) -> bool:
    mine = noise.errors([returned(observation)], [right.values])
    return not (
        mine.row_rms <= limit.row_rms
        and mine.largest <= limit.largest
        and not any(observation.greedy and margin > 2 * limit.largest for margin in right.margins)
    )


def _differences(observation: Observation, right: Score) -> list[float]:
    found = [abs(a - b) for a, b in zip(returned(observation), right.values, strict=True)]
    return [math.inf if math.isnan(one) else one for one in found]


def _largest(observation: Observation, right: Score) -> float:
    return max(_differences(observation, right))


def _worst_number(observation: Observation, right: Score) -> str:
    differences = _differences(observation, right)
    worst = differences.index(max(differences))
    places = [(i, token) for i, one in enumerate(observation.positions) for token in (one.token, *one.others)]
    position, token = places[worst]
    return (
        f"{observation.request.phase}, prompt {observation.request.prompt}, position {position}, token {token}: "
        f"{returned(observation)[worst]:.6f} nats, should be {right.values[worst]:.6f}"
    )


def _phase_result(
    phase: Phase,
    rows: Sequence[int],
    observed: Sequence[Observation],
    right: Sequence[Score],
    wrong: Sequence[bool],
    limit: Errors,
) -> PhaseResult:
    differences = [one for i in rows for one in _differences(observed[i], right[i])]
    own = [
        abs((position.logprob if position.logprob is not None else math.nan) - want)
        for i in rows
        for position, want in zip(observed[i].positions, _own(observed[i], right[i]), strict=True)
    ]
    margins = [
        margin
        for i in rows
        if observed[i].greedy
        for token, best, margin in zip(observed[i].tokens, right[i].best, right[i].margins, strict=True)
        if token != best
    ]
    differ = sum(margin > 2 * limit.largest for margin in margins)
    return PhaseResult(
        phase,
        len(rows),
        sum(wrong[i] for i in rows),
        max(differences),
        sum(differences) / len(differences),
        sum(_exp(one) for one in own) / len(own),
        len(own),
        differ,
        len(margins) - differ,
        max(margins, default=0.0),
    )


def _own(observation: Observation, right: Score) -> list[float]:
    """Return the reference's log-probability of the token at each position."""
    found, start = [], 0
    for one in observation.positions:
        found.append(right.values[start])
        start += 1 + len(one.others)
    return found


def _exp(number: float) -> float:
    return math.exp(min(number, 700.0)) if not math.isnan(number) else math.inf
