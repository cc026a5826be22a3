"""What a suite's YAML may say: the keys, their types and their plausible ranges. What they mean is in `suites`."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import BaseModel, BeforeValidator, Field, ValidationError

from harness.errors import Problem, closest, near
from harness.records.record import Dtype, FrozenModel, Optimizer, Quantization
from harness.yaml_lines import Document, KeyPath

_T = TypeVar("_T")
# A scalar stands for a list of one: every axis of a matrix may be written either way.
OneOrMany = Annotated[list[_T], BeforeValidator(lambda v: v if isinstance(v, list) else [v]), Field(min_length=1)]
Id = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]*$")]
Word = Annotated[str, Field(min_length=1)]
Rate = Annotated[float, Field(gt=0, le=1)]
Count = Annotated[int, Field(ge=0, le=10_000_000)]
Positive = Annotated[int, Field(ge=1, le=1_000_000)]

_Model = TypeVar("_Model", bound=BaseModel)


class Keys(BaseModel):
    """Keys of one place in a suite. All are optional: what a Cell needs may stand in its block instead."""

    model_config = FrozenModel.model_config


class BaseKeys(Keys):
    """`base:` of a Cell."""

    quantization: Quantization = "none"
    implementation: str = ""


class TrainingKeys(Keys):
    """`training:` of a Cell; the fields of records.Training."""

    steps: Count | None = None
    batch: OneOrMany[Positive] | None = None
    lr: OneOrMany[Rate] | None = None
    head_lr: Rate | None = None
    warmup: Count | None = None
    weight_decay: Annotated[float, Field(ge=0, le=1)] | None = None
    # Two special tokens of an encoder and two of text, or a prompt of some tokens and its answer.
    max_tokens: OneOrMany[Annotated[int, Field(ge=4, le=1_000_000)]] | None = None
    accumulate: OneOrMany[Positive] | None = None
    checkpointing: OneOrMany[bool] | None = None
    lr_ratio: OneOrMany[Annotated[float, Field(gt=0, le=10_000)]] | None = None
    compile: OneOrMany[bool] | None = None
    layerwise: OneOrMany[bool] | None = None


class EvaluationKeys(Keys):
    """`evaluation:` of a Cell; the fields of records.Evaluation."""

    items: Positive | None = None
    batch: Positive | None = None


class PromptKeys(Keys):
    """`prompts:` of a Cell, of its latencies; fields of records.Evaluation."""

    batch: Positive | None = Field(default=None, serialization_alias="prompt_batch")
    tokens: Positive | None = Field(default=None, serialization_alias="prompt_tokens")
    # The least that have an interval at 95 %.
    passes: Annotated[int, Field(ge=6, le=1_000_000)] | None = None


class TuneKeys(Keys):
    """`tune:` of a Cell; see suite_tuning."""

    lr: OneOrMany[Rate] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 100
    items: Positive | None = None
    config: dict[str, Any] = {}


Timed = Literal["every-seed", "first-seed", "never"]
"""Which Cells of an entry have their latencies measured; a try of a search for a learning rate never has."""


class CellKeys(Keys):
    """One entry of `cells:`, or a block that has none. Lists are axes: every combination is a Cell."""

    id: Id | None = None
    model: OneOrMany[Word] | None = None
    task: OneOrMany[Word] | None = None
    method: OneOrMany[Word] | None = None
    implementation: OneOrMany[Word] = ["reference"]
    config: dict[str, Any] = {}
    base: OneOrMany[BaseKeys] = [BaseKeys()]
    optimizer: OneOrMany[Optimizer] = ["adamw"]
    dtype: OneOrMany[Dtype] = ["float32"]
    seed: OneOrMany[Annotated[int, Field(ge=0, lt=2**32)]] = [0]
    training: TrainingKeys = TrainingKeys()
    evaluation: EvaluationKeys = EvaluationKeys()
    latency: Timed = "every-seed"
    prompts: PromptKeys = PromptKeys()
    tune: TuneKeys | None = None

    def of_evaluation(self) -> dict[str, Any]:
        """Return what is asked of records.Evaluation, by its fields."""
        prompts = self.prompts.model_dump(exclude_none=True, by_alias=True)
        return self.evaluation.model_dump(exclude_none=True) | prompts


class BlockKeys(CellKeys):
    """One entry of `matrix:`; its keys are shared by its `cells`."""

    cells: list[CellKeys] | None = Field(default=None, min_length=1)


class ComparisonKeys(Keys):
    """One entry of `comparisons:`: `better` and `than`, or `same-losses` and `as`."""

    better: OneOrMany[Id] | None = None
    than: OneOrMany[Id] | None = None
    same_losses: OneOrMany[Id] | None = Field(default=None, alias="same-losses")
    as_: OneOrMany[Id] | None = Field(default=None, alias="as")
    says: Word | None = None


class SuiteKeys(Keys):
    """The top level of a suite."""

    suite: Id | None = None
    title: str = ""
    about: str = ""
    sources: list[dict[str, Any]] = []
    matrix: list[BlockKeys] | None = Field(default=None, min_length=1)
    comparisons: list[ComparisonKeys] = []


_ENTRIES = ("matrix", "cells", "comparisons", "sources", "claims", "rows", "otherwise")
"""Lists whose entries stand each for themselves; other lists are axes of values."""


def read(document: Document, model: type[_Model]) -> tuple[_Model, list[Problem]]:
    """Validate a file's keys. Returns what is sound, and all problems, those of the file as YAML too.

    Wrong values are taken out, and a key that is nearly one of those here is taken for it; the rest goes on to the checks
    of meaning, so that one reading finds every mistake. Changes the document.
    """
    problems = list(document.problems)
    take_out(document, document.unreadable)
    while True:
        try:
            return model.model_validate(document.data), problems
        except ValidationError as error:
            found = list(_findings(error, model, document))
            problems += [problem for _, problem, _ in found]
            meant = {way: name for way, _, name in found if name and name not in document.at(way[:-1])}
            _respell(document, meant)  # before anything moves up
            take_out(document, (way for way, _, _ in found if way not in meant))


def explain(
    error: ValidationError, model: type[BaseModel], document: Document, at: KeyPath = ()
) -> list[tuple[KeyPath, Problem]]:
    """Put pydantic's findings about the part of a document at `at` into sentences; each with its way."""
    return [(way, problem) for way, problem, _ in _findings(error, model, document, at)]


def take_out(document: Document, ways: Iterable[KeyPath]) -> None:
    """Take values out of a document's data and note them as cut.

    An entry leaves an empty one in its place. Of an axis one value goes, and those behind it move up; the last takes the
    axis with it.
    """
    gone: dict[KeyPath, set[Any]] = defaultdict(set)
    for *around, last in ways:
        gone[tuple(around)].add(last)
    moves: dict[KeyPath, dict[str | int, str | int]] = {}
    # From the innermost outwards: what is moved leads to nothing that is still to be taken out.
    for length in range(max(map(len, gone), default=0), -1, -1):
        for way in [way for way in gone if len(way) == length]:
            parts, inside = gone[way], document.at(way)
            document.cut.update((*way, part) for part in parts)
            if isinstance(inside, dict):
                for key in parts:
                    del inside[key]
            elif is_entry((*way, 0)):
                for index in parts:
                    inside[index] = {}
            elif left := [index for index in range(len(inside)) if index not in parts]:
                inside[:] = [inside[index] for index in left]
                # A cut stays known, behind the values that are left.
                moves[way] = {old: new for new, old in enumerate([*left, *sorted(parts)])}
            else:
                gone[way[:-1]].add(way[-1])
    document.move(moves)


def is_entry(way: KeyPath) -> bool:
    """Say whether `way` leads to one entry of a list of entries, and not to a value of an axis."""
    return len(way) > 1 and isinstance(way[-1], int) and way[-2] in _ENTRIES


def _respell(document: Document, meant: Mapping[KeyPath, str]) -> None:
    """Give keys the names that were meant."""
    moves: dict[KeyPath, dict[str | int, str | int]] = {}
    for (*above, key), name in meant.items():
        keys = document.at(tuple(above))
        if name not in keys:  # else another key was taken for it
            keys[name] = keys.pop(key)
            moves.setdefault(tuple(above), {})[key] = name
    document.move(moves)


def _findings(
    error: ValidationError, model: type[BaseModel], document: Document, at: KeyPath = ()
) -> Iterator[tuple[KeyPath, Problem, str]]:
    """Yield the way of each finding, what it is, and of an unknown key the one that seems to be meant."""
    for detail in error.errors(include_url=False):
        way = (*at, *_within(document.data, at, detail["loc"]))
        named = [part for part in (*at, *detail["loc"]) if isinstance(part, str)]
        key = f"`{named[-1]}`" if named else ""
        # Of an axis written as a list, one entry is wrong.
        listed = f"an entry of {key}" if way and isinstance(way[-1], int) else key
        what, hint = _sentence(dict(detail), key, listed, model)
        unknown = detail["type"] == "extra_forbidden"
        meant = closest(named[-1], _known_keys(model, detail["loc"][:-1])) if unknown else ""
        yield way, Problem(document.where(*way), what, hint), meant


def _sentence(detail: dict[str, Any], key: str, subject: str, model: type[BaseModel]) -> tuple[str, str]:
    """Return what is wrong and the mend."""
    kind, given, limits = detail["type"], detail["input"], detail.get("ctx", {})
    if kind == "extra_forbidden":
        return f"unknown key {key}", near(key.strip("`"), _known_keys(model, detail["loc"][:-1]), "keys here")
    if kind == "missing":
        return f"{key} is missing", f"add {key}"
    if kind == "value_error":
        return detail["msg"].removeprefix("Value error, "), "suites/sources.yaml shows the forms"
    what = f"{subject} is {shortened(repr(given))}"
    if kind == "literal_error":
        choices = re.findall(r"'([^']+)'", limits["expected"])
        return f"{what}, which is none of {', '.join(choices)}", near(str(given), choices, "one of")
    if kind == "string_pattern_mismatch":
        return what, "write letters, digits and . _ + - only"
    for bound, words in _BOUNDS.items():
        if bound in limits:
            limit = limits[bound]
            return what, f"write {words} {f'{limit:g}' if isinstance(limit, float) else limit}"
    if kind in ("too_short", "string_too_short"):
        return f"{subject} is empty", "give it a value, or leave it out"
    return what, _FORMS.get(kind, detail["msg"])


def shortened(shown: str) -> str:
    """Return a value's text, or its beginning where it is long."""
    return shown if len(shown) <= 60 else shown[:57] + "..."


_BOUNDS = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}
_FORMS = {
    "int_type": "write a whole number, without quotes",
    "int_from_float": "write a whole number",
    "bool_type": "write true or false, without quotes",
    "float_type": "write a number, without quotes",
    "finite_number": "write a finite number",
    "string_type": "write a word; put it in quotes if it looks like a number",
    "list_type": "write a list: [a, b], or lines that start with -",
    "dict_type": "write keys and values: {key: value}",
    "model_type": "write keys and values: {key: value}",
}


def _known_keys(model: type[BaseModel], loc: tuple[str | int, ...]) -> list[str]:
    for part in loc:
        if isinstance(part, str):
            fields = {field.alias or name: field for name, field in model.model_fields.items()}
            model = _inner(fields[part].annotation) or model
    return [field.alias or name for name, field in model.model_fields.items()]


def _inner(annotation: Any) -> type[BaseModel] | None:
    """Return the model inside an annotation such as `list[Model] | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((inner for part in get_args(annotation) if (inner := _inner(part))), None)


def _within(data: Any, at: KeyPath, loc: tuple[str | int, ...]) -> KeyPath:
    """Follow pydantic's location through the data as it was written."""
    for part in at:
        data = data[part]
    way: KeyPath = ()
    for part in loc:
        # A scalar that stands for a list of one has no index 0.
        if (isinstance(data, dict) and part in data) or (isinstance(data, list) and isinstance(part, int)):
            data = data[part]  # type: ignore[index]
            way = (*way, part)
    return way
