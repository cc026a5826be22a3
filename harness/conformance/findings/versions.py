"""Compare the outcomes of the same checks in several environments, to show which releases have a defect. Imports no
torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from harness.conformance.findings import summary
from harness.conformance.findings.defects import Defect
from harness.conformance.findings.outcomes import CheckOutcome, CheckStatus
from harness.conformance.findings.summary import MatrixField
from harness.records.base_model import FrozenModel
from harness.records.check import Outcome
from harness.records.record import Environment

_FAILED = (CheckStatus.FAIL, CheckStatus.KNOWN_DEFECT)


class CheckedEnvironment(FrozenModel):
    """An environment in which checks ran."""

    label: str
    """Libraries for which the environment was made, with their versions, e.g. `peft 0.19.1`."""
    name: str
    """Name of the environment in the commands `peft-harness env`."""
    requirements: list[str]
    packages: list[str]
    """Packages that the environment adds or replaces, as requirements with versions and hashes."""
    environment: Environment
    """Machine and software that the workers saw."""


@dataclass(frozen=True)
class CheckField:
    """Outcomes of one check in one environment."""

    summary: MatrixField | None
    """Summary of the outcomes. None if the check was not tried."""
    failed: frozenset[tuple[str, str]]
    """Pairs (check id, case) of the failures."""
    defects: tuple[str, ...]
    """Ids of the known defects that explain failures."""


@dataclass(frozen=True)
class CheckRow:
    """One check that fails in at least one environment."""

    implementation: str
    target: str
    """Target of the implementation: a Method, an Operation, a quantised base, or the loaders."""
    check: str
    """`method/check`, without dtype and state."""
    fields: tuple[CheckField, ...]
    """Outcomes of the check, one entry per environment."""

    @property
    def differs(self) -> bool:
        """True if two environments differ in the worst status of the check, or in the set of its failures."""
        return len({(field.summary and field.summary.status, field.failed) for field in self.fields}) > 1


@dataclass(frozen=True)
class DefectField:
    """Outcomes about one known defect in one environment."""

    version: str
    """Version of the library in the environment. Empty if the library is not installed."""
    in_range: bool
    """True if `version` is in the range of affected versions (`Defect.versions`)."""
    shown: int
    """Number of failures that look like the defect, even if the version is outside the range."""
    tried: int
    """Number of outcomes that passed or look like the defect. Other failures do not show whether the defect is there."""


@dataclass(frozen=True)
class DefectRow:
    """One known defect that shows in at least one environment."""

    defect: Defect
    fields: tuple[DefectField, ...]
    """Outcomes about the defect, one entry per environment."""

    @property
    def differs(self) -> bool:
        """True if the defect was tried in several environments, but shows in only some of these."""
        return len({field.shown > 0 for field in self.fields if field.tried}) > 1

    @property
    def is_misdated(self) -> bool:
        """True if `Defect.versions` lacks a version that shows the defect, or contains a version that does not.

        False for a defect that shows only `sometimes`.
        """
        return any(
            field.tried and not self.defect.sometimes and field.in_range != (field.shown > 0) for field in self.fields
        )


def check_rows(tried: Iterable[CheckOutcome], environments: Sequence[CheckedEnvironment]) -> list[CheckRow]:
    """Return the checks that fail in at least one environment, sorted."""
    found: dict[tuple[str, str, str], dict[str, list[CheckOutcome]]] = {}
    for one in tried:
        key = (one.implementation, one.target, f"{one.result.id.target}/{one.check}")
        found.setdefault(key, {}).setdefault(one.environment, []).append(one)
    rows = [
        CheckRow(*key, tuple(_check_field(outcomes.get(one.label, [])) for one in environments))
        for key, outcomes in sorted(found.items())
    ]
    return [row for row in rows if any(field.failed for field in row.fields)]


def _check_field(tried: Sequence[CheckOutcome]) -> CheckField:
    failed = [one for one in tried if one.status in _FAILED]
    return CheckField(
        summary.summarise(tried),
        frozenset((one.result.check, one.case) for one in failed),
        tuple(sorted({one.defect for one in failed if one.defect})),
    )


def defect_rows(
    tried: Iterable[CheckOutcome], defects: Iterable[Defect], environments: Sequence[CheckedEnvironment]
) -> list[DefectRow]:
    """Return the known defects that show in at least one environment, in the order of their file."""
    by_label: dict[str, list[CheckOutcome]] = {one.label: [] for one in environments}
    for one in tried:
        by_label.get(one.environment, []).append(one)
    rows = [
        DefectRow(
            defect,
            tuple(_defect_field(defect, by_label[one.label], one.environment.software) for one in environments),
        )
        for defect in defects
    ]
    return [row for row in rows if any(field.shown for field in row.fields)]


def _defect_field(defect: Defect, tried: Sequence[CheckOutcome], software: dict[str, str]) -> DefectField:
    shown = sum(defect.explains(one) for one in tried)
    passed = sum(one.result.outcome is Outcome.PASS and bool(defect.matching(one)) for one in tried)
    return DefectField(
        version=software.get(defect.library, ""),
        in_range=defect.applies(software),
        shown=shown,
        tried=shown + passed,
    )
