"""Tables of `check --loop`: the settings of a training loop, and how much each setting changes training.

This module imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from harness.conformance.findings.loop_settings import WORDS, SettingFound
from harness.console import align_columns, without_code_marks
from harness.report.formatting import Field, field, unmeasured
from harness.report.table_model import Table, column, grouped

if TYPE_CHECKING:
    from harness.conformance.findings.report import CheckReport

_HEAD = ("setting", "tried", "training", "default", "first loss", "worst loss", "from step", "weights")
_NUMBERS: tuple[tuple[str, str, Callable[[SettingFound], float | int | None]], ...] = (
    ("first loss, nats", "Distance of the first loss from that of the harness's loop", lambda one: one.first),
    ("worst loss, nats", "Largest distance of a loss over all steps", lambda one: one.worst),
    ("from step", "First step whose loss differs by more than rounding errors explain", lambda one: one.step),
    ("weights", "Distance of the trained tensors at the end, relative to their norm", lambda one: one.weights),
)


def lines(report: CheckReport) -> list[str]:
    """Return the table of the loop's settings as lines. If no training loop was checked, return an empty list."""
    if not report.settings:
        return []
    rows = [
        [one.setting.name, _value(one), one.effect, _default(one), *(_number(of(one)) for *_, of in _NUMBERS)]
        for one in report.settings
    ]
    untried = [f"{one.setting.name}: untried: {one.because}" for one in report.settings if one.effect == "untried"]
    return ["", *align_columns([_HEAD, *rows], right=range(4, 8), indent=""), *untried]


def section(report: CheckReport) -> Table | None:
    """Return the table of the loop's settings for the HTML page. If no training loop was checked, return None."""
    if not report.settings:
        return None
    columns = [
        column("tried", number=False), column("training", "Effect on training", number=False),
        column("default", "Whether this is the default of SFTConfig", number=False),
        *(column(label, title) for label, title, _ in _NUMBERS), column("meaning", number=False),
    ]  # fmt: skip
    rows = [
        {
            "name": one.setting.name, "title": one.setting.name, "anchor": one.slug, "record": "", "href": "",
            "fields": [_text(_value(one)), _effect(one), _text(_default(one)),
                       *(_measured(of(one), one) for *_, of in _NUMBERS), _meaning(one)],
        }
        for one in report.settings
    ]  # fmt: skip
    return grouped(
        "settings", "Settings of SFTTrainer", columns, [("", rows)], first="Setting", by="", file="check-loop-settings"
    )


def _value(one: SettingFound) -> str:
    shown = ", ".join(f"{key}={value}" for key, value in one.setting.config.items() if key in one.shown)
    return shown or "as the recipe"


def _default(one: SettingFound) -> str:
    return "yes" if one.is_default else "no"


def _number(value: float | int | None) -> str:
    return "-" if value is None else f"{value:d}" if isinstance(value, int) else f"{value:.1e}"


def _text(text: str) -> Field:
    return field(text, text)


def _meaning(one: SettingFound) -> Field:
    return _text(one.because or without_code_marks(one.setting.about))


def _measured(value: float | int | None, one: SettingFound) -> Field:
    if value is None:
        return unmeasured(one.because or "no loss differs by more than rounding errors explain")
    return field(_number(value), value)


def _effect(one: SettingFound) -> Field:
    surprise = one.effect != one.setting.effect
    why = f"suites/loops/trl.yaml says that it {WORDS[one.setting.effect]}" if surprise else ""
    return field(one.effect, one.effect, tone="bad" if surprise else "", why=why)
