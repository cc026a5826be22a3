"""Checks of the measure names and arguments in a claim file. Each error has its line. Imports no torch.

A measure is a function that computes a number or checks a property. In a claim file, a table holds rows, and each row
is a claim. A KeyPath is a place in the file: the keys and list positions that lead to a value.
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from pydantic import ValidationError

from harness.claims.claim import MeasureRequest
from harness.claims.measure import FOLDER, Measure, measures
from harness.claims.printed_number import Dimension, exact, shortly
from harness.errors import Problem, closest_match, did_you_mean
from harness.methods.peft_config import UNREFERENCED
from harness.methods.spec import methods
from harness.yaml_validation import Document, KeyPath


class Arguments:
    """Checker of the measures and arguments in one claim file. It appends errors to `problems`."""

    def __init__(self, document: Document, problems: list[Problem]) -> None:
        self.document, self.problems = document, problems

    def problem(self, way: KeyPath, what: str, hint: str) -> None:
        """Add a problem at the place `way` of the file. A problem that several claims share is added once."""
        one = Problem(self.document.where(*way), what, hint)
        if one not in self.problems:
            self.problems.append(one)

    def measure(self, name: str | None, way: KeyPath) -> Measure | None:
        """Return the measure called `name`.

        If there is none, add a problem, and return the measure with the closest name, or None if no name is close.
        """
        if name and name not in measures():
            self.problem(way, f"unknown measure `{name}`", did_you_mean(name, measures()))
            name = closest_match(name, measures())
        return measures().get(name or "")

    def request(
        self, measure: Measure, arguments: Mapping[str, Any], at: KeyPath, also: list[KeyPath]
    ) -> MeasureRequest | None:
        """Check the arguments of a measure. Return the measure and its arguments as a MeasureRequest.

        If the arguments have problems, add the problems and return None. at: place of the arguments in the file. also:
        further places where an argument may stand: a row inherits arguments from its table.
        """
        before = len(self.problems)
        plain = {key: value for key, value in arguments.items() if key not in measure.nested}
        nested = {
            key: self._nested(measure, key, arguments[key], self._place(key, at, also))
            for key in arguments
            if key in measure.nested
        }
        try:
            placeholders: dict[str, Any] = {k: [] if isinstance(v, list) else Fraction(0) for k, v in nested.items()}
            folder = {FOLDER: self.document.path.parent}
            model = measure.arguments.model_validate(plain | placeholders, context=folder)
        except ValidationError as error:
            for detail in error.errors(include_url=False):
                self._argument(measure, dict(detail), at, also)
            wrong = {detail["loc"][0] for detail in error.errors(include_url=False)}
            if "config" in plain and not wrong & {"method", "config"}:
                self._config(plain.get("method"), plain["config"], self._place("config", at, also))
            return None
        checked = {key: getattr(model, key) for key in plain if key in measure.arguments.model_fields}
        if "config" in checked:
            self._config(checked.get("method"), checked["config"], self._place("config", at, also))
        return MeasureRequest(measure.name, checked | nested) if len(self.problems) == before else None

    def _place(self, key: str, at: KeyPath, also: list[KeyPath]) -> KeyPath:
        return next((way for one in (at, *also) if (way := (*one, key)) in self.document.lines), at)

    def _argument(self, measure: Measure, detail: dict[str, Any], at: KeyPath, also: list[KeyPath]) -> None:
        key = str(detail["loc"][0])
        place = self._place(key, at, also)
        known = list(measure.arguments.model_fields)
        if detail["type"] == "extra_forbidden":
            self.problem(place, f"`{measure.name}` has no argument `{key}`", did_you_mean(key, known, "it takes"))
        elif detail["type"] == "missing":
            self.problem(place, f"`{measure.name}` needs `{key}`", f"add {key} to `with`")
        else:
            what = detail["msg"].removeprefix("Value error, ")
            self.problem(
                place,
                f"`{key}` of `{measure.name}`: {what}, got {shortly(detail['input'])}",
                f"see `peft-harness explain {measure.name}`",
            )

    def _nested(self, measure: Measure, key: str, written: Any, way: KeyPath) -> Any:
        """Check the argument `key`, which must be a quantity or a list of quantities. Return it in parsed form.

        A quantity is a printed number, or a request for another measure.
        """
        nested = measure.nested[key]
        if nested.is_list != isinstance(written, list):
            form = "a list of quantities: [a, b]" if nested.is_list else "one quantity, no list"
            self.problem(way, f"`{key}` of `{measure.name}`: got {shortly(written)}", f"write {form}")
            return [] if nested.is_list else None
        if not nested.is_list:
            return self._quantity(written, way, nested.dimensions)
        return [self._quantity(one, (*way, index), nested.dimensions) for index, one in enumerate(written)]

    def _quantity(self, written: Any, way: KeyPath, dimensions: tuple[Dimension, ...]) -> Any:
        """Parse a quantity: a printed number, or a request for another measure. Return a Fraction or a MeasureRequest.

        If `written` is neither, add a problem and return None. dimensions: allowed dimensions of the other measure.
        """
        if (number := exact(written)) is not None:
            return number
        name = written.get("measure") if isinstance(written, dict) and written.keys() <= {"measure", "with"} else None
        inside = written.get("with", {}) if isinstance(name, str) else None
        if not isinstance(inside, dict):
            hint = "write a number that the paper prints, or {measure: NAME, with: {...}}"
            self.problem(way, f"{shortly(written)} is not a quantity", hint)
            return None
        inner = self.measure(name, (*way, "measure"))
        if inner is None:
            return None
        if inner.dimension == "property" or (dimensions and inner.dimension not in dimensions):
            what = "returns no number" if inner.dimension == "property" else f"is in {inner.dimension}"
            hint = (
                f"name a measure in {' or '.join(dimensions)}" if dimensions else "name a measure that returns a number"
            )
            self.problem(way, f"`{inner.name}` {what}", hint)
        return self.request(inner, inside, (*way, "with"), [])

    def _config(self, method: str | None, config: Mapping[str, Any], way: KeyPath) -> None:
        fields = (methods() | UNREFERENCED)[method].fields if method else {}
        for key, value in config.items():
            if key not in fields:
                self.problem((*way, key), f"{method} has no `{key}`", did_you_mean(key, fields))
            elif wrong := fields[key].problem(value):
                self.problem((*way, key), f"`{key}` of {method}: {wrong}", fields[key].hint)
