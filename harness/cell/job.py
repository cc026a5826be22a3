"""The job of a worker process: one Cell (one setup to measure), and the local path of each of its models and data sets.

A worker fetches nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol

from harness.assets.table import Source
from harness.records.imported import Imported
from harness.records.notes import concurrency_note
from harness.records.record import AssetUse, Cell, FrozenModel, Json, Record, WorkerStart
from harness.suites.tasks import TaskSpec


class Emit(Protocol):
    """A function that reports progress to the runner."""

    def __call__(self, event: str, /, **facts: Json) -> None:
        """Report the event of this name, with facts about it."""


class Asset(FrozenModel):
    """A model or data set on this machine."""

    path: str
    source: Source
    use: AssetUse


class JobTask(TaskSpec):
    """A task, with its assets on this machine."""

    use: AssetUse
    train: Asset | None = None
    file: str = ""
    """Path of the task's YAML file if lm-eval defines the task; otherwise empty."""


class ImportedAdapter(FrozenModel):
    """A finished adapter on this machine, which a Cell evaluates instead of training one."""

    folder: str
    """Folder with adapter_config.json and adapter_model.safetensors."""
    facts: Imported
    """Origin of the adapter, and what its folder states about its training, e.g. logged losses."""


class KnownGate(FrozenModel):
    """The parity gate of an earlier Cell of the run. A Cell with the same key reuses the result of this gate.

    The gate compares the adapted model with a reference before training.
    """

    key: str
    """Hash of everything that the result of the gate depends on."""
    record: str
    """The Record of the earlier Cell, as `cell_id.attempt`."""
    because: str = ""
    """Reason why the gate failed. Empty if it passed."""
    merged_recipe: str = ""
    """Recipe of the earlier Cell, as `Cell.recipe_id`, if its merged weights passed their check after training. Empty if
    they did not, or were not checked."""


class Job(FrozenModel):
    """One attempt at one Cell, with everything that its worker needs to know."""

    run: str
    folder: str
    attempt: int
    cell: Cell
    model: Asset
    data: Asset | None
    """The data set; None for the task `synthetic`, which has random tokens."""
    task: JobTask
    device: Literal["cpu", "cuda"]
    launched: float = 0.0
    """The value of time.time() when the process was started. The start-up phase begins at this time."""
    threads: int | None = None
    """Number of CPU threads that the Cell may use; None for one per available core."""
    at_once: int = 1
    """Number of Cells, this one included, that may run on the same machine at the same time."""
    start: WorkerStart = ""
    """Start of the worker: as a new `process` or as a `fork`. Empty until the runner has chosen."""
    python: str = ""
    """Path of the interpreter that runs the Cell; empty for the one that runs the harness."""
    server_python: str = ""
    """Path of the interpreter of the Cell's model server; empty for the one that runs the Cell."""
    gpu: str = ""
    """UUID of the GPU that only this Cell uses; empty on a CPU, or if the batch system assigns a GPU."""
    imported: ImportedAdapter | None = None
    """The finished adapter that the Cell loads. None for a Cell that trains, or that evaluates the base model."""
    known_gate: KnownGate | None = None
    """Parity gate of an earlier Cell. This Cell reuses its result if the keys of both gates are equal. None: no such
    Cell."""

    def record(self, *, notes: Sequence[str] = (), **outcome: Any) -> Record:
        """Return the Record of this attempt. outcome: values of the Record's fields that the job does not determine."""
        outcome = {"imported": self.imported.facts if self.imported else None} | outcome
        return Record(
            run=self.run, cell_id=self.cell.cell_id, attempt=self.attempt, cell=self.cell, device=self.device,
            assets=used(self.model, self.data, self.task), notes=[*concurrency_note(self.at_once), *notes],
            concurrent_cells=self.at_once, start=self.start, **outcome,
        )  # fmt: skip


def used(model: Asset, data: Asset | None, task: JobTask) -> list[AssetUse]:
    """Return the entries of `Record.assets` for the model, data set and task of a Cell."""
    return [model.use, *(asset.use for asset in (data, task.train) if asset), task.use]
