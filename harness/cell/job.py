"""What a worker is told: one Cell, with every name already resolved to a local path. Nothing is fetched by a worker."""

from __future__ import annotations

from typing import Any, Literal, Protocol

from harness.assets.table import Source
from harness.records.cost import AT_ONCE
from harness.records.record import AssetUse, Cell, FrozenModel, Json
from harness.suites.tasks import Answers


class Emit(Protocol):
    """Reports progress to the runner."""

    def __call__(self, event: str, /, **facts: Json) -> None:
        """Report one event, with its facts."""


class Asset(FrozenModel):
    """A model or data set on this machine."""

    path: str
    source: Source
    use: AssetUse


class JobTask(FrozenModel):
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
    judge: str = "none"
    """The filter of lm-eval that counts."""


class Job(FrozenModel):
    """One attempt at one Cell."""

    run: str
    folder: str
    attempt: int
    cell: Cell
    model: Asset
    data: Asset | None
    """None for the task `synthetic`."""
    task: JobTask
    device: Literal["cpu", "cuda"]
    launched: float = 0.0
    """time.time() when the process was started: its start-up is counted from here."""
    threads: int | None = None
    """How many it computes with; None means all cores that it may use."""
    at_once: int = 1
    """So many Cells, this one among them, may run on the same machine at the same time."""
    gpu: str = ""
    """The UUID of the GPU that it has for itself; empty where the place that started it decides, and on a CPU."""

    @property
    def notes(self) -> list[str]:
        """What the Record will say of where it ran."""
        return [f"up to {self.at_once} {AT_ONCE}: its times share the machine"] if self.at_once > 1 else []

    @property
    def assets(self) -> list[AssetUse]:
        """What the Record will say it used."""
        return used(self.model, self.data, self.task)


def used(model: Asset, data: Asset | None, task: JobTask) -> list[AssetUse]:
    """List what a Cell uses, as its Record has it."""
    return [model.use, *(asset.use for asset in (data, task.train) if asset), task.use]
