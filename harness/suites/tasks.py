"""Load tasks: lm-eval YAML files whose `metadata` names the data for scoring and training. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from harness import yaml_lines
from harness.assets import fetch, lm_eval_files, rows
from harness.assets.table import Rows, Source, resolve
from harness.errors import HarnessError, Problem, SuiteError, UsageError, did_you_mean, plural, sort_problems
from harness.records.record import FrozenModel
from harness.resources import data_folder, user_path
from harness.suites import lm_eval_keys
from harness.suites.schema import SYNTHETIC
from harness.yaml_lines import Document

Role = Literal["data", "train"]
"""Role of a source in a task; one source may have both."""


class Answers(FrozenModel):
    """Rules for training on a task with texts as answers."""

    loss: Literal["answer", "all"] = "answer"
    """Tokens that have a loss: the tokens of the answer, or all tokens except the first."""
    eos: bool = True
    """True if an answer ends with the tokenizer's end-of-sequence token."""


class Metadata(BaseModel):
    """The keys in `metadata` of a task that peft-harness reads. lm-eval stores further keys there."""

    model_config = ConfigDict(frozen=True, strict=True, extra="allow")

    data: Annotated[str, Field(min_length=1)]
    train: str = ""
    test: Annotated[int, Field(ge=1)]
    shuffle_seed: Annotated[int, Field(ge=0, lt=2**32)]


class LabelledMetadata(Metadata):
    """`metadata` of a task with classes."""

    labels: Annotated[int, Field(ge=2, le=1000)]
    text: Annotated[str, Field(min_length=1)]


class AnsweredMetadata(Metadata):
    """`metadata` of a task with texts as answers; see `Answers`."""

    loss: Literal["answer", "all"] = "answer"
    eos: bool = True
    filter: str = ""


class LabelledFile(BaseModel):
    """Top level of the file of a task with classes. lm-eval's own keys are checked by `lm_eval_keys`."""

    model_config = Metadata.model_config

    metadata: LabelledMetadata


class AnsweredFile(BaseModel):
    """Top level of the file of a task with texts as answers."""

    model_config = Metadata.model_config

    metadata: AnsweredMetadata


class TaskSpec(FrozenModel):
    """The part of a task that a worker receives."""

    name: str
    spec: dict[str, Any]
    """All keys of the task's file, `metadata` included."""
    labels: int
    """Number of classes for an encoder; 0: for causal models only."""
    test: int
    """Number of test rows: the first rows after a shuffle with `shuffle_seed`. 0 for lm-eval's own task: it has a split."""
    shuffle_seed: int
    answers: Answers | None = None
    """None for a task with classes."""
    filter: str = "none"
    """Name of lm-eval's filter that scores the task."""


class Task(TaskSpec):
    """A task, with its sources. `synthetic` has none."""

    path: Path
    data: Source | None
    train: Source | None = None
    """Separate training set; if None, training uses the rows of `data` that are not test rows."""
    upstream: lm_eval_files.TaskFile | None = None
    """The file of one of lm-eval's own tasks, which have their own splits; None for any other task."""

    @property
    def trains(self) -> bool:
        """True if the task has a training split."""
        return self.upstream is None or "train" in self.upstream.splits

    def problems(self, role: Role, source: Source, path: Path) -> list[Problem]:
        """Return the mistakes in `path`, the file of `source`. role: the role of this source in the task."""
        if self.upstream is not None:
            return []  # lm-eval reads it
        if role == "train":
            return rows.problems(source, path, self.labels)
        return rows.problems(source, path, self.labels, self.test, trains=self.train in (None, self.data))


def names() -> list[str]:
    """List the tasks that come with the harness."""
    return sorted([*(path.stem for path in (data_folder("suites") / "tasks").glob("*.yaml")), SYNTHETIC])


def load(name: str, base: Path, sources: Mapping[str, Source]) -> Task:
    """Load a task by its name, or by its path from `base`.

    As in `loader.load`, there are two stages. Raises SuiteError with all mistakes of the first stage that finds any. The
    second stage also reads local data files, so that their mistakes are found before anything runs.
    """
    if name == SYNTHETIC:
        return Task(name=name, path=Path(name), spec={}, data=None, labels=2, test=0, shuffle_seed=0)
    if name.startswith(lm_eval_files.PREFIX):
        return _upstream(name)
    document = yaml_lines.read(_find(name, base))
    if document.data.get("output_type") == "generate_until":
        return _answered(name, document, sources)
    return _labelled(name, document, sources)


def _labelled(name: str, document: Document, sources: Mapping[str, Source]) -> Task:
    metadata = yaml_lines.validate(document, LabelledFile).metadata
    problems = lm_eval_keys.problems(document, metadata.labels)
    if metadata.text != "text":
        what = f"`text` is `{metadata.text}`, but rows have {', '.join(lm_eval_keys.LABELLED)}"
        hint = f"write `text: text`, and in the data's source `rows: {{text: {metadata.text}}}`"
        problems.append(Problem(document.where("metadata", "text"), what, hint))
    return _task(name, document, metadata, sources, problems, labels=metadata.labels)


def _answered(name: str, document: Document, sources: Mapping[str, Source]) -> Task:
    metadata = yaml_lines.validate(document, AnsweredFile).metadata
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
    """Return the task. Raises SuiteError with `problems` and the mistakes in its sources. fields: further fields of Task."""
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
    """Return one of lm-eval's own tasks. Raises UsageError if it cannot run here."""
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
        what, hint = f"reads missing files: {', '.join(absent)}", "start in the folder that their paths are relative to"
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
    """Return the source that `metadata` names at `key`. If it is unknown or no data, add a problem and return None."""
    try:
        source = resolve(name, sources, document.path.parent, kind="data")
        if source.kind == "data":
            return source
        raise UsageError(f"`{name}` is a model", hint="name a source of kind data")
    except HarnessError as error:
        problems.append(Problem(document.where("metadata", key), error.what, error.hint))
        return None


def _unfit(document: Document, task: Task) -> list[Problem]:
    """Return the mistakes in the task's sources: in the kind of their rows, and in each row of a local file."""
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
