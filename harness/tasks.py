"""Tasks: lm-eval YAML files whose `metadata` says which data they score and how the data are split. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from harness import task_keys, yaml_lines
from harness.assets import fetch, rows
from harness.assets.table import Source, resolve
from harness.errors import HarnessError, Problem, SuiteError, UsageError
from harness.resources import folder
from harness.spelling import near
from harness.suite_file import explain

SYNTHETIC = "synthetic"
"""The task without texts: see `harness.unscored`."""


class Metadata(BaseModel):
    """What peft-harness reads from a task's `metadata`; lm-eval keeps its own keys there too."""

    model_config = ConfigDict(frozen=True, strict=True, extra="allow")

    data: Annotated[str, Field(min_length=1)]
    labels: Annotated[int, Field(ge=2, le=1000)]
    test: Annotated[int, Field(ge=1)]
    shuffle_seed: Annotated[int, Field(ge=0, lt=2**32)]
    text: Annotated[str, Field(min_length=1)]


@dataclass(frozen=True)
class Task:
    """One task.

    spec: the whole lm-eval mapping, as read. data: the Source that `metadata.data` names. labels: how many classes.
    test: the first rows after one shuffle with `shuffle_seed`; the rest train. text: the column that encoders read.
    Of `synthetic` all but the name is empty, and data is None.
    """

    name: str
    path: Path
    spec: dict[str, Any]
    data: Source | None
    labels: int
    test: int
    shuffle_seed: int
    text: str


def names() -> list[str]:
    """List the tasks that come with the harness."""
    return sorted([*(path.stem for path in (folder("suites") / "tasks").glob("*.yaml")), SYNTHETIC])


def load(name: str, base: Path, sources: Mapping[str, Source]) -> Task:
    """Read a task by its name, or by its path from `base`; raises SuiteError with all mistakes of the file.

    Data that are a local file are read too: what is wrong with them is found before anything runs.
    """
    if name == SYNTHETIC:
        return Task(name, Path(name), {}, None, labels=0, test=0, shuffle_seed=0, text="")
    document = yaml_lines.load(_find(name, base))
    metadata, problems = _metadata(document)
    problems += task_keys.problems(document, metadata.labels if metadata else None)
    source = None
    if metadata is not None:
        if metadata.text != "text":
            what = f"`text` is `{metadata.text}`, but a row has {', '.join(task_keys.COLUMNS)}"
            mend = f"write `text: text`, and in the data's source `rows: {{text: {metadata.text}}}`"
            problems.append(Problem(document.where("metadata", "text"), what, mend))
        try:
            source = resolve(metadata.data, sources, document.path.parent, kind="data")
            if source.kind != "data":
                raise UsageError(f"`{metadata.data}` is a model", mend="name a source of kind data")
            if source.scheme == "file":
                problems += rows.problems(source, fetch.ensure(source), metadata.labels, metadata.test)
        except HarnessError as error:
            at = f" ({error.where})" if error.where else ""
            problems.append(Problem(document.where("metadata", "data"), error.what + at, error.mend))
    if problems or metadata is None or source is None:
        raise SuiteError(problems)
    return Task(
        name=name, path=document.path, spec=document.data, data=source, labels=metadata.labels,
        test=metadata.test, shuffle_seed=metadata.shuffle_seed, text=metadata.text,
    )  # fmt: skip


def _find(name: str, base: Path) -> Path:
    if name.endswith((".yaml", ".yml")):
        return base / name
    if name not in names():
        raise UsageError(f"unknown task `{name}`", mend=near(name, names(), "a path to an lm-eval YAML, or one of"))
    return folder("suites") / "tasks" / f"{name}.yaml"


def _metadata(document: yaml_lines.Document) -> tuple[Metadata | None, list[Problem]]:
    try:
        return Metadata.model_validate(document.data.get("metadata", {})), []
    except ValidationError as error:
        at = ("metadata",) if "metadata" in document.data else ()
        return None, [problem for _, problem in explain(error, Metadata, document, at)]
