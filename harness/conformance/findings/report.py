"""Result of one run of `check`: outcomes, what was skipped and why, exit code, JSON document. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from harness.conformance.findings.defects import Defect
from harness.conformance.findings.outcomes import CheckOutcome, CheckStatus
from harness.conformance.parity_suite import ParitySuite
from harness.errors import Exit


@dataclass(frozen=True)
class CheckReport:
    """What came of it.

    skipped: what was not tried, and why. complaints: known defects that did not show. broken: plug-ins that could not be
    loaded. defects: those known, of whatever library. plans: target -> its parity suite. software: library -> version.
    untried: implementations asked for by name, nothing of which could be tried.
    """

    tried: list[CheckOutcome]
    skipped: dict[str, str] = field(default_factory=dict)
    complaints: list[str] = field(default_factory=list)
    broken: dict[str, str] = field(default_factory=dict)
    defects: Sequence[Defect] = ()
    plans: dict[str, ParitySuite] = field(default_factory=dict)
    software: dict[str, str] = field(default_factory=dict)
    interrupted: bool = False
    untried: Sequence[str] = ()

    def count(self, standing: CheckStatus) -> int:
        """Count the results of one standing."""
        return sum(one.standing is standing for one in self.tried)

    def shown_defects(self) -> list[Defect]:
        """List the known defects that explain a failure here."""
        ids = {one.defect for one in self.tried}
        return [defect for defect in self.defects if defect.id in ids]

    @property
    def exit(self) -> Exit:
        """Interrupted is 4; a failure, a broken plug-in or a defect that did not show is 1; an implementation asked for by
        name, of which nothing was compared, is 4; nothing compared at all is 5.

        What fails as its library is known to was compared.
        """
        if self.interrupted:
            return Exit.INFRASTRUCTURE
        if self.count(CheckStatus.FAIL) or self.complaints or self.broken:
            return Exit.FAIL
        if self.untried:
            return Exit.INFRASTRUCTURE
        return (
            Exit.PASS if self.count(CheckStatus.PASS) or self.count(CheckStatus.KNOWN_DEFECT) else Exit.NOTHING_COMPARED
        )

    def document(self) -> dict[str, Any]:
        """Return everything as JSON can hold it."""
        rows = [
            {**one.model_dump(mode="json"), "standing": one.standing.value, "share": one.share} for one in self.tried
        ]
        return {
            "schema": 2, "exit": int(self.exit), "interrupted": self.interrupted, "software": self.software, "checks": rows,
            "skipped": self.skipped, "complaints": self.complaints, "broken": self.broken, "untried": list(self.untried),
            "defects": [defect.model_dump(mode="json") for defect in self.shown_defects()],
        }  # fmt: skip
