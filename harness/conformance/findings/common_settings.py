"""Settings that the failing cases of a check have in common, such as `rank >= 130`. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from harness.conformance.findings import summary
from harness.conformance.findings.outcomes import CheckOutcome, CheckStatus

_CHANCE = 0.02
"""Largest probability that chance alone explains a reported condition. Among few cases, some setting always agrees by
chance."""
_MOST_CONDITIONS = 2
_MOST_SAME = 2
"""Largest number of conditions that are named beside the first one because the same cases meet them."""
_MOST_WORDS = 3
"""Largest number of values of a word in a condition such as `side=left or right`."""
_DIVISORS = (2, 4, 8, 16, 32, 64, 128, 256)
_MOST_SHARE = 0.5
"""Each condition leaves at most this share of the passing cases that meet the conditions before it."""

_Features = Mapping[str, Any]
"""Name -> word, switch, number or None. A list of whole numbers gives its items, its largest item, product and length."""


@dataclass(frozen=True)
class CommonSettings:
    """The failing cases of one check of one implementation, and what they have in common."""

    implementation: str
    target: str
    check: str
    failing: int
    """Number of cases in which the check failed."""
    compared: int
    """Number of cases in which the check passed or failed. A known defect counts as a failure."""
    conditions: tuple[str, ...] = ()
    """Conditions that every failing case meets, such as `rank >= 130`. Empty if none tells them from the other cases."""
    others: int | None = None
    """Number of cases that meet all conditions and in which the check passed. None if there are no conditions."""
    same: tuple[str, ...] = ()
    """Conditions on other settings that the same cases meet as the first of `conditions`."""

    def __str__(self) -> str:
        if self.failing == self.compared:
            return f"fails in every case ({self.compared})"
        words = f"fails in {self.failing} of {self.compared} cases"
        if not self.conditions:
            return words
        first, *rest = self.conditions
        if self.same:
            first += f" (in these cases the same as {' or '.join(self.same)})"
        condition = " and ".join([first, *rest])
        if not self.others:
            return f"{words}: exactly those with {condition}"
        return (
            f"{words}, all with {condition} ({self.others} such {'case passes' if self.others == 1 else 'cases pass'})"
        )


def find(tried: Sequence[CheckOutcome]) -> list[CommonSettings]:
    """Return one object per failing check of each implementation and target. The check that fails most often comes first.

    A check with a single case is left out, and so are outcomes without settings: crashes, loaders, and random cases, which
    the search for a small failing case does not draw evenly.
    """
    found = list[CommonSettings]()
    for (target, implementation), several in summary.rows(one for one in tried if one.settings).items():
        checks = dict.fromkeys(one.check for one in several if one.status is CheckStatus.FAIL)
        found += [_of_check(implementation, target, check, several) for check in checks]
    return sorted((one for one in found if one.compared > 1), key=lambda one: -one.failing)


def _of_check(implementation: str, target: str, check: str, tried: Sequence[CheckOutcome]) -> CommonSettings:
    failing, passing = dict[tuple[str, str], _Features](), dict[tuple[str, str], _Features]()
    for one in tried:
        if one.check == check and one.status in (CheckStatus.FAIL, CheckStatus.KNOWN_DEFECT, CheckStatus.PASS):
            cases = passing if one.status is CheckStatus.PASS else failing
            cases[one.case, one.dtype] = _features({**one.settings, "dtype": one.dtype})
    for case in failing:
        passing.pop(case, None)  # it passed in another state
    total = len(failing) + len(passing)
    conditions, others, same = _conditions([*failing.values()], [*passing.values()])
    return CommonSettings(implementation, target, check, len(failing), total, conditions, others, same)


def _features(settings: Mapping[str, Any]) -> dict[str, Any]:
    found = dict[str, Any]()
    for name, value in settings.items():
        if value is None or isinstance(value, str | bool | int) or (isinstance(value, float) and math.isfinite(value)):
            found[name] = value
        elif isinstance(value, list | tuple) and all(isinstance(one, int) for one in value):
            found |= {f"{name}[{index}]": one for index, one in enumerate(value)}
            found |= {f"product of {name}": math.prod(value), f"length of {name}": len(value)}
            found |= {f"largest of {name}": max(value)} if value else {}
    return found


@dataclass(frozen=True)
class _Condition:
    feature: str
    words: str
    test: Callable[[Any], object]
    ways: int = 1
    """Number of conditions of this form, such as one per divisor. Each is a further chance to find one that holds."""

    def holds(self, case: _Features) -> bool:
        return self.feature in case and bool(self.test(case[self.feature]))


def _conditions(
    failing: Sequence[_Features], passing: Sequence[_Features]
) -> tuple[tuple[str, ...], int | None, tuple[str, ...]]:
    """Return conditions that all failing and few passing cases meet, and the number of these passing cases.

    Also return conditions on other settings that the same cases meet as the first one. Return none if such conditions are
    likely by chance, or if even the best excludes too few passing cases.
    """
    chosen, left, number, same = list[str](), list(passing), len(failing), list[str]()
    # The plainest come first: of equally good ones, the first is reported.
    alone, several = (_of_words(failing, passing, numbers) for numbers in ((1,), range(2, _MOST_WORDS + 1)))
    candidates = [*alone, *_of_sizes(failing), *several, *_of_divisors(failing)]
    ways = sum(one.ways for one in candidates)
    while left and len(chosen) < _MOST_CONDITIONS:
        remaining = {one.words: [case for case in left if one.holds(case)] for one in candidates}
        best = min(remaining, key=lambda words: len(remaining[words]), default="")  # the first of equal ones
        after = len(remaining.get(best, left))
        # So many cases meet the condition. The chance that all failing cases are among them by luck, for any candidate:
        chance = ways * math.comb(number + after, number) / math.comb(number + len(left), number)
        if after > _MOST_SHARE * len(left) or chance > _CHANCE:
            break
        if not chosen:
            # Only plain ones, such as `rank=16`: some size or divisor nearly always agrees.
            equal = [one for one in candidates if " " not in one.words and remaining[one.words] == remaining[best]]
            of_best = next(one.feature for one in candidates if one.words == best)
            same = list({one.feature: one.words for one in equal if one.feature != of_best}.values())[:_MOST_SAME]
        chosen.append(best)
        left = remaining[best]
    return (tuple(chosen), len(left), tuple(same)) if chosen else ((), None, ())


def _numbers(failing: Sequence[_Features]) -> dict[str, list[Any]]:
    """Map each feature that is a number in all failing cases to its values."""
    found = {name: [case.get(name) for case in failing] for name in failing[0]}
    return {name: values for name, values in found.items() if all(map(_is_number, values))}


def _of_sizes(failing: Sequence[_Features]) -> Iterator[_Condition]:
    """Yield conditions on the size of a number that all failing cases meet."""
    for name, values in _numbers(failing).items():
        least, most = min(values), max(values)
        if least == most:
            yield _Condition(name, f"{name}={least:g}", partial(_is_between, least, most))
        else:
            yield _Condition(name, f"{name} >= {least:g}", partial(_is_between, least, math.inf))
            yield _Condition(name, f"{name} <= {most:g}", partial(_is_between, -math.inf, most))


def _of_divisors(failing: Sequence[_Features]) -> Iterator[_Condition]:
    """Yield conditions on the divisors of a whole number that all failing cases meet."""
    ways = len(_DIVISORS)
    for name, values in _numbers(failing).items():
        if not all(isinstance(value, int) for value in values):
            continue
        if divisors := [by for by in _DIVISORS if all(_is_multiple(by, value) for value in values)]:
            by = divisors[-1]
            yield _Condition(name, f"{name} a multiple of {by}", partial(_is_multiple, by), ways)
        if others := [by for by in _DIVISORS if all(_is_no_multiple(by, value) for value in values)]:
            yield _Condition(name, f"{name} not a multiple of {others[0]}", partial(_is_no_multiple, others[0]), ways)


def _of_words(
    failing: Sequence[_Features], passing: Sequence[_Features], numbers: Collection[int]
) -> Iterator[_Condition]:
    """Yield conditions on a word or a switch that all failing cases meet: it has one of a few values.

    numbers: permitted numbers of values.
    """
    for name in failing[0]:
        values = dict.fromkeys(case.get(name) for case in failing)
        if all(name in case for case in failing) and len(values) in numbers and not any(map(_is_number, values)):
            there = {case.get(name) for case in (*failing, *passing)}
            text = f"{name}={' or '.join(map(str, values))}"
            yield _Condition(name, text, values.__contains__, math.comb(len(there), len(values)))


def _is_between(least: float, most: float, value: Any) -> bool:
    return _is_number(value) and least <= value <= most


def _is_multiple(by: int, value: Any) -> bool:
    return _is_number(value) and value % by == 0 and value != 0


def _is_no_multiple(by: int, value: Any) -> bool:
    return _is_number(value) and value % by != 0


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
