"""YAML 1.2 into plain Python data, with the line of every value and every mistake of the file at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.composer import Composer
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import AliasEvent
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from harness.errors import Problem, SuiteError, in_order, near

KeyPath = tuple[str | int, ...]
"""The way to a value, e.g. `("matrix", 0, "cells", 2, "config", "rank")`."""

_TAG = "tag:yaml.org,2002:"
_UNDEFINED = "!undefined alias "
_SCALARS = {_TAG + kind for kind in ("null", "bool", "int", "float", "str")}
# Aliases may repeat a node inside a node inside a node: a file of a few lines can stand for gigabytes.
_MOST_NODES = 200_000


@dataclass(frozen=True)
class Document:
    """One YAML file: its data and the line each value was written on (for a merged key, the line of its anchor).

    problems: what is wrong with it as YAML. unreadable: ways of values that could not be read, in whose place is None. cut:
    ways of what was taken out as wrong or may be meant otherwise; what lacks for it is no second mistake.
    """

    path: Path
    raw: bytes
    data: dict[str, Any]
    lines: dict[KeyPath, int]
    problems: list[Problem] = field(default_factory=list)
    unreadable: set[KeyPath] = field(default_factory=set)
    cut: set[KeyPath] = field(default_factory=set)

    def at(self, way: KeyPath) -> Any:
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

    def is_cut(self, way: KeyPath) -> bool:
        """Say whether a value, or what it would stand in, was cut."""
        return any(way[:length] in self.cut for length in range(len(way) + 1))

    def is_emptied(self, entry: KeyPath) -> bool:
        """Say whether an entry was cut whole, so that nothing of it is left to judge."""
        return entry in self.cut and not self.at(entry)

    def move(self, moves: Mapping[KeyPath, Mapping[str | int, str | int]]) -> None:
        """Let lines and cuts follow what was moved in the data: within each way, from the old key or index to the new."""
        if not moves:
            return

        def moved(way: KeyPath) -> KeyPath:
            return tuple(moves[way[:n]].get(part, part) if way[:n] in moves else part for n, part in enumerate(way))

        lines, cut = {moved(way): line for way, line in self.lines.items()}, {moved(way) for way in self.cut}
        self.lines.clear()
        self.lines.update(lines)
        self.cut.clear()
        self.cut.update(cut)


_START = "`suite: NAME`, or see suites/smoke.yaml"


class Written(float):
    """A number with a fraction, and its characters as written: `0.10` says more than 0.1."""

    text: str

    def __new__(cls, value: float, text: str) -> Written:
        """Return the number with its text."""
        made = super().__new__(cls, value)
        made.text = text
        return made


def load(path: Path, *, tags: bool = False) -> Document:
    """Read a file as `read` does; raises SuiteError with everything that is wrong with it as YAML."""
    document = read(path, tags=tags)
    if document.problems:
        raise SuiteError(in_order(document.problems))
    return document


def read(path: Path, *, tags: bool = False, texts: bool = False, start: str = _START) -> Document:
    """Read a file whose top level is a mapping. Raises SuiteError if it is none; other problems stand in the Document.

    A key that is given twice counts as if the two were one: mappings and lists of mappings are put together; else the
    first counts. So whoever checks the data finds the mistakes of both.

    tags: whether values may have tags of their own, such as `!function f.g`; such a value is its text. texts: whether
    numbers with a fraction keep their characters, as `Written`. start: how such a file begins, for a message.
    """
    raw = _bytes(path)
    root = _compose(path, _decode(path, raw))
    builder = _Builder(path, tags, texts)
    try:
        data = builder.build(root, ()) if root is not None else None
    except RecursionError:
        what = "nested too deeply once aliases are followed"
        problem = Problem(f"{path}:1", what, "write it without so many aliases")
        raise SuiteError([*builder.problems, problem]) from None
    if not isinstance(data, dict):
        what = "the file is empty" if root is None else f"expected keys and values, got {_kind(data)}"
        raise SuiteError([*builder.problems, Problem(f"{path}:1", what, f"start with {start}")])
    return Document(path, raw, data, builder.lines, builder.problems, builder.unreadable, builder.cut)


def _bytes(path: Path) -> bytes:
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
    yaml = YAML(typ="safe", pure=True)
    yaml.Composer = _Composer
    try:
        return yaml.compose(text)  # type: ignore[no-any-return]
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        hint = "indent with spaces" if "\\t" in (error.problem or "") else "mend the YAML here or just above"
        problem = Problem(f"{path}:{mark.line + 1 if mark else 1}", f"not YAML: {error.problem}", hint)
    except YAMLError as error:
        line = text.count("\n", 0, getattr(error, "position", 0)) + 1
        problem = Problem(f"{path}:{line}", f"not YAML: {getattr(error, 'reason', error)}", "take the character out")
    except RecursionError:
        problem = Problem(f"{path}:1", "not YAML that can be read: nested too deeply", "close a bracket")
    raise SuiteError([problem])


def _kind(data: object) -> str:
    return {list: "a list", dict: "keys and values", type(None): "nothing"}.get(type(data), f"`{data}`")


class _Composer(Composer):  # type: ignore[misc]
    """Makes nodes of a file; an alias whose anchor is nowhere becomes a tag that `_Builder` finds."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Return the next node."""
        event = self.parser.peek_event()
        if not isinstance(event, AliasEvent) or event.anchor in self.anchors:
            return super().compose_node(parent, index)
        self.parser.get_event()
        value = near(event.anchor, self.anchors, "write the value out; anchors above it")
        return ScalarNode(_UNDEFINED + event.anchor, value, event.start_mark, event.end_mark)


def _undefined(alias: Node) -> tuple[str, str]:
    name = str(alias.tag).removeprefix(_UNDEFINED)
    return f"`*{name}` stands for nothing: no `&{name}` is above it", alias.value


class _Builder:
    """Turns nodes into data; collects lines and problems on the way."""

    def __init__(self, path: Path, tags: bool, texts: bool) -> None:
        self.path, self.tags, self.texts = path, tags, texts
        self.lines: dict[KeyPath, int] = {}
        self.problems: list[Problem] = []
        self.unreadable: set[KeyPath] = set()
        self.cut: set[KeyPath] = set()
        self._constructor = YAML(typ="safe", pure=True).constructor
        self._open: set[int] = set()
        self._gone_through = 0
        self._told: set[int] = set()
        self._parts: dict[Node, set[int]] = {}
        """Of what was put together, the nodes that it was made of: an alias may name either."""

    def build(self, node: Node, way: KeyPath) -> Any:
        """Return the plain value of a node; `way` is where it goes."""
        self._count(1)
        # The key's line stands already when this is a value; a value on the next line is less helpful.
        self.lines.setdefault(way, node.start_mark.line + 1)
        parts = self._parts.get(node, {id(node)})
        if parts & self._open:
            return self._lost(node, way, "an alias that contains itself", "write the value out")
        if isinstance(node, ScalarNode):
            return self._scalar(node, way)
        self._open.update(parts)
        try:
            if isinstance(node, MappingNode):
                return self._mapping(node, way)
            return [self.build(item, (*way, index)) for index, item in enumerate(node.value)]
        finally:
            self._open.difference_update(parts)

    def _count(self, nodes: int) -> None:
        """Count what is gone through; raises SuiteError where aliases make too much of it."""
        self._gone_through += nodes
        if self._gone_through > _MOST_NODES:
            what = f"more than {_MOST_NODES} values once aliases are followed"
            hint = "write it without so many aliases"
            raise SuiteError([*self.problems, Problem(f"{self.path}:1", what, hint)])

    def _problem(self, node: Node, what: str, hint: str) -> None:
        self.problems.append(Problem(f"{self.path}:{node.start_mark.line + 1}", what, hint))

    def _lost(self, node: Node, way: KeyPath, what: str, hint: str) -> None:
        """Note a value that cannot be read."""
        self._problem(node, what, hint)
        self.unreadable.add(way)

    def _scalar(self, node: ScalarNode, way: KeyPath) -> Any:
        tag = str(node.tag)
        if tag.startswith(_UNDEFINED):
            return self._lost(node, way, *_undefined(node))
        if tag not in _SCALARS:
            if tag != _TAG + "timestamp" and not self.tags:  # what looks like a date is text here
                return self._lost(node, way, f"a tag, `{tag}`, which is not allowed here", "write a plain value")
            return node.value
        try:
            value = self._constructor.construct_object(node)
        except ValueError as error:  # Python reads no whole number of thousands of digits
            return self._lost(node, way, f"no number that can be read: {error}", "write a number of fewer digits")
        except (KeyError, IndexError):
            kind = tag.removeprefix(_TAG)
            return self._lost(node, way, f"a text that is no {kind}, after the tag `!!{kind}`", "leave the tag out")
        if self.texts and isinstance(value, float):
            return Written(value, node.value)
        try:
            str(value).encode()
        except UnicodeEncodeError:  # an escape like "\ud800" could not be written to a Record
            return self._lost(node, way, "half a character, which no file can hold", "write the character itself")
        return value

    def _mapping(self, node: MappingNode, way: KeyPath) -> dict[str, Any]:
        nodes: dict[str, tuple[ScalarNode, Node]] = {}
        for key, value in self._pairs(node, way):
            name = str(key.value)
            first, given = nodes.setdefault(name, (key, value))
            if first is not key:
                if id(key) not in self._told:
                    what = f"`{name}` is given twice, first in line {first.start_mark.line + 1}"
                    self._problem(key, what, "keep one of them")
                nodes[name] = first, self._united(given, value, (*way, name))
        for key, value in self._merged(node, way):
            nodes.setdefault(str(key.value), (key, value))
        built = {}
        for name, (key, value) in nodes.items():
            self.lines[(*way, name)] = key.start_mark.line + 1
            built[name] = self.build(value, (*way, name))
        return built

    def _united(self, first: Node, second: Node, way: KeyPath) -> Node:
        """Return what counts of two values of one key."""
        if isinstance(first, MappingNode) and isinstance(second, MappingNode):
            # That the key of both is there twice says it of the keys in both too.
            # Only of their first there: a third one is a mistake of its own.
            names = {str(key.value) for key, _ in first.value}
            told = {str(key.value): id(key) for key, _ in reversed(second.value)}
            self._told |= {told[name] for name in names & told.keys()}
            return self._together(MappingNode, first, second)
        are_lists = isinstance(first, SequenceNode) and isinstance(second, SequenceNode)
        if are_lists and any(isinstance(item, MappingNode) for item in (*first.value, *second.value)):
            return self._together(SequenceNode, first, second)
        # A collection says more than a scalar, which may be null, and then nobody means it.
        counts, other = sorted((first, second), key=lambda node: isinstance(node, ScalarNode))
        if str(other.tag) != _TAG + "null":
            self.cut.add(way)
        return counts

    def _together(self, kind: type[Node], first: Node, second: Node) -> Node:
        node = kind(first.tag, [*first.value, *second.value], first.start_mark, first.end_mark)
        self._parts[node] = {part for one in (first, second) for part in self._parts.get(one, {id(one)})}
        return node

    def _pairs(self, node: MappingNode, way: KeyPath) -> Iterator[tuple[ScalarNode, Node]]:
        for key, value in node.value:
            if not isinstance(key, ScalarNode):
                self._problem(key, "a key that is not a word", "write `key: value`")
            elif str(key.tag).startswith(_UNDEFINED):
                self._problem(key, *_undefined(key))
                self.cut.add(way)  # it might be any of the keys that are missing
            elif str(key.tag) != _TAG + "merge":
                yield key, value

    def _merged(
        self, node: MappingNode, way: KeyPath, inside: tuple[int, ...] = ()
    ) -> Iterator[tuple[ScalarNode, Node]]:
        """Yield the pairs that `<<` brings in, nearest first."""
        if id(node) in inside:
            self._problem(node, "an alias that contains itself", "write the value out")
            return
        for key, value in node.value:
            if isinstance(key, ScalarNode) and str(key.tag) == _TAG + "merge":
                for source in value.value if isinstance(value, SequenceNode) else [value]:
                    if isinstance(source, MappingNode):
                        self._count(1 + len(source.value))
                        yield from self._pairs(source, way)
                        yield from self._merged(source, way, (*inside, id(node)))
                        continue
                    self.cut.add(way)  # it might bring any of the keys that are missing
                    if str(source.tag).startswith(_UNDEFINED):
                        self._problem(source, *_undefined(source))
                    else:
                        self._problem(key, "`<<` merges something that has no keys", "write `<<: *anchor` of a mapping")
