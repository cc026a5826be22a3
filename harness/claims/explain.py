"""Texts of the command `explain` about claims. Imports no torch.

The topics are: the form of a claim file, the rules of rounding, each measure, each verdict and each claim.
"""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

from harness.claims import claim_file
from harness.claims.claim import Claim
from harness.claims.judge import MEANING, plain
from harness.claims.measure import Measure, measures
from harness.claims.printed_number import RULES, UNITS, Rounding
from harness.console import visible

_EXAMPLE = Path(__file__).with_name("example.yaml")
_ID = re.compile(r"^( *)(?:- )?(?:\{<<: \*\w+, )?\{?id: *([\w.-]+)", re.MULTILINE)
_CLAIM_INDENT = 4
"""Largest indentation of a claim in a claim file. The rows of a table are indented more."""
_FORM = """\
A claim file is YAML. `peft-harness claims --file mine.yaml` computes it; suites/claims/ has those of the papers.

{example}
An argument that is a quantity is a number that the paper prints, or {{measure: NAME, with: {{...}}}}.
All mistakes in a file are reported together, each with its line, and nothing is computed. A mistake that only the model
shows, such as an unknown layer in `targets`, is reported when the claim is computed: this claim is `not-run`, the exit code
is 4, and all other claims are computed."""

ROUNDING = {
    "nearest": "the default: our result rounds to the printed figure, so it differs by at most half a unit of the last "
    "digit. If it agrees only with digits cut off, or with MB read as MiB, the claim is `reproduced-under` that reading, "
    "or `reproduced-mixed` if it differs from its table's convention",
    "cut": f"{RULES['cut']}: our result exceeds the figure by less than a unit of the last digit",
    "magnitude": f"{RULES['magnitude']} on a logarithmic scale: 10x is from 3.2x to 31x. For figures that the paper "
    "gives as powers of ten",
    "{about: 5%}": "within that share of the figure, on either side. For measurements, and for figures that the paper "
    "mentions in passing",
}
"""Value of a claim's key `rounding` -> explanation of this rule. If a claim has another rule than `nearest`, every
report shows the rule next to our result."""


def topics() -> Iterator[tuple[str, Callable[[], str]]]:
    """Yield the name of each topic other than a claim, with a function that returns its text."""
    yield "claims", lambda: _FORM.format(example=textwrap.indent(_EXAMPLE.read_text(encoding="utf-8"), "  "))
    for verdict, text in MEANING.items():
        yield verdict.value, partial(_titled, f"verdict {verdict.value}", [f"{text}."])
    yield "rounding", partial(_titled, "rounding: the rule by which a result agrees with a printed figure", _rules())
    for name, measure in measures().items():
        yield name, partial(_measure, measure)


def claims(wanted: str) -> Iterator[tuple[str, Callable[[], str]]]:
    """Yield the claims of each file that has a claim called `wanted`, with a function that returns the text of the claim.

    Other files are not read, since the YAML reader is slow. wanted: an id in lower case.
    """
    if files := [file for file, ids in _ids().items() if wanted in map(str.lower, ids)]:
        for claim in claim_file.load(files):
            yield claim.id, partial(_claim, claim)


def claim_ids() -> set[str]:
    """Return the ids of all claims, and of tables of claims."""
    return {one for ids in _ids().values() for one in ids}


def _ids() -> dict[Path, list[str]]:
    """Return the ids of the claims and tables in each claim file. The id of a row begins with the id of its table.

    The ids are found in the lines of the files, without a YAML reader, which is slow.
    """
    found: dict[Path, list[str]] = {}
    for file in claim_file.paths(claim_file.names()):
        table, ids = "", found.setdefault(file, [])
        for indent, name in _ID.findall(file.read_text(encoding="utf-8")):
            table = name if len(indent) <= _CLAIM_INDENT else table
            ids.append(name if name is table else f"{table}-{name}")
    return found


def _rules() -> list[str]:
    example = Rounding("about", Fraction(1, 20)).words
    rules = [f"{rule}: {text}." for rule, text in ROUNDING.items()]
    return [*rules, f"The ledger shows every rule except `nearest`: `(rule: {example})`."]


def _titled(title: str, lines: Iterable[str]) -> str:
    wrapped = [
        part for one in lines for part in textwrap.wrap(one, 100, subsequent_indent="  ", break_on_hyphens=False)
    ]
    return f"{title}\n{textwrap.indent(chr(10).join(wrapped), '  ')}"


def _measure(measure: Measure) -> str:
    lines = [measure.about, "", f"in: {measure.dimension}{_units(measure)}", "with:"]
    for key, parameter in inspect.signature(measure.function).parameters.items():
        is_required = parameter.default is inspect.Parameter.empty
        lines.append(f"  {key}: {parameter.annotation}{'' if is_required else f', default {parameter.default!r}'}")
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
        *_request("measured by", plain(claim.request)),
        *(line for one in claim.otherwise for line in _request(f"or, under: {one.under}", plain(one.request))),
        *([claim.note] if claim.note else []),
        f"file: {claim.where}",
        "to compute it:",
        f"  peft-harness claims {claim.paper} --id {claim.id}",
    ]
    # A text in the file may hold any character, and each is one line here.
    return f"claim {claim.id}\n{textwrap.indent(chr(10).join(map(visible, lines)), '  ')}"


def _request(title: str, request: dict[str, Any]) -> list[str]:
    return [f"{title}: {request['measure']}", *(f"  {key}: {value}" for key, value in request["with"].items())]
