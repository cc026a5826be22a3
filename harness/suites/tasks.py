"""Load tasks without torch. A task is an lm-eval YAML file whose `metadata` names the data for scoring and training."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from harness import yaml_validation
from harness.assets import fetch, lm_eval_files, rows
from harness.assets.table import Rows, Source, resolve
from harness.errors import HarnessError, Problem, SuiteError, UsageError, did_you_mean, plural, sort_problems
from harness.records.record import FrozenModel
from harness.resources import data_folder, user_path
from harness.suites import lm_eval_keys
from harness.suites.schema import SYNTHETIC
from harness.yaml_validation import Document

Role = Literal["data", "train"]
"""Use of a source by a task: `data` for scoring, `train` for training. One source may have both roles."""


class Answers(FrozenModel):
    """Settings of the training on a task whose answers are texts."""

    loss: Literal["answer", "all"] = "answer"
    """The tokens that have a loss: `answer` for the tokens of the answer, `all` for all tokens except the first."""
    eos: bool = True
    """True if an answer ends with the tokenizer's end-of-sequence token."""


class Metadata(BaseModel):
    """The keys under `metadata` that peft-harness reads. lm-eval puts other keys there, which are ignored."""

    model_config = ConfigDict(frozen=True, strict=True, extra="allow")

    data: Annotated[str, Field(min_length=1)]
    train: str = ""
    test: Annotated[int, Field(ge=1)]
    shuffle_seed: Annotated[int, Field(ge=0, lt=2**32)]


class LabelledMetadata(Metadata):
    """The keys under `metadata` of a task with classes."""

    labels: Annotated[int, Field(ge=2, le=1000)]
    text: Annotated[str, Field(min_length=1)]


class AnsweredMetadata(Metadata):
    """The keys under `metadata` of a task whose answers are texts. `Answers` explains `loss` and `eos`."""

    loss: Literal["answer", "all"] = "answer"
    eos: bool = True
    filter: str = ""


class LabelledFile(BaseModel):
    """The top level of the file of a task with classes. `lm_eval_keys` checks the keys of lm-eval."""

    model_config = Metadata.model_config

    metadata: LabelledMetadata


class AnsweredFile(BaseModel):
    """The top level of the file of a task whose answers are texts."""

    model_config = Metadata.model_config

    metadata: AnsweredMetadata


class TaskSpec(FrozenModel):
    """The part of a task that the process of a Cell needs."""

    name: str
    spec: dict[str, Any]
    """All keys of the task's file, including `metadata`."""
    labels: int
    """Number of classes. It is 0 if only causal models can do the task."""
    test: int
    """Number of test rows: the first rows after a shuffle with `shuffle_seed`. It is 0 for a task that has its own test
    split."""
    shuffle_seed: int
    answers: Answers | None = None
    """Settings of the training on the answers. None for a task with classes."""
    filter: str = "none"
    """Name of the lm-eval filter whose result is scored."""


class Task(TaskSpec):
    """A task with its sources. The task `synthetic` has no sources."""

    path: Path
    data: Source | None
    train: Source | None = None
    """Source of the training rows. If it is None, the rows of `data` that are not test rows are used for training."""
    upstream: lm_eval_files.TaskFile | None = None
    """File of a task that comes with lm-eval and has its own splits. None for any other task."""

    @property
    def trains(self) -> bool:
        """True if the task has a training split."""
        return self.upstream is None or "train" in self.upstream.splits

    def problems(self, role: Role, source: Source, path: Path) -> list[Problem]:
        """Return the mistakes in a data file of the task.

        role: how the task uses `source`. path: the file of `source`.
        """
        if self.upstream is not None:
            return []  # lm-eval reads it
        if role == "train":
            return rows.problems(source, path, self.labels)
        return rows.problems(source, path, self.labels, self.test, trains=self.train in (None, self.data))


def names() -> list[str]:
    """List the names of the tasks that come with the harness."""
    return sorted([*(path.stem for path in (data_folder("suites") / "tasks").glob("*.yaml")), SYNTHETIC])


def load(name: str, base: Path, sources: Mapping[str, Source]) -> Task:
    """Load a task by its name, or by its path relative to the folder `base`.

    The file is checked in two stages: types in `metadata`, then all else. Raises SuiteError with all mistakes of the
    first stage that finds any. The second stage also reads local data files, to find mistakes before anything runs.
    Raises UsageError for an unknown task.
    """
    if name == SYNTHETIC:
        return Task(name=name, path=Path(name), spec={}, data=None, labels=2, test=0, shuffle_seed=0)
    if name.startswith(lm_eval_files.PREFIX):
        return _upstream(name)
    document = yaml_validation.read(_find(name, base))
    if document.data.get("output_type") == "generate_until":
        return _answered(name, document, sources)
    return _labelled(name, document, sources)


def _labelled(name: str, document: Document, sources: Mapping[str, Source]) -> Task:
    metadata = yaml_validation.validate(document, LabelledFile).metadata
    problems = lm_eval_keys.problems(document, metadata.labels)
    if metadata.text != "text":
        what = f"`text` is `{metadata.text}`, but rows have {', '.join(lm_eval_keys.LABELLED)}"
        hint = f"write `text: text`, and in the data's source `rows: {{text: {metadata.text}}}`"
        problems.append(Problem(document.where("metadata", "text"), what, hint))
    return _task(name, document, metadata, sources, problems, labels=metadata.labels)


def _answered(name: str, document: Document, sources: Mapping[str, Source]) -> Task:
    metadata = yaml_validation.validate(document, AnsweredFile).metadata
    problems = lm_eval_keys.problems(document, None)
    filters = lm_eval_keys.filters(document.data)
    chosen = metadata.filter or (filters[0] if len(filters) == 1 else "")
    if filters and chosen not in filters:
        what = f"`filter` is `{chosen}`, but `filter_list` has no such filter" if chosen else "`filter` is missing"
        problems.append(Problem(document.where("metadata", "filter"), what, f"write one of {', '.join(filters)}"))
    answers = Answers(loss=metadata.loss, eos=metadata.eos)
    return _task(name, document, metadata, sources, problems, labels=0, answers=answers, filter=chosen)


def _task(
    name: str,
    document: Document,
    metadata: Metadata,
    sources: Mapping[str, Source],
    problems: list[Problem],
    **fields: Any,
) -> Task:
    """Return a task. fields: further fields of Task.

    Raises SuiteError with the given `problems` and the mistakes in the task's sources, if there are any.
    """
    data = _source(document, "data", metadata.data, sources, problems)
    train = _source(document, "train", metadata.train, sources, problems) if metadata.train else None
    task = Task(
        name=name, path=document.path, spec=document.data, data=data, train=train, test=metadata.test,
        shuffle_seed=metadata.shuffle_seed, **fields,
    )  # fmt: skip
    if data is not None:
        problems += _unfit(document, task)
    if problems:
        raise SuiteError(sort_problems(problems))
    return task


def _find(name: str, base: Path) -> Path:
    if name.endswith((".yaml", ".yml")):
        return base / user_path(name)
    if name not in names():
        hint = did_you_mean(name, names(), "write the path of an lm-eval YAML, or one of")
        raise UsageError(f"unknown task `{name}`", hint=hint)
    return data_folder("suites") / "tasks" / f"{name}.yaml"


def _upstream(name: str) -> Task:
    """Return a task that comes with lm-eval. Raises UsageError if it cannot be used here."""
    file = lm_eval_files.find(name)
    spec, filters = file.spec, lm_eval_keys.filters(file.spec)
    kind = spec.get("output_type", "generate_until")
    dataset = spec.get("dataset_path")
    metrics = spec.get("metric_list") or [{"metric": "acc" if kind == "multiple_choice" else "exact_match"}]
    own_task = "write your own task"
    if "class" in spec:
        what, hint = "is a Python class, not a YAML task", "name a task that is described in YAML"
    elif "custom_dataset" in spec or not isinstance(dataset, str) or "test" not in file.splits:
        what, hint = "names no data set with a test split", f"{own_task}, with its data in `metadata`"
    elif kind not in lm_eval_keys.METRICS:
        what, hint = f"has the output type {kind!r}", f"choose a task of type {' or '.join(lm_eval_keys.METRICS)}"
    elif not any(isinstance(m, dict) and m.get("metric") == lm_eval_keys.METRICS[kind] for m in metrics):
        what, hint = f"has no metric {lm_eval_keys.METRICS[kind]}, which Records need", own_task
    elif absent := [str(path) for path in file.data_files if not path.is_file()]:
        what, hint = (
            f"reads missing files: {', '.join(absent)}",
            "start peft-harness in the folder to which their paths are relative",
        )
    elif (spec.get("generation_kwargs") or {}).get("do_sample"):
        what, hint = "samples its answers; answers are generated greedily here", own_task
    elif not file.revision and dataset not in lm_eval_files.LOCAL:
        what = f"does not pin its data, {dataset}, which can change"
        hint = f"write {name}@ and the 40 hex digits of a commit of {dataset} on the hub"
    elif file.filter not in filters and (len(filters) > 1 or file.filter):
        what = f"has {plural(len(filters), 'filter')}"
        hint = f"choose one: {', '.join(f'lm-eval:{file.task}:{one}' for one in filters)}"
    else:
        source = f"lm-eval:{file.task}"
        return Task(
            name=name, path=file.path, spec=spec, labels=0, test=0, shuffle_seed=0,
            data=Source(name=name, kind="data", source=source, revision=file.revision, rows=Rows(format="splits")),
            answers=Answers() if kind == "generate_until" else None, upstream=file, filter=file.filter or filters[0],
        )  # fmt: skip
    raise UsageError(f"`{file.task}` {what}", where=str(file.path), hint=hint)


def _source(
    document: Document, key: str, name: str, sources: Mapping[str, Source], problems: list[Problem]
) -> Source | None:
    """Return the source that `metadata` names at `key`. If it is unknown or a model, add a problem and return None."""
    try:
        source = resolve(name, sources, document.path.parent, kind="data")
        if source.kind == "data":
            return source
        raise UsageError(f"`{name}` is a model", hint="name a source of kind data")
    except HarnessError as error:
        problems.append(Problem(document.where("metadata", key), error.what, error.hint))
        return None


def _unfit(document: Document, task: Task) -> list[Problem]:
    """Return the mistakes in a task's sources: rows of the wrong kind and, in local files, invalid rows."""
    problems: list[Problem] = []
    roles: tuple[tuple[Role, Source | None], ...] = (("data", task.data), ("train", task.train))
    for key, source in roles:
        if source is None or source.rows is None:
            continue
        where, holds = document.where("metadata", key), source.rows.holds
        wanted = ("labels",) if task.labels else ("answers", "text") if key == "train" else ("answers",)
        if holds not in wanted:
            what = f"the rows of {source.name} have {holds}, but this task's `{key}` needs {' or '.join(wanted)}"
            problems.append(Problem(where, what, f"write `rows: {{holds: {wanted[0]}, ...}}` in its source"))
        elif source.scheme == "file":
            try:
                problems += task.problems(key, source, fetch.ensure(source))
            except HarnessError as error:
                at = f" ({error.where})" if error.where else ""
                problems.append(Problem(where, error.what + at, error.hint))
    return list(dict.fromkeys(problems))
