"""Worker process of `check --loop`: checks one loop, and tries each setting of its library.

The command is `python -m harness.cell.loop_checks.worker EVENTS LIFELINE TASK`, where TASK is `{"loop": NAME}`. The
worker writes a LoopEvent to the file descriptor EVENTS after each check and each setting. It is killed when the other
end of the pipe LIFELINE closes.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from importlib import import_module

from harness.cell.loop_checks.protocol import LoopEvent
from harness.process.event_pipe import event_writer
from harness.records.training import LOOP_MODULES, Loop

TRAINEES = (
    ("lora", "reference", "float32"),
    ("lora", "fused", "float32"),
    ("dora", "reference", "float32"),
    ("dora", "fused", "float32"),
    ("adalora", "reference", "float32"),
    ("lora", "fused", "bfloat16"),
)
"""Method, implementation and dtype of each training run that is checked."""


def main(events: int, lifeline: int, name: Loop) -> None:
    """Run all checks of a loop, try all its settings, and write the results as events."""
    with event_writer(events, lifeline) as emit:
        for event in _events(name):
            emit(**event.model_dump(mode="json", exclude_defaults=True))


def _events(name: Loop) -> Iterator[LoopEvent]:
    try:
        import_module(LOOP_MODULES[name])
    except ImportError as error:
        yield LoopEvent(missing=f"needs {LOOP_MODULES[name]}, which cannot be imported ({error})")
        return
    from harness.cell.loop_checks import checks, settings
    from harness.cell.loop_checks.observed_training import Trainee
    from harness.cell.training import loops
    from harness.conformance.findings import loop_settings
    from harness.methods.registry import discover
    from harness.records import environment

    yield LoopEvent(environment=environment.describe())
    registry, loop = discover(), loops.find(name)
    references: dict[tuple[str, str], checks.ReferenceTrainings] = {}
    for method, implementation, dtype in TRAINEES:
        yield LoopEvent(begin=f"{method} by {implementation} in {dtype}")
        trainee = Trainee(method, implementation, dtype, registry)
        reference = references.setdefault((method, dtype), checks.ReferenceTrainings(trainee))
        trainings = checks.ComparedTrainings(trainee, loop.train, reference)
        for check in checks.CHECKS:
            yield LoopEvent(outcome=checks.outcome_of(name, check, trainings))
    yield LoopEvent(begin="settings, one at a time")
    trials = settings.SettingTrials(registry, loop)
    for setting in loop_settings.load(name):
        yield LoopEvent(setting=trials.run(setting))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3])["loop"])
