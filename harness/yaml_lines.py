"""YAML 1.2 into plain Python data, with the line of every value and every mistake of the file at once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode

from harness.errors import Problem, SuiteError

Way = tuple[str | int, ...]
"""The way to a value, e.g. `("matrix", 0, "cells", 2, "config", "rank")`."""

_TAG = "tag:yaml.org,2002:"
_SCALARS = {_TAG + kind for kind in ("null", "bool", "int", "float", "str")}
# Aliases may repeat a node inside a node inside a node: a file of a few lines can stand for gigabytes.
_MOST_NODES = 200_000


@dataclass(frozen=True)
class Document:
    """One YAML file: its data and the line each value was written on (for a merged key, the line of its anchor)."""

    path: Path
    raw: bytes
    data: dict[str, Any]
    lines: dict[Way, int]

    def at(self, way: Way) -> Any:
        """Return the value at `way`."""
        data: Any = self.data
        for part in way:
            data = data[part]
        return data

    def where(self, *way: str | int) -> str:
        """Return `file:line` of a value, or of the nearest thing around it that is in the file."""
        while way and way not in self.lines:
            way = way[:-1]
        return f"{self.path}:{self.lines.get(way, 1)}"


_START = "`suite: NAME`, or see suites/smoke.yaml"


class Written(float):
    """A number with a fraction, and its characters as written: `0.10` says more than 0.1."""

    text: str

    def __new__(cls, value: float, text: str) -> Written:
        """Return the number with its text."""
        made = super().__new__(cls, value)
        made.text = text
        return made


def load(path: Path, *, tags: bool = False, texts: bool = False, start: str = _START) -> Document:
    """Read a file whose top level is a mapping; raises SuiteError with everything that is wrong with it as YAML.

    tags: whether values may have tags of their own, such as `!function f.g`; such a value is its text. texts: whether
    numbers with a fraction keep their characters, as `Written`. start: how such a file begins, for a message.
    """
    raw = _read(path)
    root = _compose(path, _decode(path, raw))
    builder = _Builder(path, tags, texts)
    data = builder.build(root, ()) if root is not None else None
    if root is None or not isinstance(data, dict):
        what = "the file is empty" if root is None else f"expected keys and values, got {_kind(data)}"
        builder.problems.append(Problem(f"{path}:1", what, f"start with {start}"))
    if builder.problems or not isinstance(data, dict):
        raise SuiteError(builder.problems)
    return Document(path, raw, data, builder.lines)


def _read(path: Path) -> bytes:
    if path.exists() and not path.is_file():
        raise SuiteError([Problem(f"{path}:1", "not a file", "name a YAML file")])
    try:
        return path.read_bytes()
    except OSError as error:
        raise SuiteError(
            [Problem(f"{path}:1", f"cannot read: {error.strerror}", "name a readable YAML file")]
        ) from error


def _decode(path: Path, raw: bytes) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        what = f"byte 0x{raw[error.start]:02x} is not UTF-8"
        raise SuiteError([Problem(f"{path}:{line}", what, "save the file as UTF-8")]) from error


def _compose(path: Path, text: str) -> Node | None:
    try:
        return YAML(typ="safe", pure=True).compose(text)  # type: ignore[no-any-return]
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        mend = "indent with spaces" if "\\t" in (error.problem or "") else "mend the YAML here or just above"
        problem = Problem(f"{path}:{mark.line + 1 if mark else 1}", f"not YAML: {error.problem}", mend)
    except YAMLError as error:
        line = text.count("\n", 0, getattr(error, "position", 0)) + 1
        problem = Problem(f"{path}:{line}", f"not YAML: {getattr(error, 'reason', error)}", "take the character out")
    except RecursionError:
        problem = Problem(f"{path}:1", "not YAML that can be read: nested too deeply", "close a bracket")
    raise SuiteError([problem])


def _kind(data: object) -> str:
    return {list: "a list", dict: "keys and values", type(None): "nothing"}.get(type(data), f"`{data}`")


class _Builder:
    """Turns nodes into data; collects lines and problems on the way."""

    def __init__(self, path: Path, tags: bool, texts: bool) -> None:
        self.path, self.tags, self.texts = path, tags, texts
        self.lines: dict[Way, int] = {}
        self.problems: list[Problem] = []
        self._constructor = YAML(typ="safe", pure=True).constructor
        self._open: list[int] = []
        self._built = 0

    def build(self, node: Node, way: Way) -> Any:
        """Return the plain value of a node; `way` is where it goes."""
        self._built += 1
        # The key's line stands already when this is a value; a value on the next line is less helpful.
        self.lines.setdefault(way, node.start_mark.line + 1)
        if self._built > _MOST_NODES or id(node) in self._open:
            self._too_much(node)
            return None
        if isinstance(node, ScalarNode):
            return self._scalar(node)
        self._open.append(id(node))
        try:
            if isinstance(node, MappingNode):
                return self._mapping(node, way)
            return [self.build(item, (*way, index)) for index, item in enumerate(node.value)]
        finally:
            self._open.pop()

    def _problem(self, node: Node, what: str, mend: str) -> None:
        self.problems.append(Problem(f"{self.path}:{node.start_mark.line + 1}", what, mend))

    def _too_much(self, node: Node) -> None:
        if id(node) in self._open:
            self._problem(node, "an alias that contains itself", "write the value out")
        elif self._built == _MOST_NODES + 1:
            what = f"more than {_MOST_NODES} values once aliases are followed"
            self.problems.append(Problem(f"{self.path}:1", what, "write it without so many aliases"))

    def _scalar(self, node: ScalarNode) -> Any:
        tag = str(node.tag)
        if tag not in _SCALARS:
            if tag != _TAG + "timestamp" and not self.tags:  # what looks like a date is text here
                self._problem(node, f"a tag, `{tag}`, which is not allowed here", "write a plain value")
            return node.value
        try:
            value = self._constructor.construct_object(node)
        except ValueError as error:  # Python reads no whole number of thousands of digits
            self._problem(node, f"no number that can be read: {error}", "write fewer digits")
            return None
        if self.texts and isinstance(value, float):
            return Written(value, node.value)
        try:
            str(value).encode()
        except UnicodeEncodeError:  # an escape like "\ud800" could not be written to a Record
            self._problem(node, "half a character, which no file can hold", "write the character itself")
        return value

    def _mapping(self, node: MappingNode, way: Way) -> dict[str, Any]:
        own: dict[str, Any] = {}
        for key, value in self._pairs(node):
            name = str(key.value)
            if name in own:
                first = self.lines[(*way, name)]
                self._problem(key, f"`{name}` is given twice, first in line {first}", "keep one of them")
                continue
            self.lines[(*way, name)] = key.start_mark.line + 1
            own[name] = self.build(value, (*way, name))
        for key, value in self._merged(node):
            name = str(key.value)
            if name not in own:
                self.lines[(*way, name)] = key.start_mark.line + 1
                own[name] = self.build(value, (*way, name))
        return own

    def _pairs(self, node: MappingNode) -> Iterator[tuple[ScalarNode, Node]]:
        for key, value in node.value:
            if not isinstance(key, ScalarNode):
                self._problem(key, "a key that is not a word", "write `key: value`")
            elif str(key.tag) != _TAG + "merge":
                yield key, value

    def _merged(self, node: MappingNode, inside: tuple[int, ...] = ()) -> Iterator[tuple[ScalarNode, Node]]:
        """Yield the pairs that `<<` brings in, nearest first."""
        if id(node) in inside:
            self._problem(node, "an alias that contains itself", "write the value out")
            return
        for key, value in node.value:
            if isinstance(key, ScalarNode) and str(key.tag) == _TAG + "merge":
                for source in [value] if isinstance(value, MappingNode) else value.value:
                    if not isinstance(source, MappingNode):
                        self._problem(key, "`<<` merges something that has no keys", "write `<<: *anchor` of a mapping")
                        return
                    yield from self._pairs(source)
                    yield from self._merged(source, (*inside, id(node)))
