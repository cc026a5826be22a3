"""Report of one run of `check`: outcomes, skipped implementations with reasons, exit code and JSON document. Imports no
torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace

from harness.conformance.findings import common_settings
from harness.conformance.findings.common_settings import CommonSettings
from harness.conformance.findings.defects import Defect
from harness.conformance.findings.loop_settings import SettingFound
from harness.conformance.findings.outcomes import CheckOutcome, CheckStatus, in_environment
from harness.conformance.findings.versions import CheckedEnvironment
from harness.conformance.parity_suite import ParitySuite
from harness.errors import Exit


@dataclass(frozen=True)
class CheckReport:
    """Findings of one run of `check`."""

    tried: list[CheckOutcome]
    skipped: dict[str, str] = field(default_factory=dict)
    """Text `<implementation> <target>` -> reason why it was not tried. A target is a Method, an Operation, a quantised
    base or the loaders. The text is `reference` if no target of the reference was tried."""
    complaints: list[str] = field(default_factory=list)
    """Messages about known defects that should have shown, but did not."""
    broken: dict[str, str] = field(default_factory=dict)
    """Entry point of a plug-in -> reason why it cannot be loaded."""
    defects: Sequence[Defect] = ()
    """All known defects, of any library."""
    plans: dict[str, ParitySuite] = field(default_factory=dict)
    """Target -> its parity suite."""
    software: dict[str, str] = field(default_factory=dict)
    """Library -> version, for the libraries with which the checks ran."""
    interrupted: bool = False
    untried: Sequence[str] = ()
    """Implementations that were requested by name but not compared."""
    environments: Sequence[CheckedEnvironment] = ()
    """Environments in which checks ran, other than the Python that runs the harness."""
    settings: Sequence[SettingFound] = ()
    """Settings of a training loop that were tried. Only `check --loop` tries any."""
    options: Sequence[str] | None = None
    """Options of `check` that decide which cases are tried and how, e.g. `--wide`. None for a check of a training loop."""
    is_part: bool = False
    """True if only the cases of a shard were requested, which may have none."""

    @classmethod
    def joined(cls, reports: Sequence[CheckReport]) -> CheckReport:
        """Return one report with the findings of all `reports`. `software` and `defects` are those of the first report."""
        first = reports[0]
        return cls(
            tried=[one for report in reports for one in report.tried],
            skipped={name: why for report in reports for name, why in report.skipped.items()},
            complaints=[one for report in reports for one in report.complaints],
            broken={name: why for report in reports for name, why in report.broken.items()},
            defects=first.defects,
            plans={target: plan for report in reports for target, plan in report.plans.items()},
            software=first.software,
            interrupted=any(report.interrupted for report in reports),
            untried=list(dict.fromkeys(name for report in reports for name in report.untried)),
            environments=[one for report in reports for one in report.environments],
            options=first.options,
            is_part=any(report.is_part for report in reports),
        )

    def labelled(self, environment: CheckedEnvironment) -> CheckReport:
        """Return a copy in which every outcome and every skipped, broken or untried name has the label of the
        environment.
        """
        label = environment.label
        return replace(
            self,
            tried=[one.model_copy(update={"environment": label}) for one in self.tried],
            skipped={in_environment(name, label): why for name, why in self.skipped.items()},
            broken={in_environment(name, label): why for name, why in self.broken.items()},
            untried=[in_environment(name, label) for name in self.untried],
            environments=[environment],
        )

    @property
    def compares_versions(self) -> bool:
        """True if the same checks ran in several environments.

        False if there are several environments only because implementations need different libraries.
        """
        return len(self.environments) > 1 and any(one.environment for one in self.tried)

    def count(self, status: CheckStatus) -> int:
        """Return the number of outcomes with this status."""
        return sum(one.status is status for one in self.tried)

    def in_common(self) -> list[CommonSettings]:
        """Return what the failing cases of each check have in common. A training loop gives none."""
        return [] if self.options is None else common_settings.find(self.tried)

    def shown_defects(self) -> list[Defect]:
        """Return the known defects that explain a failure of this run."""
        ids = {one.defect for one in self.tried}
        return [defect for defect in self.defects if defect.id in ids]

    @property
    def exit(self) -> Exit:
        """The exit code of the run. The first of these rules that applies decides.

        4: the run was interrupted. 1: a check failed, a plug-in is broken, or a known defect did not show. 4: an
        implementation that was requested by name was not compared. 5: nothing was compared, and no shard was requested
        (a shard may have no case). 0: otherwise.

        A failure that a known defect explains counts as compared, not as failed.
        """
        if self.interrupted:
            return Exit.INFRASTRUCTURE
        if self.count(CheckStatus.FAIL) or self.complaints or self.broken:
            return Exit.FAIL
        if self.untried:
            return Exit.INFRASTRUCTURE
        compared = self.count(CheckStatus.PASS) or self.count(CheckStatus.KNOWN_DEFECT)
        return Exit.PASS if compared or self.is_part else Exit.NOTHING_COMPARED

    def document(self) -> dict[str, object]:
        """Return the document that `--json` prints."""
        rows = [
            {
                **one.model_dump(mode="json", exclude={"execution", "settings"}),
                "standing": one.status.value,
                "share": one.share,
            }
            for one in self.tried
        ]
        return {
            "schema": 2, "exit": int(self.exit), "interrupted": self.interrupted, "software": self.software, "checks": rows,
            "skipped": self.skipped, "complaints": self.complaints, "broken": self.broken, "untried": list(self.untried),
            "defects": [defect.model_dump(mode="json") for defect in self.shown_defects()],
            "environments": [one.model_dump(mode="json") for one in self.environments],
            **({"in_common": [asdict(one) for one in self.in_common()]} if self.options is not None else {}),
            **({"options": list(self.options)} if self.options is not None else {}),
            **({"settings": [one.model_dump(mode="json") for one in self.settings]} if self.settings else {}),
        }  # fmt: skip
