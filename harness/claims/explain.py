"""What `explain` says of claims: how a file of them is written, and each measure, verdict and claim. No torch."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

from harness.claims import claim_file
from harness.claims.claim import Claim
from harness.claims.judge import MEANING, plain
from harness.claims.measure import Measure, measures
from harness.claims.printed_number import RULES, UNITS

FORM = """\
A claim file is YAML. `peft-harness claims --file mine.yaml` computes it; suites/claims/ has those of the papers.

  paper: mine                        # one word
  title: "The Paper's Title"
  version: arXiv:2401.00001v2        # which version was read
  claims:
    - id: mine-params
      sentence: With rank {rank}, LLaMA-7B trains {printed} of its parameters.
      source: Table 3
      tier: exact                    # or gpu-synthetic, trained: these need the Records of a run
      printed: 0.12%                 # as printed: digits and unit
      measure: trainable_share       # `peft-harness list measures`; `explain MEASURE` has its arguments
      with: {model: llama-7b, method: lora, config: {rank: 8, targets: [q_proj, v_proj, up_proj]}}
      rounding: nearest              # or cut, magnitude, {about: 5%}: `explain rounding`
      otherwise:                     # other readings, tried where this one does not come out
        - {under: "of base and adapter together", with: {of: base+adapter}}
      headline: few parameters       # which of the paper's headlines it is part of, for `claims --headlines`
      needs: the text's length       # what the paper leaves out, if it cannot be decided
      note: what is known of the difference
    - id: mine-table                 # a table: its rows share what they do not say themselves
      sentence: "{printed} are {rank} ranks of q."
      source: Table 4
      tier: exact
      measure: trainable_parameters
      with: {model: llama-7b, method: lora}
      rows:                          # claims mine-table-r4 and mine-table-r8
        - {id: r4, printed: 1.0M, with: {config: {rank: 4, targets: [q_proj]}}}
        - {id: r8, printed: 2.1M, with: {config: {rank: 8, targets: [q_proj]}}}

An argument that is a quantity is a number that the paper prints, or {measure: NAME, with: {...}}.
Mistakes of a file are told at once, each with its line, and nothing is computed. Only what shows on the model itself, such
as a layer's name in `targets` that it does not have, is told when the claim is computed, with its line: the claim is
`not-run` and the exit code 4. All other claims are computed."""

ROUNDING = {
    "nearest": "ours rounds to the figure as it is printed: it is away by half of one in its last digit at most. Where "
    "nothing else is said, this is the rule. Where ours comes out only with digits cut off, or with MB read as MiB, the "
    "claim is `reproduced-under` that",
    "cut": f"{RULES['cut']}: ours is less than one in the last digit above the figure",
    "magnitude": f"{RULES['magnitude']} on the scale of logarithms: 10x is from 3.2x to 31x. For what a paper itself tells "
    "by powers of ten",
    "{about: 5%}": "within that share of the figure, on either side. For what is measured, and for a figure that the paper "
    "tells in passing",
}
"""Each `rounding` of a claim. The looser three never show in a verdict alone: the rule stands beside ours."""


def topics() -> Iterator[tuple[str, Callable[[], str]]]:
    """Yield what can be explained, and the text."""
    yield "claims", lambda: FORM
    for verdict, text in MEANING.items():
        yield verdict.value, partial(_titled, f"verdict {verdict.value}", [f"{text}."])
    yield (
        "rounding",
        partial(_titled, "rounding of a claim, by which a number comes out as the printed figure", _rules()),
    )
    for name, measure in measures().items():
        yield name, partial(_measure, measure)
    for claim in claim_file.load(claim_file.paths(claim_file.names())):
        yield claim.id, partial(_claim, claim)


def _rules() -> list[str]:
    told = [f"{rule}: {text}." for rule, text in ROUNDING.items()]
    return [*told, "Of any but `nearest` the ledger says the rule beside ours: `(rule: within 5% of what is printed)`."]


def _titled(title: str, lines: Iterable[str]) -> str:
    wrapped = [part for one in lines for part in textwrap.wrap(one, 100, subsequent_indent="  ")]
    return f"{title}\n{textwrap.indent(chr(10).join(wrapped), '  ')}"


def _measure(measure: Measure) -> str:
    lines = [measure.about, "", f"in: {measure.dimension}{_units(measure)}", "with:"]
    for key, parameter in inspect.signature(measure.function).parameters.items():
        needed = parameter.default is inspect.Parameter.empty
        lines.append(f"  {key}: {parameter.annotation}{'' if needed else f', default {parameter.default!r}'}")
    return f"measure {measure.name}\n{textwrap.indent(chr(10).join(lines), '  ')}"


def _units(measure: Measure) -> str:
    units = [unit for unit in UNITS[measure.dimension] if unit]
    return f" ({', '.join(units)})" if units else ""


def _claim(claim: Claim) -> str:
    lines = [
        claim.sentence,
        f"source: {claim.version}, {claim.source}",
        f"printed: {claim.printed}",
        *([f"rule: {claim.rule}"] if claim.rule else []),
        f"tier: {claim.tier}",
        *_asked("measured by", plain(claim.asking)),
        *(line for one in claim.otherwise for line in _asked(f"or, under: {one.under}", plain(one.asking))),
        *([claim.note] if claim.note else []),
        f"written in: {claim.where}",
        "to compute it:",
        f"  peft-harness claims {claim.paper} --id {claim.id}",
    ]
    return f"claim {claim.id}\n{textwrap.indent(chr(10).join(lines), '  ')}"


def _asked(title: str, asked: dict[str, Any]) -> list[str]:
    return [f"{title}: {asked['measure']}", *(f"  {key}: {value}" for key, value in asked["with"].items())]
