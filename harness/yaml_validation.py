"""Read YAML 1.2 files, remember the line of every value, and validate the values with pydantic models."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from yaml.reader import ReaderError

from harness.errors import Problem, SuiteError, did_you_mean, sort_problems

KeyPath = tuple[str | int, ...]
"""The keys and indices that lead from the top of a file to a value, e.g. `("matrix", 0, "cells", 2, "config", "rank")`."""

_Model = TypeVar("_Model", bound=BaseModel)

_TAG = "tag:yaml.org,2002:"
_SCALARS = {_TAG + kind for kind in ("null", "bool", "int", "float", "str")}
_MAX_DEPTH = 100
"""Maximum depth of nesting in a file. Python's own recursion limit is not enough, because libraries increase it."""
_MAX_NODES = 200_000
"""Maximum number of values in a file, with all aliases followed. With nested aliases, a few lines can stand for
gigabytes."""
_START = "`suite: NAME`, or see suites/smoke.yaml"
_EXPONENT = r"[eE][-+]?\d+"
_FLOAT = rf"[-+]?(\d[\d_]*(\.[\d_]*({_EXPONENT})?|{_EXPONENT})|\.(\d[\d_]*({_EXPONENT})?|inf|Inf|INF))|\.(nan|NaN|NAN)"
_PLAIN_VALUES = (
    ("null", r"~|null|Null|NULL|", ("~", "n", "N", "")),
    ("bool", r"true|True|TRUE|false|False|FALSE", tuple("tTfF")),
    ("int", r"[-+]?(0b[01_]+|0o[0-7_]+|0x[0-9a-fA-F_]+|[0-9][0-9_]*)", tuple("-+0123456789")),
    ("float", _FLOAT, tuple("-+.0123456789")),
    ("merge", r"<<", ("<",)),
)
"""Unquoted values that YAML 1.2 does not read as text, and the key `<<`: kind, pattern, possible first characters."""
_BOUNDS = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}
_TYPE_HINTS = {
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
"""Hint for the user, by type of pydantic's error."""


class Yaml12Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]  # without libyaml, ten times slower
    """A parser of YAML with the values of YAML 1.2: `yes` and `2026-01-01` are texts, and `1e-3` is a number."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}


for _kind_of_value, _pattern, _first in _PLAIN_VALUES:
    Yaml12Loader.add_implicit_resolver(_TAG + _kind_of_value, re.compile(f"^(?:{_pattern})$", re.ASCII), list(_first))


@dataclass(frozen=True)
class Document:
    """A YAML file whose top level is a mapping."""

    path: Path
    raw: bytes
    data: dict[str, Any]
    lines: dict[KeyPath, int]
    """Line of each value, by its path. A value that `<<` merges from another mapping has its line in that mapping."""
    problems: list[Problem]
    """Mistakes that do not prevent reading the rest of the file, e.g. a duplicate key."""
    unreadable: set[KeyPath]
    """Paths of the values that could not be read. In `data`, each of them is None."""

    def at(self, path: KeyPath) -> Any:
        """Return the value at `path`. Raises KeyError or IndexError if there is none."""
        data: Any = self.data
        for part in path:
            data = data[part]
        return data

    def where(self, *path: str | int) -> str:
        """Return the `file:line` of a value, or of the nearest enclosing value if the file lacks it."""
        while path and path not in self.lines:
            path = path[:-1]
        return f"{self.path}:{self.lines.get(path, 1)}"


class WrittenFloat(float):
    """A float that remembers its text in the file, because `0.10` has two digits and `0.1` only one."""

    text: str

    def __new__(cls, value: float, text: str) -> WrittenFloat:
        """Return the number with its text."""
        number = super().__new__(cls, value)
        number.text = text
        return number


def load(path: Path, *, tags: bool = False) -> Document:
    """Read a YAML file. Raises SuiteError with every mistake in its YAML."""
    document = read(path, tags=tags)
    if document.problems:
        raise SuiteError(sort_problems(document.problems))
    return document


def read(path: Path, *, tags: bool = False, texts: bool = False, start: str = _START) -> Document:
    """Read a YAML file. Raises SuiteError if it is not YAML, or if its top level is not a mapping.

    Other mistakes are in `Document.problems`. tags: allow tags such as `!function f.g`; such a value becomes the text
    after the tag. texts: read numbers with a fraction as `WrittenFloat`. start: an example of a first line, for the
    hint.
    """
    raw = _bytes(path)
    root = _compose(path, _decode(path, raw))
    builder = _Builder(path, tags, texts)
    try:
        data = builder.build(root, ()) if root is not None else None
    except RecursionError:
        problem = Problem(f"{path}:1", "nested too deeply once aliases are followed", "write it with fewer aliases")
        raise SuiteError([*builder.problems, problem]) from None
    if not isinstance(data, dict):
        what = "the file is empty" if root is None else f"expected keys and values, got {_kind(data)}"
        raise SuiteError([*builder.problems, Problem(f"{path}:1", what, f"start with {start}")])
    return Document(path, raw, data, builder.lines, builder.problems, builder.unreadable)


def load_model(path: Path, model: type[_Model], *, start: str = _START) -> tuple[Document, _Model]:
    """Read a YAML file. Return the document and its validated keys. start: an example of a first line, for the hint.

    Raises SuiteError with every mistake in YAML, keys and values.
    """
    document = read(path, start=start)
    return document, validate(document, model)


def validate(document: Document, model: type[_Model]) -> _Model:
    """Validate a document and return its keys. Raises SuiteError with every mistake in YAML, keys and values.

    The validators in `model` must raise ValueError with a text of the form "MISTAKE; HINT".
    """
    problems = list(document.problems)
    try:
        keys = model.model_validate(document.data)
    except ValidationError as error:
        problems += _problems(error, model, document)
    if problems:
        raise SuiteError(sort_problems(problems))
    return keys


def shortened(text: str) -> str:
    """Return `text`. If it has more than 60 characters, replace its end by `...`."""
    return text if len(text) <= 60 else text[:57] + "..."


def _bytes(path: Path) -> bytes:
    if path.exists() and not path.is_file():
        raise SuiteError([Problem(f"{path}:1", "not a file", "name a YAML file")])
    try:
        return path.read_bytes()
    except OSError as error:
        what = f"cannot read: {error.strerror}"
        raise SuiteError([Problem(f"{path}:1", what, "name a readable YAML file")]) from error


def _decode(path: Path, raw: bytes) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        what = f"byte 0x{raw[error.start]:02x} is not UTF-8"
        raise SuiteError([Problem(f"{path}:{line}", what, "save the file as UTF-8")]) from error


@lru_cache(maxsize=256)  # some files are read hundreds of times
def _compose(path: Path, text: str) -> Node | None:
    try:
        return yaml.compose(text, Loader=Yaml12Loader)  # type: ignore[no-any-return]
    except ReaderError as error:
        line = text.encode().count(b"\n", 0, error.position) + 1
        problem = Problem(f"{path}:{line}", f"not YAML: {error.reason}: {chr(error.character)!r}", "remove it")
    except yaml.MarkedYAMLError as error:
        problem = _syntax_problem(path, text, error)
    except RecursionError:
        problem = Problem(f"{path}:1", "not readable as YAML: nested too deeply", "close a bracket")
    raise SuiteError([problem])


def _syntax_problem(path: Path, text: str, error: yaml.MarkedYAMLError) -> Problem:
    mark, message = error.problem_mark or error.context_mark, error.problem or ""
    line, column = (mark.line, mark.column) if mark else (0, 0)
    there = (text.split("\n")[line : line + 1] or [""])[0]
    if "nesting depth" in message:
        return Problem(f"{path}:{line + 1}", "not readable as YAML: nested too deeply", "close a bracket")
    if "undefined alias" in message:
        name = re.split(r"[\s,:\]}]", there[column + 1 :])[0]
        hint = "write the value out, or define the anchor above this line"
        return Problem(f"{path}:{line + 1}", f"not YAML: {message} {name!r}", hint)
    hint = "indent with spaces" if "\t" in there[: column + 1] else "correct the YAML here or just above"
    return Problem(f"{path}:{line + 1}", f"not YAML: {message}", hint)


def _plain(kind: str, text: str) -> Any:
    """Return the value of a scalar. kind: its YAML type, e.g. `int`.

    Raises ValueError, KeyError or IndexError if the text does not fit a type that the file states, e.g. `!!int x`.
    """
    digits = text.replace("_", "")
    match kind:
        case "null":
            return None
        case "bool":
            return {"true": True, "false": False}[text.lower()]
        case "int":
            return int(digits, 0 if digits.lstrip("+-")[:2] in ("0b", "0o", "0x") else 10)
        case "float":
            return float(digits.lower().replace(".inf", "inf").replace(".nan", "nan"))
    return text


def _kind(data: object) -> str:
    return {list: "a list", dict: "keys and values", type(None): "nothing"}.get(type(data), f"`{data}`")


class _Builder:
    """A builder of data from the nodes of a parsed YAML file. It also collects the values' lines and the problems."""

    def __init__(self, path: Path, tags: bool, texts: bool) -> None:
        self.path, self.tags, self.texts = path, tags, texts
        self.lines: dict[KeyPath, int] = {}
        self.problems: list[Problem] = []
        self.unreadable: set[KeyPath] = set()
        self._open: set[int] = set()
        self._visited = 0

    def build(self, node: Node, path: KeyPath) -> Any:
        """Return the plain value of the node at `path`. Raises RecursionError if the node is nested too deeply."""
        self._count(1)
        if len(path) > _MAX_DEPTH:
            raise RecursionError
        # A value of a mapping already has the line of its key, because the value itself may start on the next line.
        self.lines.setdefault(path, node.start_mark.line + 1)
        if isinstance(node, ScalarNode):
            return self._scalar(node, path)
        if id(node) in self._open:
            return self._cannot_read(node, path, "an alias that contains itself", "write the value out")
        self._open.add(id(node))
        try:
            if isinstance(node, MappingNode):
                return self._mapping(node, path)
            return [self.build(item, (*path, index)) for index, item in enumerate(node.value)]
        finally:
            self._open.remove(id(node))

    def _count(self, nodes: int) -> None:
        """Add `nodes` to the number of visited nodes. Raises SuiteError if the sum is too large, because of aliases."""
        self._visited += nodes
        if self._visited > _MAX_NODES:
            what = f"more than {_MAX_NODES} values once aliases are followed"
            hint = "write it with fewer aliases"
            raise SuiteError([*self.problems, Problem(f"{self.path}:1", what, hint)])

    def _problem(self, node: Node, what: str, hint: str) -> None:
        self.problems.append(Problem(f"{self.path}:{node.start_mark.line + 1}", what, hint))

    def _cannot_read(self, node: Node, path: KeyPath, what: str, hint: str) -> None:
        self._problem(node, what, hint)
        self.unreadable.add(path)

    def _scalar(self, node: ScalarNode, path: KeyPath) -> Any:
        tag = str(node.tag)
        if tag not in _SCALARS:
            if tag != _TAG + "timestamp" and not self.tags:  # a date is text here
                return self._cannot_read(node, path, f"the tag `{tag}` is not allowed here", "write a plain value")
            return node.value
        try:
            value = _plain(tag.removeprefix(_TAG), node.value)
        except ValueError as error:  # Python reads no integer of thousands of digits
            return self._cannot_read(node, path, f"not a readable number: {error}", "write a number of fewer digits")
        except (KeyError, IndexError):
            kind = tag.removeprefix(_TAG)
            return self._cannot_read(
                node, path, f"a text that is no {kind}, after the tag `!!{kind}`", "remove the tag"
            )
        if self.texts and isinstance(value, float):
            return WrittenFloat(value, node.value)
        try:
            str(value).encode()
        except UnicodeEncodeError:  # an escape like "\ud800" could not be written to a Record
            return self._cannot_read(node, path, "half a surrogate pair, which no file can hold", "write the character")
        return value

    def _mapping(self, node: MappingNode, path: KeyPath) -> dict[str, Any]:
        pairs: dict[str, tuple[ScalarNode, Node]] = {}
        for key, value in self._pairs(node):
            first, _ = pairs.setdefault(str(key.value), (key, value))
            if first is not key:
                what = f"`{key.value}` is given twice, first in line {first.start_mark.line + 1}"
                self._problem(key, what, "keep one of them")
        for key, value in self._merged(node):
            pairs.setdefault(str(key.value), (key, value))
        built = {}
        for name, (key, value) in pairs.items():
            self.lines[(*path, name)] = key.start_mark.line + 1
            built[name] = self.build(value, (*path, name))
        return built

    def _pairs(self, node: MappingNode) -> Iterator[tuple[ScalarNode, Node]]:
        for key, value in node.value:
            if not isinstance(key, ScalarNode):
                self._problem(key, "a key that is not a word", "write `key: value`")
            elif str(key.tag) != _TAG + "merge":
                yield key, value

    def _merged(self, node: MappingNode, inside: tuple[int, ...] = ()) -> Iterator[tuple[ScalarNode, Node]]:
        """Yield pairs (key, value) from the mappings that `node` merges with `<<`. The nearest mapping comes first."""
        if id(node) in inside:
            self._problem(node, "an alias that contains itself", "write the value out")
            return
        for key, value in node.value:
            if not isinstance(key, ScalarNode) or str(key.tag) != _TAG + "merge":
                continue
            for source in value.value if isinstance(value, SequenceNode) else [value]:
                if isinstance(source, MappingNode):
                    self._count(1 + len(source.value))
                    yield from self._pairs(source)
                    yield from self._merged(source, (*inside, id(node)))
                else:
                    self._problem(key, "`<<` merges a value that has no keys", "write `<<: *anchor` of a mapping")


def _problems(error: ValidationError, model: type[BaseModel], document: Document) -> Iterator[Problem]:
    for detail in error.errors(include_url=False):
        path = _data_path(document.data, detail["loc"])
        if path not in document.unreadable:  # an unreadable value is already a problem of the document
            yield Problem(document.where(*path), *_sentence(dict(detail), path, model))


def _sentence(detail: dict[str, Any], path: KeyPath, model: type[BaseModel]) -> tuple[str, str]:
    """Return a sentence that describes one of pydantic's errors, and a hint."""
    kind, given, limits = detail["type"], detail["input"], detail.get("ctx", {})
    name = next((part for part in reversed(detail["loc"]) if isinstance(part, str)), "")
    if kind == "extra_forbidden":
        return f"unknown key `{name}`", did_you_mean(name, _known_keys(model, detail["loc"][:-1]), "keys here")
    if kind == "missing":
        return f"`{name}` is missing", f"add `{name}:`"
    if kind == "value_error":
        what, _, hint = detail["msg"].removeprefix("Value error, ").partition("; ")
        return what, hint
    subject = f"an entry of `{name}`" if path and isinstance(path[-1], int) else f"`{name}`"
    what = f"{subject} is {shortened(repr(given))}"
    if kind == "literal_error":
        choices = re.findall(r"'([^']+)'", limits["expected"])
        return f"{what}, which is none of {', '.join(choices)}", did_you_mean(str(given), choices, "one of")
    if kind == "string_pattern_mismatch":
        return what, "write letters, digits and . _ + - only"
    for bound, words in _BOUNDS.items():
        if bound in limits:
            limit = limits[bound]
            return what, f"write {words} {f'{limit:g}' if isinstance(limit, float) else limit}"
    if kind in ("too_short", "string_too_short"):
        return f"{subject} is empty", "give it a value, or leave it out"
    return what, _TYPE_HINTS.get(kind, detail["msg"])


def _known_keys(model: type[BaseModel], loc: tuple[str | int, ...]) -> list[str]:
    for part in loc:
        if isinstance(part, str):
            fields = {field.alias or name: field for name, field in model.model_fields.items()}
            model = _inner(fields[part].annotation) or model
    return [field.alias or name for name, field in model.model_fields.items()]


def _inner(annotation: Any) -> type[BaseModel] | None:
    """Return the pydantic model in a type such as `list[Model] | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((inner for part in get_args(annotation) if (inner := _inner(part))), None)


def _data_path(data: Any, loc: tuple[str | int, ...]) -> KeyPath:
    """Return the path in the file for `loc`, a location from pydantic.

    A file may hold a single value where the model has a list. Then `loc` has an index 0 that the returned path omits.
    """
    path: KeyPath = ()
    for part in loc:
        if (isinstance(data, dict) and part in data) or (isinstance(data, list) and isinstance(part, int)):
            data = data[part]  # type: ignore[index]
            path = (*path, part)
    return path
