"""The known defects of other people's libraries: data, strict both ways. No torch.

A failure that an entry explains is a known defect, not a failure: it must be of the entry's checks and cases, and look as
the entry says. An entry, or one of its checks, that shows in none of its cases although they were tried with a version in
its range is itself a failure: the library was mended, or the check went blind.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from packaging.specifiers import InvalidSpecifier, SpecifierSet
from pydantic import Field, field_validator

from harness import yaml_lines
from harness.conformance import checks
from harness.conformance.findings.outcomes import CheckOutcome, Execution
from harness.errors import Problem, SuiteError, did_you_mean
from harness.records.base_model import FrozenModel
from harness.records.check import CheckResult, Outcome
from harness.records.check_id import CheckId
from harness.resources import data_folder


class Defect(FrozenModel):
    """One thing that a library is known to do otherwise.

    library: its distribution; versions: a range, e.g. `>=0.19`. implementation: who shows it here; target: as what, if
    only as one of what it offers. checks: patterns of check ids (`dora/zero_rows/*/*`); cases: patterns of the case's
    words. shows: how the failure looks, as regular expressions of which one is found in what the result says (`said`);
    none: anyhow, but for an exception, which only an expression that begins with `raised` allows. at_most: the largest
    error that is the defect's, where any number would look like it. reproduction: a script beside the file of defects
    that needs only that library and torch. sometimes: where the defect shows by chance or on some machines only, why
    (strictness then rests with the reproduction).
    """

    id: str = Field(pattern=r"^[a-z0-9][a-z0-9.-]*$")
    library: str
    versions: str
    implementation: str
    target: str = ""
    checks: list[str] = Field(min_length=1)
    cases: list[str] = Field(default=["*"], min_length=1)
    shows: list[str] = Field(default=[])
    at_most: float | None = Field(default=None, gt=0)
    summary: str = Field(min_length=10)
    reproduction: str
    link: str = ""
    sometimes: str = ""

    @field_validator("versions")
    @classmethod
    def _is_a_range(cls, value: str) -> str:
        try:
            SpecifierSet(value)
        except InvalidSpecifier as error:
            raise ValueError(f"`versions` is {value!r}, not a range; write e.g. >=0.19,<0.22") from error
        return value

    @field_validator("shows")
    @classmethod
    def _are_expressions(cls, value: list[str]) -> list[str]:
        for one in value:
            try:
                re.compile(one)
            except re.error as error:
                raise ValueError(f"`shows` holds {one!r}; write a regular expression: {error}") from error
        return value

    def matches(self, tried: CheckOutcome, pattern: str = "") -> bool:
        """Whether this result is of a case in which the defect should show; pattern: in this one of its checks."""
        return (
            tried.implementation == self.implementation
            and self.target in ("", tried.target)
            and any(fnmatchcase(tried.result.check, one) for one in ([pattern] if pattern else self.checks))
            and any(fnmatchcase(f"{tried.case} {tried.dtype}", one) for one in self.cases)
        )

    def explains(self, tried: CheckOutcome) -> bool:
        """Whether this result is a failure of such a case that looks like the defect."""
        result, what = tried.result, _description(tried.result)
        if result.outcome is not Outcome.FAIL or not self.matches(tried):
            return False
        if tried.execution is Execution.RAISED:
            return any(one.startswith("raised") and re.match(one, what) for one in self.shows)
        small = self.at_most is None or (result.error is not None and result.error <= self.at_most)
        return small and (not self.shows or any(re.search(one, what) for one in self.shows))

    def applies(self) -> bool:
        """Whether the installed version is in the range."""
        try:
            return version(self.library) in SpecifierSet(self.versions, prereleases=True)
        except PackageNotFoundError:
            return False


def _description(result: CheckResult) -> str:
    """Return the text in which `shows` of a defect searches: the tensor, its worst element, the policy, the detail."""
    return "; ".join(part for part in (result.tensor, result.worst, result.policy, result.detail) if part)


class _File(FrozenModel):
    defects: list[Defect]


def path() -> Path:
    """Return the file of known defects."""
    return data_folder("suites") / "parity" / "defects" / "known.yaml"


@cache
def known() -> tuple[Defect, ...]:
    """Read the known defects. Raises SuiteError with every mistake: unknown checks, ids twice, missing reproductions."""
    file = path()
    document, keys = yaml_lines.load_model(file, _File)
    defects = keys.defects
    problems, seen = [], set()
    for index, defect in enumerate(defects):
        where = document.where("defects", index)
        if defect.id in seen:
            problems.append(Problem(where, f"the id {defect.id} is used twice", "give it another"))
        seen.add(defect.id)
        for pattern in defect.checks:
            name = CheckId.parse(pattern)
            if not name.is_complete or name.check not in {*checks.docstrings(), "attach", "alive", "*"}:
                hint = did_you_mean(name.check or pattern, checks.docstrings(), "write method/check/dtype/state")
                problems.append(Problem(where, f"{defect.id}: {pattern!r} names no check", hint))
        if not (file.parent / defect.reproduction).is_file():
            problems.append(Problem(where, f"{defect.id}: no file {defect.reproduction}", "write the reproduction"))
    if problems:
        raise SuiteError(problems)
    return tuple(defects)


def explained(tried: Iterable[CheckOutcome], defects: Sequence[Defect]) -> tuple[list[CheckOutcome], list[str]]:
    """Return the results, failures that a known defect explains marked with the first that does; and the complaints.

    A complaint is an entry, or some of its checks, of which no case that was tried failed as it says, whatever other entry
    may explain what failed there.
    """
    marked = []
    due, shown = set[tuple[str, str]](), set[tuple[str, str]]()
    active = [d for d in defects if d.applies()]
    for one in tried:
        explaining = [d for d in active if d.explains(one)]
        for d in active:
            here = {(d.id, pattern) for pattern in d.checks if d.matches(one, pattern)}
            due |= here if one.result.outcome is not Outcome.SKIPPED else set()
            shown |= here if d in explaining else set()
        marked.append(one.model_copy(update={"defect": explaining[0].id}) if explaining else one)
    complaints = []
    for d in active:
        missing = [pattern for pattern in d.checks if (d.id, pattern) in due - shown]
        if missing and not d.sometimes:
            where = "" if not any((d.id, pattern) in shown for pattern in d.checks) else f" in {', '.join(missing)}"
            complaints.append(
                f"known defect {d.id} did not show{where} with {d.library} {version(d.library)}: mended there, or the check "
                f"went blind; narrow it in {path().name} once {d.reproduction} agrees"
            )
    return marked, complaints
