"""Attempts with stub_worker.py as their worker, so that tests of executors take milliseconds and need no torch."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.assets import table
from harness.cell.job import Asset, Job, JobTask
from harness.records import environment, store
from harness.records.manifest import Manifest
from harness.records.record import Cell, Environment, Record
from harness.runner.attempt import RunContext
from support import recorded_run

SOURCE = table.Source(name="tiny-llama", kind="causal", source="made:tiny-llama")


def stub(folder: Path, cells: Sequence[Cell], here: Environment, acts: Mapping[int, str] | None = None) -> list[str]:
    """Return the worker's command. acts: by seed, what the worker does instead of writing the Record of the Cell."""
    records = folder / "records"
    records.mkdir(exist_ok=True)
    for cell in cells:
        record = recorded_run.record("reference", cell, environment=here, duration_s=0.01, device="cpu", provider=None)
        (records / f"{cell.seed}.json").write_text(record.model_dump_json(by_alias=True), encoding="utf-8")
    program = Path(__file__).with_name("stub_worker.py")
    return [sys.executable, "-S", str(program), str(records), json.dumps(acts or {})]


class Nobody:
    """A listener that only stores what it hears."""

    def __init__(self) -> None:
        self.heard: list[tuple[int, Any]] = []

    def begin(self, cell: Cell) -> None:
        self.heard.append((cell.seed, "begin"))

    def event(self, cell: Cell, event: dict[str, Any]) -> None:
        self.heard.append((cell.seed, event))

    def tick(self) -> None:
        pass


class Stubbed:
    """A run folder with Cells that differ only in their seeds. `run` returns the Records of an executor, by seed."""

    def __init__(self, path: Path, count: int, timeout: float = 60.0) -> None:
        self.here = environment.describe(2)
        self.cells = [recorded_run.cells(seed)["reference"] for seed in range(count)]
        path.mkdir(exist_ok=True)
        manifest = Manifest(
            run="stubbed", suite="stubbed", suite_file="stubbed.yaml", suite_sha256="", cells=self.cells,
            environment=self.here, argv=[], started=store.now(), harness_version="0",
        )  # fmt: skip
        self.folder = store.RunFolder.create(path / "run", manifest)
        self.path = path
        self.terms = RunContext(self.folder, self.here, timeout)
        self.nobody = Nobody()

    def command(self, acts: Mapping[int, str] | None = None) -> list[str]:
        return stub(self.path, self.cells, self.here, acts)

    def works(self, device: str = "cpu", last: Mapping[str, int] | None = None) -> Iterator[Job]:
        """Yield a job per Cell. last: numbers of the last attempts; None to look for each Cell."""
        use = recorded_run.assets()[0]
        asset = Asset(path=str(self.path), source=SOURCE, use=use)
        task = JobTask(name="t", spec={}, labels=2, test=1, shuffle_seed=0, use=use)
        for cell in self.cells:
            attempt = self.folder.next_attempt(cell.cell_id) if last is None else last.get(cell.cell_id, 0) + 1
            yield Job(
                run="stubbed", folder=str(self.folder.path), attempt=attempt, cell=cell, model=asset, data=asset,
                task=task, device="cuda" if device == "cuda" else "cpu",
            )  # fmt: skip

    def run(self, executor: Any, device: str = "cpu") -> dict[int, Record]:
        return {r.cell.seed: r for r in executor.run(self.works(device), self.terms, self.nobody)}
