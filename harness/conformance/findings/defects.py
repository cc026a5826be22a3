"""Known defects of libraries, read from a file. Imports no torch.

Each entry of the file describes one defect. An entry explains a failure if it names the check and the case, and if the
failure looks as the entry describes. Such a failure counts as a known defect.

If the installed version of the library has the defect, the named cases that a run tries must still show it, in each check
that the entry names. Otherwise the run fails: the library was fixed, or the check no longer notices the defect.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from packaging.specifiers import InvalidSpecifier, SpecifierSet
from pydantic import Field, field_validator

from harness import yaml_validation
from harness.conformance import checks
from harness.conformance.findings.outcomes import CheckOutcome, Execution
from harness.errors import Problem, SuiteError, did_you_mean
from harness.records.base_model import FrozenModel
from harness.records.check import CheckId, CheckResult, Outcome
from harness.resources import data_folder


class Defect(FrozenModel):
    """One known defect of a library: an entry of the file of known defects."""

    id: str = Field(pattern=r"^[a-z0-9][a-z0-9.-]*$")
    library: str
    """Name of the distribution that has the defect."""
    versions: str
    """Range of affected versions, e.g. `>=0.19`."""
    implementation: str
    """Name of the implementation that shows the defect."""
    also: list[str] = Field(default=[])
    """Names of other implementations that show the same defect in the same checks, because they use layers of this
    library. `known` replaces the entry by one for each implementation, named `ID-in-NAME` for these."""
    target: str = ""
    """Name of the affected Method, Operation or other target. Empty if all of the implementation's targets are
    affected."""
    checks: list[str] = Field(min_length=1)
    """Patterns of the ids of checks that show the defect, e.g. `dora/zero_rows/*/*`."""
    cases: list[str] = Field(default=["*"], min_length=1)
    """Patterns of the names of affected cases."""
    not_cases: list[str] = Field(default=[])
    """Patterns of the names of cases that cannot show the defect, although a pattern in `cases` matches them."""
    shows: list[str] = Field(default=[])
    """Regular expressions. One of them must match the tensor, worst element, policy or detail of the failure. If the
    list is empty, every failed comparison matches. A failure by an exception matches only an expression that begins
    with `raised`."""
    at_most: float | None = Field(default=None, gt=0)
    """Largest `CheckResult.error` that the defect explains. None if it explains an error of any size."""
    summary: str = Field(min_length=10)
    reproduction: str
    """File name of the script that shows the defect with only this library and torch. The script lies beside the file
    of known defects."""
    link: str = ""
    feature: str = ""
    """For a defect of a loader, the affected feature of adapter files, by its name in loader_readings.yaml. Otherwise
    empty."""
    sometimes: str = ""
    """Reason why the defect shows only by chance, with some options or on some machines. If a reason is given, the
    checks need not show the defect; only the reproduction must."""

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

    def matching(self, tried: CheckOutcome) -> list[str]:
        """Return the patterns in `checks` that match the outcome's check, if its case should show the defect.

        If the outcome belongs to another implementation, target or case, the list is empty.
        """
        if tried.implementation != self.implementation or self.target not in ("", tried.target):
            return []
        case = f"{tried.case} {tried.dtype}"
        if not any(fnmatchcase(case, one) for one in self.cases) or any(
            fnmatchcase(case, one) for one in self.not_cases
        ):
            return []
        return [pattern for pattern in self.checks if fnmatchcase(tried.result.check, pattern)]

    def explains(self, tried: CheckOutcome) -> bool:
        """Return whether this outcome is a failure that looks like the defect."""
        result = tried.result
        if result.outcome is not Outcome.FAIL:
            return False
        # `first_call` fails wherever the Operation is wrong.
        names = [result.check.replace("/first_call/", f"/{name}/") for name in ("first_call", "outputs", "backward")]
        same = (result.model_copy(update={"check": name}) for name in names)
        if not any(self.matching(tried.model_copy(update={"result": one})) for one in same):
            return False
        description = _description(result)
        if tried.execution is Execution.RAISED:
            return any(one.startswith("raised") and re.match(one, description) for one in self.shows)
        small = self.at_most is None or (result.error is not None and result.error <= self.at_most)
        return small and (not self.shows or any(re.search(one, description) for one in self.shows))

    def for_each_implementation(self) -> list[Defect]:
        """Return a Defect for `implementation` and one for each name in `also`. Each of these must show the defect."""
        names = {self.implementation: self.id, **{name: f"{self.id}-in-{name}" for name in self.also}}
        changed = [{"id": one, "implementation": name, "also": []} for name, one in names.items()]
        return [self.model_copy(update=one) for one in changed]

    def explains_file(self, loader: str, features: Collection[str], failure: str) -> bool:
        """Return whether this defect explains why a loader fails with an adapter file that has these features.

        failure: text that describes the failure, which `shows` must match.
        """
        shown = not self.shows or any(re.search(one, failure) for one in self.shows)
        return loader == self.implementation and self.feature in features and shown and self.applies()

    def applies(self, software: Mapping[str, str] | None = None) -> bool:
        """Return whether an affected version of the library is installed.

        software: library -> version; by default, the libraries installed for this process.
        """
        number = _installed(self.library) if software is None else software.get(self.library, "")
        return bool(number) and number in SpecifierSet(self.versions, prereleases=True)


def _description(result: CheckResult) -> str:
    """Return the text that `Defect.shows` must match: tensor, worst element, policy and detail of the result."""
    return "; ".join(part for part in (result.tensor, result.worst, result.policy, result.detail) if part)


class _File(FrozenModel):
    defects: list[Defect]


def path() -> Path:
    """Return the path of the file of known defects."""
    return data_folder("suites") / "parity" / "defects" / "known.yaml"


@cache
def known() -> tuple[Defect, ...]:
    """Read and return the known defects.

    An entry for several implementations gives several Defects. Raises one SuiteError that lists all unknown checks,
    duplicate ids and missing reproductions.
    """
    file = path()
    document, keys = yaml_validation.load_model(file, _File)
    problems, seen = [], set[str]()
    for index, defect in enumerate(keys.defects):
        where = document.where("defects", index)
        ids = [one.id for one in defect.for_each_implementation()]
        problems += [Problem(where, f"the id {one} is used twice", "give it another") for one in seen.intersection(ids)]
        seen.update(ids)
        for pattern in defect.checks:
            name = CheckId.parse(pattern)
            if not name.is_complete or name.check not in {*checks.docstrings(), "attach", "alive", "*"}:
                hint = did_you_mean(name.check or pattern, checks.docstrings(), "write method/check/dtype/state")
                problems.append(Problem(where, f"{defect.id}: {pattern!r} names no check", hint))
        if not (file.parent / defect.reproduction).is_file():
            problems.append(Problem(where, f"{defect.id}: no file {defect.reproduction}", "write the reproduction"))
    if problems:
        raise SuiteError(problems)
    return tuple(one for defect in keys.defects for one in defect.for_each_implementation())


def _installed(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        return ""


def explained(
    tried: Iterable[CheckOutcome], defects: Sequence[Defect], software: Mapping[str, str] | None = None
) -> tuple[list[CheckOutcome], list[str]]:
    """Return the outcomes, and complaints about known defects that did not show.

    In the returned outcomes, each explained failure has the id of the first known defect that explains it. There is a
    complaint for each defect without `sometimes` whose cases were tried, but did not show it. If only some checks of
    the defect did not show it, the complaint names these checks. A defect counts as shown even if an earlier defect
    explains the same failure. A check that ended with an exception which a known defect explains cannot show another
    defect, so it counts as not tried for the others. Defects of other versions of the library are ignored.

    software: versions of the libraries with which the outcomes were found; by default, those of this process.
    """
    active = [defect for defect in defects if defect.applies(software)]
    of = defaultdict[str, list[Defect]](list)
    for defect in active:
        of[defect.implementation].append(defect)
    marked = []
    due, shown = set[tuple[str, str]](), set[tuple[str, str]]()
    for one in tried:
        explaining = []
        expected = set[tuple[str, str]]()
        for defect in of[one.implementation]:
            matching = {(defect.id, pattern) for pattern in defect.matching(one)}
            if defect.explains(one):
                explaining.append(defect)
                shown |= matching
            expected |= matching
        hidden = bool(explaining) and one.execution is Execution.RAISED
        if one.result.outcome is not Outcome.SKIPPED and not hidden:
            due |= expected
        marked.append(one.model_copy(update={"defect": explaining[0].id}) if explaining else one)
    complaints = []
    for defect in active:
        missing = [pattern for pattern in defect.checks if (defect.id, pattern) in due - shown]
        if missing and not defect.sometimes:
            where = f" in {', '.join(missing)}" if defect.id in {name for name, _ in shown} else ""
            number = _installed(defect.library) if software is None else software[defect.library]
            complaints.append(
                f"known defect {defect.id} did not show{where} with {defect.library} {number}: it is fixed "
                f"there, or the check no longer sees it; run {defect.reproduction}, then narrow the entry in {path().name}"
            )
    return marked, complaints
