"""Cases of a target: its parity suite's examples, a fixed sample that covers pairs of settings, and random cases."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any, get_args

import torch
from hypothesis import strategies as st

from harness.conformance import operations
from harness.conformance.case_selection import FEW, CaseSelection
from harness.conformance.drawing import combinations, strategies
from harness.conformance.drawing.covering import covering, each_value, every_pair, one_at_a_time, values
from harness.conformance.drawing.factors import Factor, is_positive, of_config, of_signature
from harness.conformance.execution.acceptance import is_accepted
from harness.conformance.parity_suite import (
    MAIN_MAGNITUDES,
    AnyCase,
    CaseShape,
    LoaderCase,
    LoaderSuite,
    Magnitude,
    MethodCase,
    MethodSuite,
    ModelForm,
    OperationCase,
    OperationSuite,
    ParitySuite,
    WeightSize,
)
from harness.conformance.subject import DTYPES
from harness.methods.spec import FieldInfo, methods

_SINGLE = ((40, 1), (1, 40))
"""Sides of a layer with a single output feature, such as a reward head, and of one with a single input feature. The
ParityModel then has layers of both sorts, so OFT has no such case: it cannot rotate one input feature."""
_SIDES = Factor(
    ((24, 40), (32, 32), (12, 1030), (520, 16), (260, 270)),
    ((4100, 8), (8, 4100), (264, 264), (9, 11), (31, 17), (17, 13), *_SINGLE),
    dimensions=(2,),
)
"""Numbers of input and output features of the first adapted layer."""
_LEAST_SIDE = 8
"""Smallest number of features, except in a case with sides from _SINGLE."""
_CHECKS_OF_HUGE_STEPS = ("outputs",)
"""Checks of an optimizer's step with more than 2^24 parameters. Each check takes half a minute."""
_TOKENS = Factor((9, 1, 515), (2, 16, 130, 2060), least=1, most=600)
_MAGNITUDES = Factor(get_args(Magnitude)[:MAIN_MAGNITUDES], get_args(Magnitude)[MAIN_MAGNITUDES:])
_WEIGHTS = Factor(get_args(WeightSize)[:1], get_args(WeightSize)[1:])
_SIZES = ("sides", "tokens", "model", "magnitude", "weights")
"""Names of the factors that set a layer's size and input. Every implementation must support all their levels."""
LEFT_OUT = ("model", "magnitude", "weights", "dropout")
"""Names of the factors of a Method whose further values only a wide selection tries."""
_WIDEST_OUTPUT = 1030
"""Largest number of output features of a Method's layer in a case of `_of_missing_values`."""
_TRIES = 12
"""`_extremes` looks in this many rows of the sample for the other values of a case with an extreme value."""
_IN_EVERY_DTYPE = ("magnitude", "weights")
"""Names of the factors whose extreme values depend on the dtype."""


def fixed(plan: ParitySuite, wanted: CaseSelection, dtypes: Collection[str]) -> Iterator[AnyCase]:
    """Yield the examples of the parity suite, and variants of the typical case: up to two by `_of_typical`, and up to three
    with very large tensors.

    A factor is a setting of a case, and its levels are the values to try. Without `wanted.is_wide`, also yield the cases of
    `_of_missing_values` and, for an Operation, those of `_of_some_pairs`. Otherwise, also yield a sample that covers pairs
    of levels. A factor is optional if an implementation may lack it, such as an option of the Method or another kind of
    layer. The sample has five parts:

    - Every pair of levels of two factors that are not optional. Optional factors have their plainest level.
    - Every pair of levels of two settings, optional or not. The kind of layer and the dtype count as settings, a size does
      not. With `wanted.full`, every pair of levels of any two factors.
    - Every level of each optional factor, while all other factors have their plainest level. An implementation that
      lacks an option skips every case with this option, also where the case combines it with others.
    - Each extreme value once, beside plain values.
    - The combinations of `drawing.combinations`.
    """
    # 16 bits first, so that what a first call caches in its dtype shows in the wider ones.
    examples: list[AnyCase] = [*plan.cases(wanted, dtypes), *_of_typical(plan, dtypes)]
    marked = [*_with_representatives(sorted(examples, key=lambda case: DTYPES[case.dtype].itemsize))]
    if isinstance(plan, LoaderSuite):
        yield from marked
        return
    there = factors(plan, dtypes)
    if not there["dtype"].levels:
        return
    if isinstance(plan, OperationSuite):
        marked[0] = replace(marked[0], first=next(case for case in marked if case.typical))
    yield from marked
    yield from _large(plan, examples, there, wanted.is_wide)

    def valid(chosen: dict[str, Any]) -> bool:
        return is_accepted(plan, case_of(plan, chosen))

    if not wanted.is_wide:
        further = [*_of_some_pairs(plan, there, valid)] if isinstance(plan, OperationSuite) else []
        yield from further
        yield from _of_missing_values(plan, there, [*examples, *further], valid)
        return
    levels = {name: factor.levels for name, factor in there.items()}
    valued = _pairs(there, levels, [name for name in levels if wanted.full or name not in _SIZES], valid)
    optional = [name for name, factor in there.items() if factor.optional]
    alone = [values(row, levels) for row in one_at_a_time(levels, optional)]
    valued += [one for one in alone if valid(one) and one not in valued]
    more = [one for one in _valid_combinations(there, valid) if one not in valued]
    for chosen in [*valued, *_extremes(there, valued, valid), *more]:
        yield replace(case_of(plan, chosen), sampled=True)


def _pairs(
    there: Mapping[str, Factor],
    levels: Mapping[str, Sequence[Any]],
    settings: Collection[str],
    valid: Callable[[dict[str, Any]], bool],
) -> list[dict[str, Any]]:
    """Return valid cases, as values of all factors, that cover every pair of levels of two factors that are not optional,
    and every pair of levels of two factors in `settings`. levels: the levels to try of every factor.
    """
    plain = {name: levels[name][:1] if there[name].optional else levels[name] for name in there}
    first = covering(plain, every_pair(plain), valid)
    further = every_pair({name: levels[name] for name in settings})
    return [values(row, levels) for row in [*first, *covering(levels, further, valid, given=first)]]


def _valid_combinations(
    there: Mapping[str, Factor], valid: Callable[[dict[str, Any]], bool]
) -> Iterator[dict[str, Any]]:
    """Yield the valid cases of `drawing.combinations`, as values of all factors."""
    plain = {name: factor.levels[0] for name, factor in there.items()}
    yield from filter(valid, (plain | some for some in combinations.combinations(there)))


def _of_some_pairs(
    plan: OperationSuite, there: Mapping[str, Factor], valid: Callable[[dict[str, Any]], bool]
) -> Iterator[AnyCase]:
    """Yield cases of an Operation in which every two levels of two factors occur together. Of a word or a switch, all levels
    count. Of a number or a list, only the first and the last level count. float64 counts only if there is no other dtype,
    because nobody trains adapters in float64.

    Also yield the cases of `_valid_combinations`, and each extreme magnitude in each of these dtypes.
    """
    levels = dict[str, Sequence[Any]]()
    for name, factor in there.items():
        is_word = all(isinstance(level, str | bool) for level in factor.levels)
        levels[name] = factor.levels if is_word else [*dict.fromkeys((factor.levels[0], factor.levels[-1]))]
    levels["dtype"] = [dtype for dtype in levels["dtype"] if dtype != "float64"] or levels["dtype"]
    valued = _pairs(there, levels, [*levels], valid)
    more = [one for one in _valid_combinations(there, valid) if one not in valued]
    if "magnitude" in there:
        plain = {name: factor.levels[0] for name, factor in there.items()}
        extremes = itertools.product(there["magnitude"].extremes, levels["dtype"])
        more += filter(valid, (plain | {"magnitude": size, "dtype": dtype} for size, dtype in extremes))
    for chosen in [*valued, *more]:
        yield replace(case_of(plan, chosen), sampled=True, is_brief=True)


def _large(
    plan: MethodSuite | OperationSuite, examples: Sequence[AnyCase], names: Collection[str], wide: bool
) -> Iterator[AnyCase]:
    """Yield variants of the typical example with very large tensors. names, wide: see `combinations.large_tensors`."""
    typical = next((case for case in examples if case.typical), None)
    for some in combinations.large_tensors(names, wide):
        if isinstance(typical, OperationCase):
            changed = {name: [*one] if isinstance(one, tuple) else one for name, one in some.items()}
            case: AnyCase = replace(typical, values={**typical.values, **changed}, typical=False)
        elif isinstance(typical, MethodCase):
            shape = CaseShape.model_validate(
                {"tokens": _TOKENS.levels[0], **dict(zip(("in", "out"), some["sides"], strict=True))}
            )
            case = replace(typical, shape=shape, typical=False)
        else:
            return
        if is_accepted(plan, case):
            huge = some.get("shape") == combinations.BEYOND_24_BITS
            few = _CHECKS_OF_HUGE_STEPS if huge and "gradient" in names else ()
            yield replace(case, sampled=True, is_brief=True, is_large=True, stays_brief=huge, checks=few)


def _of_missing_values(
    plan: MethodSuite | OperationSuite,
    there: Mapping[str, Factor],
    examples: Sequence[AnyCase],
    valid: Callable[[dict[str, Any]], bool],
) -> Iterator[AnyCase]:
    """Yield cases with the values that no example has, each once.

    A case has such a value for several sizes, or for several other numbers, at once. Each word, each zero, each value
    of an optional factor, and each pair of a switch and a kind of layer has a case of its own: a word or a zero may hide the
    other values, and an implementation may lack an option. Some values of a Method are left out: other magnitudes, forms of
    the model and shares of dropout, because many checks would have to try them, and very wide outputs, because the
    ParityModel has a square weight of this side. Each word or switch of a Method also has a case with dropout, in which
    only the check `dropout` runs.
    """
    plain = {name: factor.levels[0] for name, factor in there.items()}
    sizes, numbers, alone = dict[str, list[Any]](), dict[str, list[Any]](), list[dict[str, Any]]()
    left_out = ("dtype", *(LEFT_OUT if isinstance(plan, MethodSuite) else ()))
    for name, factor in ((name, factor) for name, factor in there.items() if name not in left_out):
        tried = {plain[name], *(value_of(plan, case, name) for case in examples)}
        for value in [one for one in (*factor.levels, *factor.extremes) if one not in tried]:
            if name == "sides" and value[1] > _WIDEST_OUTPUT:
                continue
            if factor.optional or isinstance(value, str) or not is_positive(value):
                alone.append(plain | {name: value})
            else:
                (sizes if name in _SIZES else numbers).setdefault(name, []).append(value)
    if isinstance(plan, MethodSuite) and not plan.base:
        on = {n: {value_of(plan, one, "kind") for one in examples if value_of(plan, one, n) is True} for n in there}
        alone += [plain | some for some in combinations.switched_kinds(there, on)]
        words = combinations.with_dropout(there, _fields(plan.method))
        dropping = filter(valid, (plain | some for some in words))
        yield from (replace(case_of(plan, one), minor=True, checks=("dropout",)) for one in dropping)
    together = [chosen for some in (sizes, numbers) for chosen in each_value(plain, some, valid)]
    further = [*together, *filter(valid, alone)]
    yield from (replace(case_of(plan, chosen), sampled=True, is_brief=True) for chosen in further)


def value_of(plan: MethodSuite | OperationSuite, case: AnyCase, name: str) -> Any:
    """Return the value of a factor in a case, or None if the case does not state it."""
    if isinstance(case, OperationCase):
        found = case.magnitude if name == "magnitude" else case.values.get(name)
        return tuple(found) if isinstance(found, list) else found
    if not isinstance(case, MethodCase) or not isinstance(plan, MethodSuite):
        return None
    if name == "sides":
        return case.shape.inputs, case.shape.outputs
    if name == "tokens":
        return case.shape.tokens
    fields = _fields(plan.method)
    return case.config.get(name, fields[name].default) if name in fields else getattr(case, name)


def settings_of(plan: ParitySuite, case: AnyCase) -> dict[str, Any]:
    """Return every setting and size of a case, also those with default values. For a loader's case, return none."""
    if isinstance(case, OperationCase) and isinstance(plan, OperationSuite):
        parameters = inspect.signature(operations.every()[plan.operation].arguments).parameters.values()
        defaults = {one.name: one.default for one in parameters if one.default is not inspect.Parameter.empty}
        return defaults | case.values | {"magnitude": case.magnitude}
    if isinstance(case, MethodCase) and isinstance(plan, MethodSuite):
        defaults = {name: field.default for name, field in _fields(plan.method).items() if not field.is_list}
        sizes = {"layer": case.kind, **case.shape.model_dump(), "model": case.model}
        return defaults | case.config | sizes | {"magnitude": case.magnitude, "weights": case.weights}
    return {}


def _with_representatives(examples: Sequence[AnyCase]) -> Iterator[AnyCase]:
    """Mark the first example of each kind of layer, and of linear layers and Operations the first in 32 and in 16 bits. Of
    an Operation, also mark the first example with each value of a switch, such as `training`.

    The typical example stands for its own kind, number of bits and switches. Nobody trains adapters in float64, so no
    example is marked for being in float64, nor for its switches there. All other examples are marked as minor ones.
    """

    def represents(case: AnyCase) -> set[tuple[str, int]]:
        kind = case.kind if isinstance(case, MethodCase) else "linear"
        given = case.values if isinstance(case, OperationCase) and case.dtype != "float64" else {}
        switches = {(name, int(value)) for name, value in given.items() if isinstance(value, bool)}
        return {(kind, DTYPES[case.dtype].itemsize if kind == "linear" else 0), *switches}

    seen = {("linear", torch.float64.itemsize)}.union(*(represents(case) for case in examples if case.typical))
    for case in examples:
        if isinstance(case, LoaderCase) or case.typical:
            yield case
        elif represents(case) <= seen:
            yield replace(case, minor=True)
        else:
            seen |= represents(case)
            yield replace(case, representative=True)


def _of_typical(plan: ParitySuite, dtypes: Collection[str]) -> Iterator[AnyCase]:
    """Yield up to two variants of the suite's typical example.

    The first, if float16 is tried, has large numbers in float16, whose products may overflow. The second, if the suite
    has Conv1D layers, is a square Conv1D with tiny weights. A square weight can be transposed by mistake without an
    exception. A guard against a division by zero may treat tiny numbers as zero.
    """
    typical = next((case for case in plan.cases(FEW, dtypes) if case.typical), None)
    takes_large = not isinstance(plan, OperationSuite) or operations.every()[plan.operation].inputs
    if (
        isinstance(typical, MethodCase | OperationCase)
        and takes_large
        and {"float16"}.intersection(plan.dtypes, dtypes)
    ):
        yield replace(typical, dtype="float16", magnitude="large", typical=False)
    if isinstance(typical, MethodCase) and isinstance(plan, MethodSuite) and "conv1d" in plan.layers:
        yield replace(typical, kind="conv1d", shape=typical.shape.square(), weights="tiny", typical=False)


def _extremes(
    there: Mapping[str, Factor], rows: Sequence[dict[str, Any]], valid: Callable[[dict[str, Any]], bool]
) -> Iterator[dict[str, Any]]:
    """Yield a case for each extreme value of each factor. All other factors have their plainest values.

    If this case is not valid, the other factors get their values from the first row in `rows` that makes it valid. An
    extreme value of `magnitude` or `weights` is tried in every dtype, any other extreme value in one dtype.
    """
    plain = {name: factor.levels[0] for name, factor in there.items()}
    for name, factor in there.items():
        dtypes = there["dtype"].levels if name in _IN_EVERY_DTYPE else there["dtype"].levels[:1]
        for value, dtype in itertools.product(factor.extremes, dtypes):
            tried = (row | {name: value, "dtype": dtype} for row in [plain, *rows[:_TRIES]])
            yield from itertools.islice(filter(valid, tried), 1)


def random(plan: ParitySuite, dtypes: Collection[str]) -> st.SearchStrategy[AnyCase]:
    """Return a Hypothesis strategy that draws cases which the reference accepts. For a loader it draws nothing.

    Inputs and weights are not both tiny, because products of two subnormal numbers have no digits to compare.
    """
    if isinstance(plan, LoaderSuite):
        return st.nothing()
    drawn = strategies.case_values(factors(plan, dtypes)).map(lambda chosen: replace(case_of(plan, chosen), drawn=True))

    def is_tiny(case: AnyCase) -> bool:
        return isinstance(case, MethodCase) and case.magnitude == "tiny" and case.weights == "tiny"

    return drawn.filter(lambda case: not is_tiny(case) and is_accepted(plan, case))


def case_of(plan: MethodSuite | OperationSuite, chosen: Mapping[str, Any]) -> MethodCase | OperationCase:
    """Return the case in which the factors have these values.

    Except for the rank, a Method's setting that equals the Config's default is left out.
    """
    if isinstance(plan, OperationSuite):
        settings = {
            n: list(v) if isinstance(v, tuple) else v for n, v in chosen.items() if n not in ("dtype", "magnitude")
        }
        return OperationCase(settings, chosen["dtype"], chosen.get("magnitude", "normal"))
    fields = _fields(plan.method)
    config = {n: v for n, v in chosen.items() if n in fields and (n == "rank" or v != fields[n].default)}
    sides = chosen["sides"]
    inputs, outputs = sides if sides in _SINGLE else (max(_LEAST_SIDE, side) for side in sides)
    shape = CaseShape.model_validate({"tokens": chosen["tokens"], "in": inputs, "out": outputs})
    sizes = chosen["model"], chosen["magnitude"], chosen["weights"]
    return MethodCase(config, chosen["kind"], shape, chosen["dtype"], *sizes)


def factors(plan: MethodSuite | OperationSuite, dtypes: Collection[str]) -> dict[str, Factor]:
    """Return all factors of a suite's cases, by name."""
    there = [dtype for dtype in plan.dtypes if dtype in dtypes]
    there.sort(key=lambda dtype: (dtype != "float32", dtype == "float64"))
    if isinstance(plan, OperationSuite):
        operation = operations.every()[plan.operation]
        varied = {"magnitude": _MAGNITUDES} if operation.inputs else {}
        return of_signature(operation.arguments) | varied | {"dtype": Factor(tuple(there))}
    found = of_config(_fields(plan.method))
    for name, bounds in plan.settings.items():
        found[name] = found[name].within(bounds.least, bounds.most)
    return found | {
        "kind": Factor(tuple(plan.layers), optional=True),
        "sides": _SIDES,
        "tokens": _TOKENS,
        "model": Factor(get_args(ModelForm)[:-1], get_args(ModelForm)[-1:]),
        "magnitude": _MAGNITUDES,
        "weights": _WEIGHTS,
        "dtype": Factor(tuple(there)),
    }


def other_settings(plan: MethodSuite, case: MethodCase) -> list[dict[str, Any]]:
    """Return settings that differ from those of `case`, as few dicts in which every setting has another value.

    A word or a switch has every other value, and a number one other value: the largest level that the reference accepts.
    Each dict has settings that the reference accepts together, and either numbers or words, because a word may switch a
    number off. Ranks, which give tensors other shapes, shares of dropout and keys are left out.
    """
    there = factors(plan, [case.dtype])
    numbers, words = dict[str, list[Any]](), dict[str, list[Any]]()
    for name, field in _fields(plan.method).items():
        if name not in there or name.endswith(("rank", "dropout", "key")):
            continue
        now = case.config.get(name, field.default)
        others = [level for level in there[name].levels if level != now and _accepts(plan, case, {name: level})]
        is_number = isinstance(now, int | float) and not isinstance(now, bool)
        if others:
            (numbers if is_number else words)[name] = [max(others)] if is_number else others
    found = list[dict[str, Any]]()
    for left in (numbers, words):
        while any(left.values()):
            found.append({})
            for name, others in left.items():
                if others and _accepts(plan, case, found[-1] | {name: others[0]}):
                    found[-1][name] = others.pop(0)
    return found


def _accepts(plan: MethodSuite, case: MethodCase, settings: Mapping[str, Any]) -> bool:
    return is_accepted(plan, replace(case, config={**case.config, **settings}))


@cache
def _fields(method: str) -> dict[str, FieldInfo]:
    return methods()[method].fields
