"""`tune:` of a suite's entry: a declared search for its learning rate, so that every method's tries are seen and counted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from harness.errors import near
from harness.methods import peft_config
from harness.methods.spec import MethodInfo
from harness.records.record import Training
from harness.suites.schema import TuneKeys
from harness.suites.tasks import Task


@dataclass(frozen=True)
class Tune:
    """What is tried: each of `lr` with `seed`, scored on `items` test items after those of the entry's Cells.

    config: for each method, values that the tried Cells have instead of the entry's, so that one rank may speak for all;
    None stands for the default of a later knob, which stands in no Cell.
    """

    lr: tuple[float, ...]
    seed: int
    items: int
    config: Mapping[str, Mapping[str, Any]]

    def axes(self, method: str) -> dict[str, list[Any]]:
        """Return `config` of a method in the form of an entry's axes."""
        return {key: [value] for key, value in self.config.get(method, {}).items()}


def read(
    keys: TuneKeys,
    methods: Sequence[MethodInfo],
    training: Sequence[Training],
    seeds: Sequence[int],
    scored: int,
    tasks: Sequence[Task],
    problem: Callable[[tuple[str, ...], str, str], None],
) -> Tune | None:
    """Check `tune:`; `problem(place in it, what, mend)` notes each mistake. scored: test items of the entry's own Cells."""
    found: list[str] = []

    def wrong(place: tuple[str, ...], what: str, hint: str) -> None:
        found.append(what)
        problem(place, what, hint)

    lr = tuple(dict.fromkeys(keys.lr or ()))
    if len(lr) < 2:
        wrong(
            ("lr",) if keys.lr else (), "`tune` tries fewer than two learning rates", "write `lr: [3e-4, 1e-3, 3e-3]`"
        )
    elif strange := [t.lr for t in training if t.lr not in lr]:
        tried = ", ".join(f"{x:g}" for x in lr)
        wrong(("lr",), f"`lr` is {strange[0]:g}, which `tune` does not try", f"choose one of {tried}, or try it too")
    if not training[0].steps:
        wrong((), "`tune` asks for learning rates, and nothing is trained in 0 steps", "remove `tune:` here")
    if keys.seed in seeds:
        what = f"`seed` is {keys.seed}, by which the entry's Cells are ranked too"
        wrong(("seed",), what, f"write another, e.g. {max(seeds) + 100}: a choice must not be judged by its own runs")
    for task in tasks:
        if task.data is None:
            wrong((), f"`tune` chooses by accuracy, and {task.name} is never scored", "remove `tune:` here")
        elif task.own is None and keys.items is not None and scored + keys.items > task.test:
            what = (
                f"`items` is {keys.items}, but {task.name} has {task.test} test items, of which {scored} rank the Cells"
            )
            left = task.test - scored
            wrong(("items",), what, f"write at most {left}" if left > 0 else "lower `evaluation.items`")
    if keys.items is None:
        wrong((), "`tune` has no `items`", "say how many test items choose the learning rate")
    config = _config(keys.config, methods, wrong)
    return Tune(lr, keys.seed, keys.items or 0, config) if not found else None


def _config(
    written: Mapping[str, Any], methods: Sequence[MethodInfo], wrong: Callable[..., None]
) -> dict[str, dict[str, Any]]:
    config: dict[str, dict[str, Any]] = {info.name: {} for info in methods}
    for key, value in written.items():
        having = [info for info in methods if key in info.fields]
        if key == peft_config.KEY:
            what = f"`tune.config` has an `{key}`, which is a method of its own and no value to vary"
            wrong(("config", key), what, "give it an entry with a `tune:` of its own")
            continue
        if not having:
            known = dict.fromkeys(name for info in methods for name in info.fields)
            wrong(("config", key), f"`tune.config` has a `{key}`, which no method here has", near(key, known, "keys"))
        for info in having:
            knob = info.fields[key]
            for where, what, hint in knob.problems(value):
                wrong(("config", key, *where), f"`{key}` of {info.name} {what}", hint)
            if knob.is_legible(value):
                config[info.name][key] = knob.canonical(value)
    return config
