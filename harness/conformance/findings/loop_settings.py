"""Settings of training loops and their effects, as `suites/loops/` declares them. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from harness import yaml_validation
from harness.conformance.findings.outcomes import CheckOutcome
from harness.errors import UsageError, did_you_mean
from harness.records.base_model import FrozenModel, Json
from harness.records.check import CheckId, CheckResult, Outcome
from harness.resources import data_folder

Effect = Literal["same", "changes", "refused", "untried"]
"""Effect of a setting of a training loop on the training. `untried`: the setting could not be tried, e.g. because the
library has no such option, or because it needs a GPU."""
_OUT_OF_SCOPE = ("dpo", "grpo")
WORDS: dict[Effect, str] = {
    "same": "does not change training",
    "changes": "changes training",
    "refused": "is refused",
    "untried": "cannot be tried",
}


class LoopSetting(FrozenModel):
    """One setting of a training loop, as a file in `suites/loops/` declares it."""

    name: str
    """Name of the setting, and of the check that tries it."""
    config: dict[str, Json]
    """Options of the training loop's library, and their values."""
    own_optimizer: bool = False
    """True if the training loop makes its own optimizer and schedule. False if it gets those of the harness."""
    warmup: int = 0
    """Number of warm-up steps in the training that tries the setting."""
    effect: Effect
    """Effect that the check must find. `untried`: the check is skipped, and fails as soon as the setting can be tried."""
    about: str = ""
    """Meaning of the setting."""


class SettingFound(FrozenModel):
    """Effect of one setting on training, compared with the harness's own loop."""

    setting: LoopSetting
    """The setting that was tried."""
    defaults: dict[str, bool] = Field(default={})
    """Option -> True if the tried value is the library's default."""
    effect: Effect
    """Effect that the check found. `changes`: a loss or trained tensor differs from the harness's loop by more than
    rounding noise."""
    first: float | None = None
    """Absolute difference of the two loops' first losses, in nats. None if no training was completed."""
    worst: float | None = None
    """Largest absolute difference of the two loops' losses at one step, in nats. None if no training was completed."""
    step: int | None = None
    """First step, counted from 1, whose loss differs from that of the harness's loop by more than rounding noise. None
    if no loss does."""
    weights: float | None = None
    """Norm of the difference between the two loops' final trained tensors, divided by the norm of the harness's tensors.
    None if no training was completed."""
    because: str = ""
    """Reason why no training was completed. Otherwise empty."""

    @property
    def slug(self) -> str:
        """Name of the setting in check ids and links."""
        return self.setting.name.replace(", ", "-").replace(" ", "-")

    @property
    def shown(self) -> list[str]:
        """Names of the options that the setting is about. All other options in `setting.config` have the harness's
        values.
        """
        option = self.setting.name.partition(",")[0]
        return [key for key in self.setting.config if not self.setting.own_optimizer or key == option]

    @property
    def is_default(self) -> bool:
        """True if the value of each option in `shown` is the default of the library."""
        return bool(self.shown) and all(self.defaults.get(option, False) for option in self.shown)

    def outcome(self, loop: str) -> CheckOutcome:
        """Return the outcome of the check of this setting. It is a pass if `effect` is the declared `setting.effect`."""
        wanted, found = self.setting.effect, self.effect
        detail = f"{WORDS[found]}; the table says that it {WORDS[wanted]}" if wanted != found else WORDS[found]
        return CheckOutcome(
            implementation=loop,
            kind="method",
            target="settings",
            dtype="float32",
            case=", ".join(f"{key}={value}" for key, value in self.setting.config.items()),
            result=CheckResult(
                check=str(CheckId("settings", self.slug, "float32", "trained")),
                outcome=Outcome.FAIL if wanted != found else Outcome.SKIPPED if found == "untried" else Outcome.PASS,
                detail=detail
                + (f": {self.because}" if self.because and (wanted != found or found == "untried") else ""),
            ),
        )


class _Table(FrozenModel):
    """Top level of a file in `suites/loops/`."""

    settings: list[LoopSetting]


def loops() -> list[str]:
    """Return the names of the loops that can be checked."""
    return sorted(path.stem for path in _folder().glob("*.yaml"))


def load(loop: str) -> list[LoopSetting]:
    """Return the settings of a loop. Raises UsageError for an unknown loop, and SuiteError for mistakes in its file."""
    if loop.lower() in _OUT_OF_SCOPE:
        what = f"`{loop}` is no loop of supervised fine-tuning; DPO and GRPO are out of scope"
        raise UsageError(what, where="--loop", hint=f"write one of {', '.join(loops())}")
    if loop not in loops():
        raise UsageError(f"unknown loop `{loop}`", where="--loop", hint=did_you_mean(loop, loops(), "there are"))
    return yaml_validation.load_model(_folder() / f"{loop}.yaml", _Table)[1].settings


def _folder() -> Path:
    return data_folder("suites") / "loops"
