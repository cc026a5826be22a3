"""Known defects of libraries: data, strict both ways. No torch.

A failure that an entry explains is a known defect, not a failure: the check and the case must match the entry, and the
failure must look as the entry describes. If an entry, or one of its checks, shows in none of its cases although they
were tried with a version in its range, that is a failure: the library was fixed, or the check no longer sees the defect.
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
from harness.records.check import CheckId, CheckResult, Outcome
from harness.resources import data_folder


class Defect(FrozenModel):
    """One known deviation of a library."""

    id: str = Field(pattern=r"^[a-z0-9][a-z0-9.-]*$")
    library: str
    """The distribution."""
    versions: str
    """A range, e.g. `>=0.19`."""
    implementation: str
    """Implementation that shows it here."""
    target: str = ""
    """Target of the implementation; empty for all its targets."""
    checks: list[str] = Field(min_length=1)
    """Patterns of check ids, e.g. `dora/zero_rows/*/*`."""
    cases: list[str] = Field(default=["*"], min_length=1)
    """Patterns of the case's name."""
    shows: list[str] = Field(default=[])
    """Regular expressions; one of them must match in the tensor, worst element, policy or detail of the failure;
    without any, every failure matches. An exception needs an expression that begins with `raised`.
    """
    at_most: float | None = Field(default=None, gt=0)
    """Largest error of the defect, if any number would otherwise match."""
    summary: str = Field(min_length=10)
    reproduction: str
    """Script in the folder of the file of defects that needs only that library and torch."""
    link: str = ""
    sometimes: str = ""
    """Why the defect shows only by chance or on some machines. Its reproduction then is the strict test."""

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
        """Return whether the defect should show in this outcome. pattern: by this one of its checks."""
        return (
            tried.implementation == self.implementation
            and self.target in ("", tried.target)
            and any(fnmatchcase(tried.result.check, one) for one in ([pattern] if pattern else self.checks))
            and any(fnmatchcase(f"{tried.case} {tried.dtype}", one) for one in self.cases)
        )

    def explains(self, tried: CheckOutcome) -> bool:
        """Return whether this outcome is a failure that looks like the defect."""
        result, what = tried.result, _description(tried.result)
        if result.outcome is not Outcome.FAIL or not self.matches(tried):
            return False
        if tried.execution is Execution.RAISED:
            return any(one.startswith("raised") and re.match(one, what) for one in self.shows)
        small = self.at_most is None or (result.error is not None and result.error <= self.at_most)
        return small and (not self.shows or any(re.search(one, what) for one in self.shows))

    def applies(self) -> bool:
        """Return whether the installed version is in the range."""
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
    """Read the known defects. Raises SuiteError with every mistake: unknown checks, duplicate ids, missing
    reproductions.
    """
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
    """Return the outcomes, each failure marked with the first known defect that explains it; and the complaints.

    A complaint is a defect, or some of its checks, that showed in none of the cases that were tried, whichever other
    defect explains the failures there.
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
                f"known defect {d.id} did not show{where} with {d.library} {version(d.library)}: it is fixed there, or the "
                f"check no longer sees it; narrow it in {path().name} once {d.reproduction} agrees"
            )
    return marked, complaints
