"""What a worker is told: one Cell, with every name already resolved to a local path. Nothing is fetched by a worker."""

from __future__ import annotations

from typing import Any, Literal

from harness.assets.table import Source
from harness.records import AssetUse, Cell, Frozen
from harness.tasks import Answers


class Asset(Frozen):
    """A model or data set on this machine."""

    path: str
    source: Source
    use: AssetUse


class TaskWork(Frozen):
    """The task: its lm-eval mapping, and how its rows are split. The fields are those of `tasks.Task`."""

    name: str
    spec: dict[str, Any]
    labels: int
    test: int
    shuffle_seed: int
    use: AssetUse
    answers: Answers | None = None
    train: Asset | None = None
    file: str = ""
    """Of one of lm-eval's own tasks, its YAML."""


class Work(Frozen):
    """One attempt at one Cell."""

    run: str
    folder: str
    attempt: int
    cell: Cell
    model: Asset
    data: Asset
    task: TaskWork
    device: Literal["cpu", "cuda"]
    launched: float
    """time.time() when the process was started: its start-up is counted from here."""

    @property
    def assets(self) -> list[AssetUse]:
        """What the Record will say it used."""
        return used(self.model, self.data, self.task)


def used(model: Asset, data: Asset, task: TaskWork) -> list[AssetUse]:
    """List what a Cell of these three uses."""
    return [model.use, data.use, *([task.train.use] if task.train else []), task.use]
