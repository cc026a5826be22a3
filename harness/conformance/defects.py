"""The known defects of other people's libraries: data, strict both ways. No torch.

A failure that an entry explains is a known defect, not a failure. An entry that explains nothing although its cases were
tried with a version in its range is itself a failure: the library was mended, or the check went blind.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from packaging.specifiers import InvalidSpecifier, SpecifierSet
from pydantic import Field, ValidationError, field_validator

from harness import suite_file, yaml_lines
from harness.conformance.tried import Tried
from harness.errors import Problem, SuiteError
from harness.explain import checks
from harness.records import Frozen, Outcome
from harness.resources import folder
from harness.spelling import near


class Defect(Frozen):
    """One thing that a library is known to do otherwise.

    library: its distribution; versions: a range, e.g. `>=0.19`. implementation: who shows it here; target: as what, if
    only as one of what it offers. checks: patterns of check ids (`dora/zero_rows/*/*`); cases: patterns of the case's
    words. reproduction: a script beside the file of defects that needs only that library and torch. sometimes: where the
    defect shows by chance or on some machines only, why (strictness then rests with the reproduction).
    """

    id: str = Field(pattern=r"^[a-z0-9][a-z0-9.-]*$")
    library: str
    versions: str
    implementation: str
    target: str = ""
    checks: list[str] = Field(min_length=1)
    cases: list[str] = Field(default=["*"], min_length=1)
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
            raise ValueError(f"`versions` is {value!r}, not a range such as >=0.19,<0.22") from error
        return value

    def matches(self, tried: Tried) -> bool:
        """Whether this result is of a case in which the defect should show."""
        return (
            tried.implementation == self.implementation
            and self.target in ("", tried.target)
            and any(fnmatchcase(tried.result.check, pattern) for pattern in self.checks)
            and any(fnmatchcase(f"{tried.case} {tried.dtype}", pattern) for pattern in self.cases)
        )

    def applies(self) -> bool:
        """Whether the installed version is in the range."""
        try:
            return version(self.library) in SpecifierSet(self.versions, prereleases=True)
        except PackageNotFoundError:
            return False


class _File(Frozen):
    defects: list[Defect]


def path() -> Path:
    """Return the file of known defects."""
    return folder("suites") / "parity" / "defects" / "known.yaml"


@cache
def known() -> tuple[Defect, ...]:
    """Read the known defects. Raises SuiteError with every mistake: unknown checks, ids twice, missing reproductions."""
    file = path()
    document = yaml_lines.load(file)
    try:
        defects = _File.model_validate(document.data).defects
    except ValidationError as error:
        raise SuiteError([problem for _, problem in suite_file.explain(error, _File, document)]) from error
    problems, seen = [], set()
    for index, defect in enumerate(defects):
        where = document.where("defects", index)
        if defect.id in seen:
            problems.append(Problem(where, f"the id {defect.id} is used twice", "give it another"))
        seen.add(defect.id)
        for pattern in defect.checks:
            parts = pattern.split("/")
            if len(parts) != 4 or (parts[1] not in {*checks(), "attach", "alive", "*"}):
                mend = near(parts[1] if len(parts) > 1 else pattern, checks(), "write method/check/dtype/state")
                problems.append(Problem(where, f"{defect.id}: {pattern!r} names no check", mend))
        if not (file.parent / defect.reproduction).is_file():
            problems.append(Problem(where, f"{defect.id}: no file {defect.reproduction}", "write the reproduction"))
    if problems:
        raise SuiteError(problems)
    return tuple(defects)


def explained(tried: Iterable[Tried], defects: Sequence[Defect]) -> tuple[list[Tried], list[str]]:
    """Return the results, failures that a known defect explains marked with it; and the complaints about the defects.

    A complaint is an entry in whose cases every check passed.
    """
    marked, shown, due = [], set(), set()
    active = [d for d in defects if d.applies()]
    for one in tried:
        of = next((d for d in active if d.matches(one)), None)
        due |= {d.id for d in active if d.matches(one) and one.result.outcome is not Outcome.SKIPPED}
        if of is not None and one.result.outcome is Outcome.FAIL:
            shown |= {d.id for d in active if d.matches(one)}
            marked.append(one.model_copy(update={"defect": of.id}))
        else:
            marked.append(one)
    stale = [d for d in active if d.id in due - shown and not d.sometimes]
    return marked, [
        f"known defect {d.id} did not show with {d.library} {version(d.library)}: mended there, or the check went blind; "
        f"narrow its `versions` in {path().name} once {d.reproduction} agrees"
        for d in stale
    ]
