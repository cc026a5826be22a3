"""One entry of a suite: its block's keys merged in, its names looked up, its values checked."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from harness.assets import model_folder, shapes
from harness.assets.table import Source, resolve
from harness.errors import HarnessError, Problem, SuiteError, closest, near
from harness.methods.registry import Registry
from harness.methods.spec import FieldProblem, MethodInfo
from harness.records.record import Base, Dtype, Evaluation, Optimizer, Training
from harness.suites import synthetic_task, tasks, tuning
from harness.suites.constraints import impossible, listed_twice, of_training
from harness.suites.invalid_keys import CutsOfEntries
from harness.suites.schema import BaseKeys, CellKeys, Timed, TuneKeys
from harness.suites.tasks import Task
from harness.suites.tuning import Tune
from harness.yaml_lines import Document, KeyPath

MOST_CELLS = 10_000
"""More is a slip of the pen: at a minute each, ten thousand Cells are a week."""
_JUDGED_LATER = (
    ("config", "targets"),
    ("config", "adapter_config"),
    ("training", "max_tokens"),
    ("evaluation", "items"),
    ("prompts", "tokens"),
)
_NEEDED = (("model",), ("task",), ("method",), ("training", "steps"), ("evaluation", "items"))
_COMPARED = (("task",), ("dtype",), ("training", "steps"), ("evaluation", "items"))
"""What the two sides of a comparison are judged by."""


@dataclass(frozen=True)
class SuiteEntry:
    """One entry of a suite, every axis a list. `expand` multiplies it out.

    config: for each method, the values of each of its fields, defaults filled in. places: where in the file stands what
    only a model or the data can judge.
    """

    id: str
    where: str
    model: list[str]
    task: list[str]
    base: list[Base]
    config: dict[str, dict[str, list[Any]]]
    implementation: list[str]
    optimizer: list[Optimizer]
    dtype: list[Dtype]
    seed: list[int]
    training: list[Training]
    evaluation: Evaluation
    latency: Timed
    tune: Tune | None
    places: dict[str, str]


@dataclass
class Reading:
    """What is shared while one suite is read.

    wrong_sources: names of rows that are wrong, and told of. ids: every id of the file and where it stands, also of entries
    that are wrong. entries: what each says, by its id; unknown: what a comparison might judge it by, and a mistake keeps
    from being known.
    """

    document: Document
    problems: list[Problem]
    registry: Registry
    methods: dict[str, MethodInfo]
    sources: dict[str, Source] = field(default_factory=dict)
    wrong_sources: set[str] = field(default_factory=set)
    tasks: dict[str, Task] = field(default_factory=dict)
    ids: dict[str, str] = field(default_factory=dict)
    entries: dict[str, CellKeys] = field(default_factory=dict)
    unknown: dict[str, set[str]] = field(default_factory=dict)

    @cached_property
    def cuts(self) -> CutsOfEntries:
        """What was cut, by entry."""
        return CutsOfEntries(self.document)

    @property
    def base(self) -> Path:
        """The folder that relative paths start from."""
        return self.document.path.resolve().parent

    def problem(self, way: KeyPath, what: str, hint: str = "") -> None:
        """Note a mistake."""
        self.problems.append(Problem(self.document.where(*way), what, hint))


def read_entry(reading: Reading, block: KeyPath, cell: KeyPath) -> SuiteEntry | None:
    """Read the entry at `cell` in the block at `block`; None if anything is wrong with it."""
    return _EntryReader(reading, block, cell).read()


class _EntryReader:
    def __init__(self, reading: Reading, block: KeyPath, cell: KeyPath) -> None:
        self.reading, self.block, self.cell = reading, block, cell
        shared = {key: value for key, value in reading.document.at(block).items() if key != "cells"}
        self.keys = CellKeys.model_validate(shared if block == cell else _merged(shared, reading.document.at(cell)))
        self.cuts = reading.cuts.of(block, cell)

    def read(self) -> SuiteEntry | None:
        keys, before = self.keys, len(self.reading.problems)
        name = self._id()
        complete = self._is_complete()
        models = {i: self._model(model, self._way("model", i)) for i, model in enumerate(keys.model or [])}
        known = {i: source for i, source in models.items() if source}
        kinds: dict[str, str] = {(keys.model or [])[i]: source.kind for i, source in known.items()}
        config = self._configs(kinds)
        encoders = [source.name for source in known.values() if source.kind == "encoder"]
        for i, task in enumerate(keys.task or []):
            self._task(task, self._way("task", i), encoders)
        for way, what, hint in synthetic_task.problems(keys, known):
            self.reading.problem(self._way(*way), what, hint)
        for i, implementation in enumerate(keys.implementation):
            for method in config:
                self._offer("method", method, implementation, self._way("implementation", i))
        for i, base in enumerate(keys.base):
            self._base(base, self._way("base", i))
        wrong = list(self._impossible(config))
        for where, what, hint in (*wrong, *listed_twice(self.keys, config)):
            self.reading.problem(self._way(*where), what, hint)
        training = self._training(config)
        tune = self._tune(keys.tune, config, training) if training and keys.tune else None
        if tune:
            tried = {name: fields | tune.axes(name) for name, fields in config.items()}
            for where, what, hint in self._impossible(tried):
                if (where, what, hint) not in wrong:
                    self.reading.problem(self._way("tune", *where), what, hint)
        if not complete or self.cuts.leave_defaults or len(self.reading.problems) > before:
            return None
        return SuiteEntry(
            id=name,
            where=self.reading.document.where(*self.cell),
            model=keys.model or [],
            task=keys.task or [],
            base=[Base(**base.model_dump()) for base in keys.base],
            config=config,
            implementation=keys.implementation,
            optimizer=keys.optimizer,
            dtype=keys.dtype,
            seed=keys.seed,
            training=training,
            evaluation=Evaluation(**{"items": 0} | keys.of_evaluation()),
            latency=keys.latency,
            tune=tune,
            places={way[-1]: self.reading.document.where(*self._way(*way)) for way in _JUDGED_LATER},
        )

    def _way(self, *rest: str | int) -> KeyPath:
        """Return where a value was written: in the cell, else in its block."""
        lines = self.reading.document.lines
        for n in range(len(rest), 0, -1):
            for start in (self.cell, self.block):
                if (*start, *rest[:n]) in lines:
                    return (*start, *rest[:n])
        return self.cell

    def _id(self) -> str:
        ids = self.reading.ids
        name = self.keys.id or f"{'-'.join(self.keys.method or ['cell'])}-{len(ids) + 1}"
        if name in ids:
            self.reading.problem(
                self._way("id"), f"a second id `{name}`, first at {ids[name]}", "rename one of the two"
            )
        else:
            self.reading.entries[name] = self.keys
            # One wrong dtype leaves the others as wrong as they are; with another task two sides might be alike.
            held = {key[-1] for key in _COMPARED if self.cuts.hold(*key)}
            self.reading.unknown[name] = held | ({"task"} if self.cuts.touch("task") else set())
        ids.setdefault(name, self.reading.document.where(*self.cell))
        return name

    def _is_complete(self) -> bool:
        complete = True
        for need in _NEEDED:
            value: Any = self.keys
            for part in need:
                value = getattr(value, part)
            if value is None and not (need == ("evaluation", "items") and synthetic_task.is_meant(self.keys)):
                complete = False
                if not self.cuts.hold(*need):
                    self.reading.problem(self.cell, f"`{'.'.join(need)}` is missing", "add it here or to the block")
        return complete

    def _configs(self, kinds: dict[str, str]) -> dict[str, dict[str, list[Any]]]:
        configs, methods = {}, self.reading.methods
        for i, name in enumerate(self.keys.method or []):
            if name not in methods:
                self.reading.problem(self._way("method", i), f"unknown method `{name}`", near(name, methods, "methods"))
            if info := self._method(name):
                configs[info.name] = self._config(info, kinds)
        self._unknown_config_keys()
        return configs

    def _method(self, name: str) -> MethodInfo | None:
        """Return a Method, or of a name that is misspelt the one that seems to be meant."""
        methods = self.reading.methods
        return methods.get(name) or methods.get(closest(name, methods))

    def _unknown_config_keys(self) -> None:
        """A shared config goes to those Methods that have the key; a key that none of them has is a mistake.

        The Methods that share it are the entry's own, or for what the block says, those of all its entries.
        """
        block = self.reading.document.at(self.block)
        own = self.reading.document.at(self.cell).get("config", {})
        everybody = [
            method for entry in [block, *(block.get("cells") or [])] for method in _listed(entry.get("method"))
        ]
        for key in self.keys.config:
            is_own = key in own and self.cell != self.block
            if self.cuts.touch("method") if is_own else self.reading.cuts.lose_methods(self.block):
                continue  # a Method that was taken out as wrong might have it
            sharing = (self.keys.method or []) if is_own else everybody
            infos = {name: self._method(name) for name in sharing}
            if not infos or any(info is None or key in info.fields for info in infos.values()):
                continue  # no Method, or an unknown one that might have it, has been told of
            known = dict.fromkeys(field for info in infos.values() if info for field in info.fields)
            names = ", ".join(f"`{info.name}`" for info in infos.values() if info)
            what = f"{names} has no `{key}`" if len(infos) == 1 else f"none of {names} has a `{key}`"
            self.reading.problem(self._way("config", key), what, near(key, known, "keys"))

    def _config(self, info: MethodInfo, kinds: dict[str, str]) -> dict[str, list[Any]]:
        """Return the values of each field, but for what cannot be told from them. kinds: of each model that is known."""
        written = self.keys.config
        values: dict[str, list[Any]] = {}
        for key, knob in info.fields.items():
            value = written.get(key, knob.default)
            # A list is an axis, but for a field that is a list itself: there it takes a list of lists.
            is_axis = isinstance(value, list) and (not knob.is_list or any(isinstance(v, list) for v in value))
            if is_axis and not value:
                self.reading.problem(
                    self._way("config", key), f"`{key}` is an empty list", "leave it out for its default"
                )
            for i, one in enumerate(value if is_axis else [value]):
                place: KeyPath = ("config", key, i) if is_axis else ("config", key)
                try:
                    meant = knob.resolved(one, self.reading.base)
                except HarnessError as error:
                    self.reading.problem(self._way(*place), f"`{key}` of {info.name}: {error.what}", error.hint)
                    continue
                subject = f"`{key}` of {info.name}" + (f" ({one})" if meant is not one else "")
                for where, what, hint in knob.problems(meant):
                    self.reading.problem(self._way(*place, *where), f"{subject} {what}", hint)
                if not knob.is_legible(meant):
                    continue
                values.setdefault(key, []).append(knob.canonical(meant))
                for model, kind in kinds.items():
                    for where, what, hint in knob.misfits(meant, kind):
                        self.reading.problem(self._way(*place, *where), f"{subject} {what}", f"{hint} than {model}")
        return values

    def _model(self, name: str, way: KeyPath) -> Source | None:
        sources = self.reading.sources
        if name in self.reading.wrong_sources:
            return None
        try:
            source = resolve(name, sources, self.reading.base)
        except HarnessError as error:
            self.reading.problem(way, error.what, error.hint)
            return None
        if source.kind == "data":
            models = ", ".join(s.name for s in sources.values() if s.kind != "data")
            self.reading.problem(way, f"`{name}` is a data set, not a model", f"models: {models}")
            return None
        try:
            if source.scheme == "folder":
                model_folder.check(Path(source.address), source)
            elif source.scheme == "shape":
                shapes.config_of(source.address)
        except HarnessError as error:
            self.reading.problem(way, f"{error.what} ({error.where})", error.hint)
        return source

    def _impossible(self, config: dict[str, dict[str, list[Any]]]) -> Iterator[FieldProblem]:
        return impossible(config, self.reading.methods, self.keys.base, self.keys.training.steps or 0)

    def _task(self, name: str, way: KeyPath, encoders: list[str]) -> None:
        reading, items = self.reading, self.keys.evaluation.items
        try:
            task = reading.tasks.get(name) or tasks.load(name, reading.base, reading.sources)
        except SuiteError as error:
            reading.problems += error.problems
            return
        except HarnessError as error:
            reading.problem(way, error.what, error.hint)
            return
        reading.tasks[name] = task
        if task.data is None:
            return
        if not task.trains and self.keys.training.steps:
            what = f"{name} has no training split, and `steps` is {self.keys.training.steps}"
            hint = "write `steps: 0`, or a task of your own whose `metadata` names a training set"
            reading.problem(self._way("training", "steps"), what, hint)
        if task.own is None and items is not None and items > task.test:
            what = f"`items` is {items}, but {name} has {task.test} test items"
            reading.problem(self._way("evaluation", "items"), what, f"write at most {task.test}")
        if encoders and not task.labels:
            what = f"{name} is for causal models, and {encoders[0]} is an encoder"
            reading.problem(way, what, "give it a causal model, or a task whose `metadata` has labels")

    def _offer(self, kind: str, target: str, name: str, way: KeyPath) -> None:
        try:
            found = self.reading.registry.find(kind, target, name)
        except HarnessError as error:
            self.reading.problem(way, error.what, error.hint)
            return
        for i, dtype in enumerate(self.keys.dtype):
            if dtype not in found.dtypes:
                where = self._way("dtype", i)
                where = where if where != self.cell else way
                hint = f"it offers {', '.join(found.dtypes)}"
                self.reading.problem(where, f"`{name}` does not offer {target} in {dtype}", hint)

    def _base(self, base: BaseKeys, way: KeyPath) -> None:
        if base.quantization != "none" and base.implementation:
            self._offer("base", base.quantization, base.implementation, way)
        elif base.quantization != "none":
            offered = ", ".join(self.reading.registry.names("base", base.quantization)) or "nobody that is installed"
            self.reading.problem(way, f"base {base.quantization} has no `implementation`", f"who offers it: {offered}")
        elif base.implementation and not self.reading.document.is_cut((*way, "quantization")):
            what = f"base has an `implementation`, {base.implementation}, but no `quantization`"
            self.reading.problem(way, what, "add `quantization:`, or remove `base:`")

    def _training(self, config: dict[str, dict[str, list[Any]]]) -> list[Training]:
        written = self.keys.training.model_dump(exclude_none=True)
        axes = {key: _listed(value) for key, value in written.items()}
        if (count := math.prod(map(len, axes.values()))) > MOST_CELLS:
            way = self._way("training")
            self.reading.problem(way, f"{count} Cells; the most is {MOST_CELLS}", "shorten a list, or split the suite")
            return []
        steps = self.keys.training.steps
        # That steps are missing is told already, and any number of them shows what else is wrong.
        axes |= {"steps": [1 if steps is None else steps]}
        training = [Training(**dict(zip(axes, values, strict=True))) for values in itertools.product(*axes.values())]
        # With no steps a block's warm-up means nothing, and is no mistake.
        if steps and steps < training[0].warmup:
            what = f"`warmup` is {training[0].warmup}, longer than the {steps} steps"
            self.reading.problem(self._way("training", "warmup"), what, "shorten it, or train longer")
        for where, what, hint in of_training(config, self.reading.methods, self.keys, axes, training[0].steps):
            self.reading.problem(self._way(*where), what, hint)
        for i, ratio in enumerate(_listed(written.get("lr_ratio"))):
            self._ratio(config, ratio, self._way("training", "lr_ratio", i))
        for i, parts in enumerate(_listed(written.get("accumulate"))):
            batches = {} if self.cuts.hold("training", "batch") else dict.fromkeys(t.batch for t in training)
            if batch := next((batch for batch in batches if batch % parts), None):
                what = f"`accumulate` is {parts}, which does not divide the batch of {batch} examples"
                whole = math.gcd(*batches)
                hint = f"write one of {', '.join(str(n) for n in range(1, whole + 1) if whole % n == 0)}"
                self.reading.problem(self._way("training", "accumulate", i), what, hint)
        return training

    def _tune(self, tune: TuneKeys, config: dict[str, Any], training: list[Training]) -> Tune | None:
        keys, reading = self.keys, self.reading
        if self.cuts.touch("tune"):
            return None  # what was taken out as wrong is not also missing

        def problem(place: tuple[str, ...], what: str, hint: str) -> None:
            reading.problem(self._way("tune", *place), what, hint)

        infos = [reading.methods[name] for name in config]
        tasks = [reading.tasks[name] for name in keys.task or () if name in reading.tasks]
        return tuning.read(tune, infos, training, keys.seed, keys.evaluation.items or 0, tasks, problem)

    def _ratio(self, config: dict[str, dict[str, list[Any]]], ratio: float, way: KeyPath) -> None:
        """LoRA+ is about two factors, of which B is the second."""
        for name in config:
            factors = self.reading.methods[name].spec.factors
            if ratio != 1 and "B" not in factors:
                having = ", ".join(n for n, info in self.reading.methods.items() if "B" in info.spec.factors)
                what = f"`lr_ratio` is {ratio:g}, and {name} trains no factor B"
                self.reading.problem(way, what, f"write `lr_ratio: 1` for {name}; those that do: {having}")


def _merged(block: dict[str, Any], cell: dict[str, Any]) -> dict[str, Any]:
    """Merge deeply; the cell wins."""
    deeper = {
        key: _merged(block[key], value)
        for key, value in cell.items()
        if isinstance(value, dict) and isinstance(block.get(key), dict)
    }
    return {**block, **cell, **deeper}


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value] if value is not None else []
