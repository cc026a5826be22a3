"""What a claim asks of measures: names and arguments, checked without torch, each mistake with its line."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from pydantic import ValidationError

from harness.claims.claim import Asking
from harness.claims.measure import FOLDER, Measure, measures
from harness.claims.printed_number import Dimension, exact, shortly
from harness.errors import Problem, closest_match, did_you_mean
from harness.methods.spec import methods
from harness.yaml_lines import Document, KeyPath


class Arguments:
    """The checks of one file; mistakes go into the list `problems`."""

    def __init__(self, document: Document, problems: list[Problem]) -> None:
        self.document, self.problems = document, problems

    def problem(self, way: KeyPath, what: str, hint: str) -> None:
        """Keep a mistake; one that several claims share is one."""
        one = Problem(self.document.where(*way), what, hint)
        if one not in self.problems:
            self.problems.append(one)

    def measure(self, name: str | None, at: KeyPath, inherited: bool, way: KeyPath) -> Measure | None:
        """Return the measure of a claim at `at`, or the one that a misspelt name seems to mean.

        inherited: whether its table at `way` names it.
        """
        if not name:
            return None
        if name not in measures():
            place = (*way, "measure") if inherited else (*at, "measure")
            self.problem(place, f"no measure is called `{name}`", did_you_mean(name, measures()))
            name = closest_match(name, measures())
        return measures().get(name)

    def asking(self, measure: Measure, arguments: Mapping[str, Any], at: KeyPath, also: list[KeyPath]) -> Asking | None:
        """Check the arguments of a measure. also: where else a key may stand, for a row inherits those of its table."""
        before = len(self.problems)
        given = {key: value for key, value in arguments.items() if key not in measure.nested}
        asked = {
            key: self._argued(measure, key, arguments[key], self._place(key, at, also))
            for key in arguments
            if key in measure.nested
        }
        try:
            standing_in: dict[str, Any] = {k: [] if isinstance(v, list) else Fraction(0) for k, v in asked.items()}
            folder = {FOLDER: self.document.path.parent}
            model = measure.arguments.model_validate(given | standing_in, context=folder)
        except ValidationError as error:
            for detail in error.errors(include_url=False):
                self._argument(measure, dict(detail), at, also)
            wrong = {detail["loc"][0] for detail in error.errors(include_url=False)}
            if "config" in given and not wrong & {"method", "config"}:
                self._config(given.get("method"), given["config"], self._place("config", at, also))
            return None
        checked = {key: getattr(model, key) for key in given if key in measure.arguments.model_fields}
        if "config" in checked:
            self._config(checked.get("method"), checked["config"], self._place("config", at, also))
        return Asking(measure.name, checked | asked) if len(self.problems) == before else None

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
                f"`{key}` of `{measure.name}` is {shortly(detail['input'])}: {what}",
                f"see `peft-harness explain {measure.name}`",
            )

    def _argued(self, measure: Measure, key: str, written: Any, way: KeyPath) -> Any:
        """Return an argument that is a quantity, or a list of them."""
        nested = measure.nested[key]
        if nested.several != isinstance(written, list):
            form = "a list of quantities: [a, b]" if nested.several else "one quantity, no list"
            self.problem(way, f"`{key}` of `{measure.name}` is {shortly(written)}", f"write {form}")
            return [] if nested.several else None
        if not nested.several:
            return self._quantity(written, way, nested.dimensions)
        return [self._quantity(one, (*way, index), nested.dimensions) for index, one in enumerate(written)]

    def _quantity(self, written: Any, way: KeyPath, dimensions: tuple[Dimension, ...]) -> Any:
        """Return a number of the paper's, or what is asked of another measure."""
        if (number := exact(written)) is not None:
            return number
        name = written.get("measure") if isinstance(written, dict) and written.keys() <= {"measure", "with"} else None
        inside = written.get("with", {}) if isinstance(name, str) else None
        if not isinstance(inside, dict):
            hint = "write a number of the paper's, or {measure: NAME, with: {...}}"
            self.problem(way, f"{shortly(written)} is no quantity", hint)
            return None
        inner = self.measure(name, way, False, way)
        if inner is None:
            return None
        if inner.dimension == "property" or (dimensions and inner.dimension not in dimensions):
            what = "finds no number" if inner.dimension == "property" else f"is in {inner.dimension}"
            hint = f"name a measure in {' or '.join(dimensions)}" if dimensions else "name a measure that does"
            self.problem(way, f"`{inner.name}` {what}", hint)
        return self.asking(inner, inside, (*way, "with"), [])

    def _config(self, method: str | None, config: Mapping[str, Any], way: KeyPath) -> None:
        fields = methods()[method].fields if method else {}
        for key, value in config.items():
            if key not in fields:
                self.problem((*way, key), f"{method} has no `{key}`", did_you_mean(key, fields))
            elif wrong := fields[key].problem(value):
                self.problem((*way, key), f"`{key}` of {method}: {wrong}", fields[key].hint)
