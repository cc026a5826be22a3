"""The training loops that a suite can choose by `training.loop`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from harness.cell.training.loop import StepSamples
from harness.records.record import Loop


class RefusedOptions(ValueError):  # noqa: N818  # an answer of a library, not an error
    """Raised by a loop's `train` if its library refuses the options. The message comes from the library."""


@dataclass(frozen=True)
class TrainingLoop:
    """The functions of a training loop, and the options of its library."""

    name: Loop
    train: Callable[..., StepSamples]
    """Function that trains a model. It has the arguments, the result and the errors of `loop.train`."""
    step: Callable[..., object]
    """Function that takes one more step, so that its memory can be counted. It has the arguments of `loop.step`."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Option of the loop's library -> its default. If a loop has options, its `train` has two more arguments:
    `options`, and `own_optimizer`, which says whether the library makes its own optimizer and schedule."""


def find(name: Loop) -> TrainingLoop:
    """Return the loop called `name`. For some loops this imports a library, which takes seconds and may fail."""
    if name == "trl":
        from harness.cell.training import trl_loop

        return TrainingLoop("trl", trl_loop.train, trl_loop.step, trl_loop.defaults())
    from harness.cell.training import loop

    return TrainingLoop("harness", loop.train, loop.step)
