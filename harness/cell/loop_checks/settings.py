"""Train with each setting of another library's loop in turn, and compare with the harness's own loop."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from harness.analysis import trajectories
from harness.cell.loop_checks.observed_training import RECIPE, Observed, Trainee, observe
from harness.cell.outcomes import CellOutcomeError
from harness.cell.training import loop
from harness.cell.training.loops import RefusedOptions, TrainingLoop
from harness.conformance.comparison.tolerance_policies import carried_noise
from harness.conformance.findings.loop_settings import LoopSetting, SettingFound
from harness.conformance.tolerance_constants import TRAJECTORY_FACTOR
from harness.methods.registry import Registry
from harness.records.record import Training

_STEPS = 12
"""Number of steps of each training run. The checks use fewer steps, but some settings need several to show an effect."""


@dataclass(frozen=True)
class _Own:
    """Two training runs of the harness's own loop, in float32 and in float64, with which other runs are compared."""

    float32: Observed
    float64: Observed


class SettingTrials:
    """Trains a model with each setting of another library's loop, and compares with runs of the harness's own loop."""

    def __init__(self, registry: Registry, foreign: TrainingLoop) -> None:
        self._registry, self._loop = registry, foreign
        self._own: dict[int, _Own] = {}

    def run(self, setting: LoopSetting) -> SettingFound:
        """Train with one setting, and return the effect of this setting on training."""
        defaults = {key: self._loop.defaults.get(key, ...) == value for key, value in setting.config.items()}
        found = partial(SettingFound, setting=setting, defaults=defaults)
        if unknown := [key for key in setting.config if key not in self._loop.defaults]:
            return found(effect="untried", because=f"this release has no option `{unknown[0]}`")
        options = {"options": setting.config, "own_optimizer": setting.own_optimizer}
        try:
            seen = observe(partial(self._loop.train, **options), self._trainee(setting.warmup))
        except RefusedOptions as error:
            return found(effect="refused", because=_first_line(error))
        except CellOutcomeError as error:
            return found(effect="changes", because=f"training ends early: {_first_line(error)}")
        except Exception as error:  # noqa: BLE001  # the other settings are tried all the same
            return found(effect="untried", because=f"{type(error).__name__}: {_first_line(error)}")
        return _compared(setting, defaults, seen, self._own_training(setting.warmup))

    def _own_training(self, warmup: int) -> _Own:
        if warmup not in self._own:
            self._own[warmup] = _Own(*(observe(loop.train, one) for one in _pair(self._trainee(warmup))))
        return self._own[warmup]

    def _trainee(self, warmup: int) -> Trainee:
        recipe: Training = RECIPE.model_copy(update={"warmup": warmup, "steps": _STEPS})
        return Trainee("lora", "reference", "float32", self._registry, recipe)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _pair(trainee: Trainee) -> tuple[Trainee, Trainee]:
    return trainee, replace(trainee, dtype="float64")


def _compared(setting: LoopSetting, defaults: dict[str, bool], seen: Observed, own: _Own) -> SettingFound:
    """Compare the training run `seen` with the runs `own`, and return the effect of the setting on training.

    Losses are compared as in the check `losses`, and final tensors as in the check `weights`.
    """
    truth, mine = own.float64.samples.losses, seen.samples.losses
    noise = [abs(a - b) for a, b in zip(own.float32.samples.losses, truth, strict=True)]
    allowed = trajectories.allowed_errors(truth, noise, "float32")
    beyond = [t for t, (a, b, most) in enumerate(zip(mine, truth, allowed, strict=True), 1) if abs(a - b) > most]
    judged = carried_noise(seen.end, own.float64.end, own.float32.end, "float32", TRAJECTORY_FACTOR)
    away = [abs(a - b) for a, b in zip(mine, own.float32.samples.losses, strict=True)]
    return SettingFound(
        setting=setting,
        defaults=defaults,
        effect="changes" if beyond or not judged.passed else "same",
        first=away[0],
        worst=max(away),
        step=beyond[0] if beyond else None,
        weights=_distance(seen.end, own.float32.end),
    )


def _distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    a, b = (torch.cat([t.flatten() for t in tensors.values()]) for tensors in (one, other))
    return float(torch.linalg.vector_norm(a - b) / torch.linalg.vector_norm(b))
