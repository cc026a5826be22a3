"""Check the key `tune:` of an entry. It declares a search for the learning rate, with a known number of trials."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from harness.errors import did_you_mean
from harness.methods import peft_config
from harness.methods.spec import FieldProblem, MethodInfo
from harness.records.record import Training
from harness.suites.schema import TuneKeys
from harness.suites.tasks import Task


@dataclass(frozen=True)
class Tune:
    """A search for the learning rate, with one trial per rate. Cells that differ only in `lr` share these trials."""

    lr: tuple[float, ...]
    seed: int
    items: int
    """Number of test items that score a trial. They follow the test items that score the entry's Cells."""
    config: Mapping[str, Mapping[str, Any]]
    """Method -> values for the trials. They replace the entry's values, so that e.g. all ranks share the trials of one
    rank.

    A value of None stands for the default of a field that older Records do not have. A trial's Cell then omits the
    field.
    """

    def axes(self, method: str) -> dict[str, list[Any]]:
        """Return the values of `config` for a Method as one-element lists: field -> [value]."""
        return {key: [value] for key, value in self.config.get(method, {}).items()}


def read(
    keys: TuneKeys,
    methods: Sequence[MethodInfo],
    training: Sequence[Training],
    seeds: Sequence[int],
    scored: int,
    tasks: Sequence[Task],
) -> tuple[Tune | None, list[FieldProblem]]:
    """Check `tune:`. Return the search and the mistakes. If there are mistakes, the search is None.

    The path of a mistake is relative to `tune:`. methods, training, seeds, tasks: the values of the entry. scored:
    number of test items that score the Cells of the entry.
    """
    problems: list[FieldProblem] = []
    lr = tuple(dict.fromkeys(keys.lr))
    if len(lr) < 2:
        what = "`tune` tries fewer than two learning rates"
        problems.append((("lr",) if lr else (), what, "write `lr: [3e-4, 1e-3, 3e-3]`"))
    elif other := [t.lr for t in training if t.lr not in lr]:
        tried = ", ".join(f"{x:g}" for x in lr)
        what = f"`lr` is {other[0]:g}, but `tune` does not try it"
        problems.append((("lr",), what, f"choose one of {tried}, or add it to `tune`"))
    if not training[0].steps:
        what = "`tune` searches for a learning rate, but nothing is trained in 0 steps"
        problems.append(((), what, "remove `tune:` here"))
    if keys.seed in seeds:
        what = f"`seed` is {keys.seed}, a seed of the entry's Cells"
        hint = f"write another, e.g. {max(seeds) + 100}: the runs that choose a learning rate must not judge it"
        problems.append((("seed",), what, hint))
    if keys.items is None:
        problems.append(((), "`tune` has no `items`", "add the number of test items that choose the learning rate"))
    problems += _items(keys.items or 0, scored, tasks)
    config = {info.name: _config(keys.config, info) for info in methods}
    problems += _config_problems(keys.config, methods)
    return (None if problems else Tune(lr, keys.seed, keys.items or 0, config)), problems


def _items(items: int, scored: int, tasks: Sequence[Task]) -> Iterator[FieldProblem]:
    for task in tasks:
        if task.data is None:
            what = f"`tune` chooses by accuracy, but {task.name} is never scored"
            yield (), what, "remove `tune:` here"
        elif task.upstream is None and items and scored + items > task.test:
            what = (
                f"`items` is {items}, but {task.name} has {task.test} test items, and {scored} of them score the Cells"
            )
            left = task.test - scored
            yield ("items",), what, f"write at most {left}" if left > 0 else "lower `evaluation.items`"


def _config(written: Mapping[str, Any], info: MethodInfo) -> dict[str, Any]:
    fields = {key: info.fields[key] for key in written if key in info.fields and key != peft_config.KEY}
    return {key: knob.canonical(written[key]) for key, knob in fields.items() if knob.is_well_formed(written[key])}


def _config_problems(written: Mapping[str, Any], methods: Sequence[MethodInfo]) -> Iterator[FieldProblem]:
    for key, value in written.items():
        sharing = [info for info in methods if key in info.fields]
        if key == peft_config.KEY:
            what = f"`tune.config` has an `{key}`, but each adapter config is a method of its own"
            yield ("config", key), what, "give it an entry with its own `tune:`"
        elif not sharing:
            known = dict.fromkeys(name for info in methods for name in info.fields)
            yield ("config", key), f"no method here has the `{key}` of `tune.config`", did_you_mean(key, known, "keys")
        else:
            for info in sharing:
                for path, what, hint in info.fields[key].problems(value):
                    yield ("config", key, *path), f"`{key}` of {info.name} {what}", hint
