"""Check an entry of a suite for values that are valid separately but impossible together."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from harness.methods.peft_config import IN_THE_CACHE, KEY, UNREFERENCED
from harness.methods.spec import FieldProblem, MethodInfo
from harness.records.record import Base
from harness.suites.schema import BaseKeys, CellKeys
from harness.yaml_validation import shortened

_AXES = ("model", "task", "method", "implementation", "environment", "serve", "base", "optimizer", "dtype", "seed")


def combination_problems(
    config: Mapping[str, Mapping[str, list[Any]]],
    methods: Mapping[str, MethodInfo],
    bases: list[BaseKeys],
    steps: int,
) -> Iterator[FieldProblem]:
    """Yield a problem for each combination of values with which no Cell can run.

    config: Method -> field -> values. bases: values of `base:`. steps: number of training steps.
    """
    for name, fields in config.items():
        yield from _starts(name, fields)
        yield from _budgets(name, fields)
        yield from _schedules(name, fields, steps)
        yield from _bases(methods[name], bases)


def _starts(name: str, fields: Mapping[str, list[Any]]) -> Iterator[FieldProblem]:
    if "orthogonal" not in fields.get("init", ()):
        return
    for rank in fields.get("rank", ()):
        if rank % 2:
            what = f"`init: orthogonal` of {name} divides the rank into halves, but `rank` is {rank}"
            yield ("config", "init"), what, f"write an even rank, such as {rank + 1}, or another init"


def _budgets(name: str, fields: Mapping[str, list[Any]]) -> Iterator[FieldProblem]:
    """Yield a problem for each mistake in AdaLoRA's rank schedule, at most one of each kind.

    The mistakes: `target_rank` is above `rank`, or no step is left for pruning.
    """
    ranks = itertools.product(fields.get("target_rank", ()), fields.get("rank", ()))
    for target, rank in ((target, rank) for target, rank in ranks if target > rank):
        what = f"`target_rank` of {name} is {target}, above its `rank` of {rank}, but pruning only lowers the rank"
        yield ("config", "target_rank"), what, f"write at most {rank}, or raise `rank`"
        break
    for first, last, total in itertools.product(*(fields.get(key, ()) for key in ("tinit", "tfinal", "total_steps"))):
        if first + last >= total:
            what = f"`tinit` {first} and `tfinal` {last} of {name} leave no step of `total_steps` {total} for pruning"
            yield ("config", "tinit"), what, f"write `tinit` and `tfinal` with a sum below {total}"
            break


def _schedules(name: str, fields: Mapping[str, list[Any]], steps: int) -> Iterator[FieldProblem]:
    """Yield a problem for each `total_steps` in a Method's config that differs from the number of training steps."""
    for total in fields.get("total_steps", ()):
        if steps and total != steps:
            what = f"`total_steps` of {name} is {total}, but the training has {steps} steps"
            yield ("config", "total_steps"), what, f"write `total_steps: {steps}`"


def _bases(info: MethodInfo, bases: list[BaseKeys]) -> Iterator[FieldProblem]:
    for index, base in enumerate(bases):
        if base.quantization == "none":
            continue
        if info.spec.trains_weights:
            what = f"base {base.quantization} has frozen weights in 4 bits, but {info.name} trains the weights"
            yield ("base", index), what, f"give {info.name} an entry without `base:`"
        elif info.name in UNREFERENCED:
            what = f"{info.name} needs a base that is not quantised, but base is {base.quantization}"
            yield ("base", index), what, f"give {info.name} an entry without `base:`"


def duplicate_problems(keys: CellKeys, config: Mapping[str, Mapping[str, list[Any]]]) -> Iterator[FieldProblem]:
    """Yield a problem for each value that a list of the entry repeats, because equal values would give equal Cells."""
    axes: dict[tuple[str, ...], Any] = {(key,): getattr(keys, key) for key in _AXES}
    axes |= {("training", key): values for key, values in keys.training}
    axes |= {("config", key): values for fields in config.values() for key, values in fields.items()}
    for way, values in axes.items():
        counted = Counter(map(_shown, values)) if isinstance(values, list) else {}
        for value, times in counted.items():
            if times > 1:
                what = f"`{way[-1]}` lists {shortened(value)} {times} times"
                yield way, what, "list each value once"


def _shown(value: object) -> str:
    return str(Base(**value.model_dump())) if isinstance(value, BaseKeys) else repr(value)


def training_problems(
    config: Mapping[str, Mapping[str, list[Any]]],
    methods: Mapping[str, MethodInfo],
    keys: CellKeys,
    training: Mapping[str, list[Any]],
    steps: int,
) -> Iterator[FieldProblem]:
    """Yield a problem for each value of `training` or `optimizer` that conflicts with a Method or another value.

    config: Method -> field -> values. training: key of `training:` -> values. steps: number of training steps.
    """
    infos = [methods[name] for name in config]
    yield from _optimizers(infos, keys, steps)
    yield from _checkpointing(config, training)
    able = " and ".join(info.name for info in methods.values() if info.spec.trains_weights)
    for index, layerwise in enumerate(training.get("layerwise", ())):
        if layerwise:
            for what, hint in _layerwise(infos, able, keys, training):
                yield ("training", "layerwise", index), f"`layerwise` is true, but {what}", hint


def _optimizers(infos: list[MethodInfo], keys: CellKeys, steps: int) -> Iterator[FieldProblem]:
    """Yield a problem for each unusable optimizer: nothing is trained, or a Method has its own optimizer."""
    for index, optimizer in enumerate(keys.optimizer):
        if optimizer == "adamw":
            continue
        if not steps:
            what = f"`optimizer` is {optimizer}, but nothing is trained in 0 steps"
            yield ("optimizer", index), what, "write `optimizer: adamw`"
        for info in infos:
            if info.spec.optimizer and optimizer not in info.spec.optimizers:
                what = f"`optimizer` is {optimizer}, but {info.name} has its own, {info.spec.optimizer}"
                hint = f"give {info.name} an entry with `optimizer: {'` or `'.join(info.spec.optimizers)}`"
                yield ("optimizer", index), what, hint


def _checkpointing(
    config: Mapping[str, Mapping[str, list[Any]]], training: Mapping[str, list[Any]]
) -> Iterator[FieldProblem]:
    """Yield a problem if gradient checkpointing is on and an adapter needs the key-value cache. Checkpointing drops the
    cache.
    """
    adapters = {value["peft_type"] for fields in config.values() for value in fields.get(KEY, ())}
    for index, checkpointing in enumerate(training.get("checkpointing", ())):
        for kind in sorted(adapters & set(IN_THE_CACHE)) if checkpointing else ():
            what = f"`checkpointing` is true, but {kind} has its tokens in a cache, which checkpointing drops"
            yield ("training", "checkpointing", index), what, f"leave `checkpointing` out for {kind}"


def _layerwise(
    infos: list[MethodInfo], able: str, keys: CellKeys, training: Mapping[str, list[Any]]
) -> Iterator[tuple[str, str]]:
    """Yield a pair (reason, hint) for each reason why the entry cannot use the option `layerwise`.

    With `layerwise`, the backward pass frees each gradient as soon as it has updated its weight. able: Methods that
    support the option, as text.
    """
    for info in infos:
        if not info.spec.trains_weights:
            what = f"{info.name} does not train the model's own weights, so its gradients take little memory"
            yield what, f"remove `layerwise` for {info.name}; it is for {able}"
    for parts in training.get("accumulate", ()):
        if parts != 1:
            what = f"`accumulate` is {parts}: a gradient that is freed in its pass cannot be summed over {parts} passes"
            yield what, "write `accumulate: 1`, or remove `layerwise`"
            break
    if any(training.get("compile", ())):
        yield "`compile` is true: a compiled backward pass returns all gradients at its end", "remove one of the two"
    if "float16" in keys.dtype:
        what = "dtype is float16: its loss scale needs all gradients before the first update"
        yield what, "write `dtype: bfloat16`, or remove `layerwise`"
