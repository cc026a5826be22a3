"""Check one entry of a suite: merge its keys with the keys of its block, look up names, and check values."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.assets import model_folder, shapes
from harness.assets.environments import table as environments
from harness.assets.table import Source, resolve
from harness.errors import HarnessError, Problem, SuiteError, did_you_mean
from harness.methods.registry import Registry
from harness.methods.spec import FieldProblem, MethodInfo
from harness.records.record import Base, Dtype, Evaluation, Optimizer, Training
from harness.suites import loop_constraints, serving, synthetic_task, tasks, tuning
from harness.suites.constraints import combination_problems, duplicate_problems, training_problems
from harness.suites.schema import BaseKeys, CellKeys, Timed, TuneKeys
from harness.suites.tasks import Task
from harness.suites.tuning import Tune
from harness.yaml_validation import Document, KeyPath

MAX_CELLS = 10_000
"""Maximum number of Cells of a suite. More would take longer than a week at a minute each, so a mistake is likely."""
_CHECKED_LATER = (
    ("config", "targets"),
    ("config", "adapter_config"),
    ("training", "max_tokens"),
    ("training", "loop"),
    ("evaluation", "items"),
    ("prompts", "tokens"),
)


@dataclass(frozen=True)
class SuiteEntry:
    """One entry of a suite. Each axis is a list of values, and `expand` makes a Cell of every combination."""

    id: str
    where: str
    """Place of the entry in the suite, as `file:line`."""
    model: list[str]
    task: list[str]
    base: list[Base]
    config: dict[str, dict[str, list[Any]]]
    """Method -> field -> values. A field that the entry omits has its default."""
    implementation: list[str]
    environment: list[str]
    serve: list[str]
    optimizer: list[Optimizer]
    dtype: list[Dtype]
    seed: list[int]
    training: list[Training]
    evaluation: Evaluation
    latency: Timed
    tune: Tune | None
    places: dict[str, str]
    """Key -> its place in the suite, as `file:line`. It holds only the keys of `_CHECKED_LATER`, whose values are
    checked later against a model or data set."""


@dataclass
class SuiteContext:
    """State that all checks of one suite share: its file, the names that it may use, and the mistakes found so far."""

    document: Document
    registry: Registry
    methods: dict[str, MethodInfo]
    problems: list[Problem] = field(default_factory=list)
    sources: dict[str, Source] = field(default_factory=dict)
    tasks: dict[str, Task] = field(default_factory=dict)
    ids: dict[str, str] = field(default_factory=dict)
    """Id of an entry -> its place, as `file:line`."""
    entries: dict[str, CellKeys] = field(default_factory=dict)
    """Id of an entry -> its keys, merged with those of its block. Entries without a required key are left out. Values
    may be invalid."""

    @property
    def folder(self) -> Path:
        """The folder of the suite's file, to which relative paths in the suite refer."""
        return self.document.path.resolve().parent

    def problem(self, path: KeyPath, what: str, hint: str) -> None:
        """Add a mistake at `path`."""
        self.problems.append(Problem(self.document.where(*path), what, hint))

    @contextmanager
    def problem_if_raised(self, path: KeyPath) -> Iterator[None]:
        """Catch a HarnessError that is raised inside the context, and add its text as a mistake at `path`.

        If it is a SuiteError, add the mistakes that it lists instead.
        """
        try:
            yield
        except SuiteError as error:
            self.problems += error.problems
        except HarnessError as error:
            self.problem(path, f"{error.what} ({error.where})" if error.where else error.what, error.hint)


def check_entry(context: SuiteContext, block: KeyPath, cell: KeyPath) -> SuiteEntry | None:
    """Check one entry and return it. If it has a mistake, return None.

    block, cell: paths of the entry's block and of the entry itself in the file. A block is an item of `matrix:`, whose
    keys its entries share. If keys are missing, nothing else is checked.
    """
    return _EntryChecker(context, block, cell).check()


class _EntryChecker:
    def __init__(self, context: SuiteContext, block: KeyPath, cell: KeyPath) -> None:
        self.context, self.block, self.cell = context, block, cell
        shared = {key: value for key, value in context.document.at(block).items() if key != "cells"}
        self.keys = CellKeys.model_validate(shared if block == cell else _merged(shared, context.document.at(cell)))
        self.steps = self.keys.training.steps or 0

    def check(self) -> SuiteEntry | None:
        keys, before = self.keys, len(self.context.problems)
        name, missing = self._id(), keys.missing()
        for key in missing:
            self.context.problem(self.cell, f"`{key}` is missing", "add it here or to the block")
        if missing:
            return None
        self.context.entries.setdefault(name, keys)
        models = {i: self._model(model, self._path("model", i)) for i, model in enumerate(keys.model)}
        known = {i: source for i, source in models.items() if source}
        config = self._configs({keys.model[i]: source.kind for i, source in known.items()})
        encoders = [source.name for source in known.values() if source.kind == "encoder"]
        for i, task in enumerate(keys.task):
            self._task(task, self._path("task", i), encoders)
        self._add(synthetic_task.problems(keys, known))
        for i, implementation in enumerate(keys.implementation):
            for method in config:
                self._offer("method", method, implementation, self._path("implementation", i))
        for i, environment in enumerate(keys.environment):
            with self.context.problem_if_raised(self._path("environment", i)):
                if environment:
                    environments.resolve(environment, environments.load())
        self._add(serving.problems(keys, known))
        for i, base in enumerate(keys.base):
            self._base(base, self._path("base", i))
        wrong = list(combination_problems(config, self.context.methods, keys.base, self.steps))
        self._add(wrong)
        self._add(duplicate_problems(keys, config))
        training = self._training(config, encoders)
        tune = self._tune(keys.tune, config, training) if training and keys.tune else None
        if tune:
            tried = {name: fields | tune.axes(name) for name, fields in config.items()}
            more = combination_problems(tried, self.context.methods, keys.base, self.steps)
            self._add((("tune", *path), what, hint) for path, what, hint in more if (path, what, hint) not in wrong)
        if len(self.context.problems) > before:
            return None
        return SuiteEntry(
            id=name,
            where=self.context.document.where(*self.cell),
            model=keys.model,
            task=keys.task,
            base=[Base(**base.model_dump()) for base in keys.base],
            config=config,
            implementation=keys.implementation,
            environment=keys.environment,
            serve=keys.serve,
            optimizer=keys.optimizer,
            dtype=keys.dtype,
            seed=keys.seed,
            training=training,
            evaluation=Evaluation(**{"items": 0} | keys.evaluation_fields()),
            latency=keys.latency,
            tune=tune,
            places={path[-1]: self.context.document.where(*self._path(*path)) for path in _CHECKED_LATER},
        )

    def _add(self, problems: Iterable[FieldProblem]) -> None:
        for path, what, hint in problems:
            self.context.problem(self._path(*path), what, hint)

    def _path(self, *rest: str | int) -> KeyPath:
        """Return the path of a key in the entry or, failing that, in its block.

        If both lack the key, return the path of the nearest enclosing key, or of the entry.
        """
        lines = self.context.document.lines
        for n in range(len(rest), 0, -1):
            for start in (self.cell, self.block):
                if (*start, *rest[:n]) in lines:
                    return (*start, *rest[:n])
        return self.cell

    def _id(self) -> str:
        ids = self.context.ids
        name = self.keys.id or f"{'-'.join(self.keys.method or ['cell'])}-{len(ids) + 1}"
        if name in ids:
            self.context.problem(
                self._path("id"), f"duplicate id `{name}`, first at {ids[name]}", "rename one of the two"
            )
        ids.setdefault(name, self.context.document.where(*self.cell))
        return name

    def _configs(self, kinds: dict[str, str]) -> dict[str, dict[str, list[Any]]]:
        configs, methods = {}, self.context.methods
        for i, name in enumerate(self.keys.method):
            if info := methods.get(name):
                configs[name] = self._config(info, kinds)
            else:
                self.context.problem(
                    self._path("method", i), f"unknown method `{name}`", did_you_mean(name, methods, "methods")
                )
        self._unknown_config_keys()
        return configs

    def _unknown_config_keys(self) -> None:
        """Report each key of `config` that its Methods do not have.

        A key in the entry's own config must belong to a Method of this entry. A key in the block's config must belong
        to a Method of any entry of the block.
        """
        block = self.context.document.at(self.block)
        own = self.context.document.at(self.cell).get("config", {}) if self.cell != self.block else {}
        in_block = [method for entry in [block, *(block.get("cells") or [])] for method in _listed(entry.get("method"))]
        for key in self.keys.config:
            sharing = dict.fromkeys(self.keys.method if key in own else in_block)
            fields = {name: self.context.methods[name].fields for name in sharing if name in self.context.methods}
            if len(fields) < len(sharing) or any(key in of_method for of_method in fields.values()):
                continue  # an unknown Method might have the key
            known = dict.fromkeys(known for of_method in fields.values() for known in of_method)
            names = ", ".join(f"`{name}`" for name in fields)
            what = f"{names} has no `{key}`" if len(fields) == 1 else f"none of {names} has a `{key}`"
            self.context.problem(self._path("config", key), what, did_you_mean(key, known, "keys"))

    def _config(self, info: MethodInfo, kinds: dict[str, str]) -> dict[str, list[Any]]:
        """Map each field of a Method to its values in the entry. Report invalid values, and leave out unreadable ones.

        kinds: model -> its kind, e.g. `encoder`.
        """
        values: dict[str, list[Any]] = {}
        for key, knob in info.fields.items():
            value = self.keys.config.get(key, knob.default)
            # A list is an axis. If the values of a field are lists, its axis is a list of lists.
            is_axis = isinstance(value, list) and (not knob.is_list or any(isinstance(v, list) for v in value))
            if is_axis and not value:
                what = f"`{key}` is an empty list"
                self.context.problem(self._path("config", key), what, "leave it out for its default")
            for i, one in enumerate(value if is_axis else [value]):
                path: KeyPath = ("config", key, i) if is_axis else ("config", key)
                try:
                    resolved = knob.resolved(one, self.context.folder)
                except HarnessError as error:
                    self._add([(path, f"`{key}` of {info.name}: {error.what}", error.hint)])
                    continue
                subject = f"`{key}` of {info.name}" + (f" ({one})" if resolved is not one else "")
                problems = list(knob.problems(resolved))
                if knob.is_well_formed(resolved):
                    values.setdefault(key, []).append(knob.canonical(resolved))
                    for model, kind in kinds.items():
                        problems += [
                            (at, what, f"{hint} than {model}") for at, what, hint in knob.misfits(resolved, kind)
                        ]
                self._add(((*path, *at), f"{subject} {what}", hint) for at, what, hint in problems)
        return values

    def _model(self, name: str, path: KeyPath) -> Source | None:
        source = None
        with self.context.problem_if_raised(path):
            source = resolve(name, self.context.sources, self.context.folder)
            if source.kind == "data":
                models = ", ".join(s.name for s in self.context.sources.values() if s.kind != "data")
                self.context.problem(path, f"`{name}` is a data set, not a model", f"models: {models}")
                return None
            if source.scheme == "folder":
                model_folder.check(Path(source.address), source)
            elif source.scheme == "shape":
                model_folder.refuse_routing(shapes.config_of(source.address), source.name, source.address)
        return source

    def _task(self, name: str, path: KeyPath, encoders: list[str]) -> None:
        context, items = self.context, self.keys.evaluation.items
        if name not in context.tasks:
            with context.problem_if_raised(path):
                context.tasks[name] = tasks.load(name, context.folder, context.sources)
        task = context.tasks.get(name)
        if task is None or task.data is None:
            return
        if not task.trains and self.steps:
            what = f"{name} has no training split, but `steps` is {self.steps}"
            hint = "write `steps: 0`, or your own task with a training set in its `metadata`"
            context.problem(self._path("training", "steps"), what, hint)
        if task.upstream is None and items is not None and items > task.test:
            what = f"`items` is {items}, but {name} has {task.test} test items"
            context.problem(self._path("evaluation", "items"), what, f"write at most {task.test}")
        if encoders and not task.labels:
            what = f"{name} is for causal models, but {encoders[0]} is an encoder"
            context.problem(path, what, "write a causal model, or a task with `labels` in its `metadata`")

    def _offer(self, kind: str, target: str, name: str, path: KeyPath) -> None:
        with self.context.problem_if_raised(path):
            found = self.context.registry.find(kind, target, name)
            for i, dtype in enumerate(self.keys.dtype):
                if dtype not in found.dtypes:
                    written = self._path("dtype", i)
                    what = f"`{name}` does not offer {target} in {dtype}"
                    hint = f"it offers {', '.join(found.dtypes)}"
                    self.context.problem(written if written != self.cell else path, what, hint)

    def _base(self, base: BaseKeys, path: KeyPath) -> None:
        if base.quantization != "none" and base.implementation:
            self._offer("base", base.quantization, base.implementation, path)
        elif base.quantization != "none":
            offered = ", ".join(self.context.registry.names("base", base.quantization)) or "none that is installed"
            self.context.problem(
                path, f"base {base.quantization} has no `implementation`", f"implementations: {offered}"
            )
        elif base.implementation:
            what = f"base has an `implementation`, {base.implementation}, but no `quantization`"
            self.context.problem(path, what, "add `quantization:`, or remove `base:`")

    def _training(self, config: dict[str, dict[str, list[Any]]], encoders: list[str]) -> list[Training]:
        axes = {key: _listed(value) for key, value in self.keys.training.model_dump(exclude_none=True).items()}
        if (count := math.prod(map(len, axes.values()))) > MAX_CELLS:
            what = f"{count} Cells exceed the limit of {MAX_CELLS}"
            self.context.problem(self._path("training"), what, "shorten a list, or split the suite")
            return []
        training = [Training(**dict(zip(axes, values, strict=True))) for values in itertools.product(*axes.values())]
        if 0 < self.steps < training[0].warmup:  # where nothing trains, the warm-up of a block has no effect
            what = f"`warmup` is {training[0].warmup}, longer than the {self.steps} steps"
            self.context.problem(self._path("training", "warmup"), what, "shorten it, or train longer")
        self._add(training_problems(config, self.context.methods, self.keys, axes, self.steps))
        self._add(loop_constraints.problems(config, self.keys, axes, self.steps, encoders))
        for i, ratio in enumerate(axes.get("lr_ratio", ())):
            self._ratio(config, ratio, self._path("training", "lr_ratio", i))
        batches = dict.fromkeys(t.batch for t in training)
        for i, parts in enumerate(axes.get("accumulate", ())):
            if batch := next((batch for batch in batches if batch % parts), None):
                what = f"`accumulate` is {parts}, which does not divide the batch of {batch} examples"
                whole = math.gcd(*batches)
                hint = f"write one of {', '.join(str(n) for n in range(1, whole + 1) if whole % n == 0)}"
                self.context.problem(self._path("training", "accumulate", i), what, hint)
        return training

    def _tune(self, tune: TuneKeys, config: dict[str, Any], training: list[Training]) -> Tune | None:
        keys, context = self.keys, self.context
        infos = [context.methods[name] for name in config]
        tasks = [context.tasks[name] for name in keys.task if name in context.tasks]
        found, problems = tuning.read(tune, infos, training, keys.seed, keys.evaluation.items or 0, tasks)
        self._add((("tune", *path), what, hint) for path, what, hint in problems)
        return found

    def _ratio(self, config: dict[str, dict[str, list[Any]]], ratio: float, path: KeyPath) -> None:
        """Report each Method that cannot use `lr_ratio` (LoRA+), because it has no factor B. A `ratio` of 1 suits every
        Method.
        """
        for name in config:
            factors = self.context.methods[name].spec.factors
            if ratio != 1 and "B" not in factors:
                having = ", ".join(n for n, info in self.context.methods.items() if "B" in info.spec.factors)
                what = f"`lr_ratio` is {ratio:g}, but {name} trains no factor B"
                self.context.problem(path, what, f"write `lr_ratio: 1` for {name}; methods with a factor B: {having}")


def _merged(block: dict[str, Any], cell: dict[str, Any]) -> dict[str, Any]:
    """Return the keys of a block and of a cell in one dict. If both have a key, the value in the cell is used.

    If both values of a key are mappings, they are merged in the same way.
    """
    deeper = {
        key: _merged(block[key], value)
        for key, value in cell.items()
        if isinstance(value, dict) and isinstance(block.get(key), dict)
    }
    return {**block, **cell, **deeper}


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value] if value is not None else []
