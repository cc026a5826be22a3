"""Prepare a task for the workers: fetch its data and check them before any Cell runs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from harness.assets import lm_eval_files
from harness.assets.table import Source
from harness.cell.job import Asset, JobTask
from harness.errors import Problem, SuiteError
from harness.records.record import AssetUse
from harness.suites.tasks import Task, TaskSpec


def ready(task: Task, items: int, where: str, fetched: Callable[[Source], Asset]) -> tuple[Asset | None, JobTask]:
    """Fetch the data of a task. Return the data (None for the task `synthetic`), and the task as workers need it.

    Raises SuiteError if the data do not fit the task. items: least number of test items that the task must have. where:
    `file:line` of the value that sets `items`. fetched: function that fetches a source and returns its asset.
    """
    data = fetched(task.data) if task.data else None
    train = fetched(task.train) if task.train else None
    problems: list[Problem] = []
    if task.data and data:
        problems += task.problems("data", task.data, Path(data.path))
    if task.train and train:
        problems += task.problems("train", task.train, Path(train.path))
    if (
        task.upstream is not None
        and data
        and items > (most := lm_eval_files.count_rows(Path(data.path), task.upstream.splits["test"]))
    ):
        what = f"`items` is {items}, those of `tune` included, and {task.name} has {most} test items"
        problems.append(Problem(where, what, f"write at most {most}"))
    if problems:
        raise SuiteError(list(dict.fromkeys(problems)))
    spec = hashlib.sha256(json.dumps(task.spec, sort_keys=True).encode()).hexdigest()
    return data, JobTask(
        **{name: getattr(task, name) for name in TaskSpec.model_fields},
        use=AssetUse(name=task.name, source=f"task:{task.path.name}", sha256=spec),
        train=train,
        file=str(task.path) if task.upstream else "",
    )
