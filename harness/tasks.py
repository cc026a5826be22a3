"""Tasks: lm-eval YAML files whose `metadata` says which data they score and how the data are split. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from harness import yaml_lines
from harness.assets.table import Source, resolve
from harness.errors import HarnessError, Problem, SuiteError, UsageError
from harness.resources import folder
from harness.spelling import near
from harness.suite_file import explain

_LM_EVAL_KEYS = ("task", "output_type", "doc_to_text", "doc_to_target", "doc_to_choice", "metric_list")


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
    """

    name: str
    path: Path
    spec: dict[str, Any]
    data: Source
    labels: int
    test: int
    shuffle_seed: int
    text: str


def names() -> list[str]:
    """List the tasks that come with the harness."""
    return sorted(path.stem for path in (folder("suites") / "tasks").glob("*.yaml"))


def load(name: str, base: Path, sources: Mapping[str, Source]) -> Task:
    """Read a task by its name, or by its path from `base`; raises SuiteError with all mistakes of the file."""
    document = yaml_lines.load(_find(name, base))
    problems: list[Problem] = [
        Problem(document.where(), f"`{key}` is missing", f"an lm-eval task needs `{key}:`")
        for key in _LM_EVAL_KEYS
        if key not in document.data
    ]
    metadata, found = _metadata(document)
    problems += found
    if metadata is not None:
        choices = document.data.get("doc_to_choice")
        if isinstance(choices, list) and len(choices) != metadata.labels:
            what = f"`labels` is {metadata.labels}, but `doc_to_choice` has {len(choices)}"
            problems.append(Problem(document.where("metadata", "labels"), what, "make them agree"))
        try:
            source = resolve(metadata.data, sources, document.path.parent, kind="data")
            if source.kind != "data":
                raise UsageError(f"`{metadata.data}` is a model", mend="name a source of kind data")
        except HarnessError as error:
            problems.append(Problem(document.where("metadata", "data"), error.what, error.mend))
    if problems or metadata is None:
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
