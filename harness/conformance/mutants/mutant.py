"""Find the possible changes of a source file. Each change gives one mutant."""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from harness.conformance.mutants.operators import changes, ends_in_error

_NOT_BEHAVIOUR = ("SPEC",)
"""Names of module constants that only describe a reference and are not used in its calculations. Mutants keep them."""


@dataclass(frozen=True)
class Mutant:
    """A source file with one change."""

    module: str
    """Dotted name of the module."""
    function: str
    """Qualified name of the changed function. Empty if the change is not in a function."""
    kind: str
    """Kind of mistake, e.g. `arithmetic`."""
    line: int
    start: int
    end: int
    """End of the changed part. In the mutant, `text` replaces the characters of the source from `start` up to `end`."""
    text: str
    probe: tuple[int, int]
    """Two positions in the source, where the method `source` can insert a call. For `if`, `while`, `for` and `with`,
    they are the start and the end of the expression after the keyword. For any other statement, both are its start.
    (-1, -1) for code outside functions."""

    @property
    def name(self) -> str:
        """An identifier that consists of the module, the function and a digest.

        The digest covers only the change and the text just before it. So the name stays the same if other parts of the
        file change.
        """
        source = source_of(self.module)
        changed = f"{source[self.start - 40 : self.start]}|{source[self.start : self.end]}|{self.text}"
        digest = hashlib.sha256(changed.encode()).hexdigest()[:8]
        return f"{self.module}:{self.function or 'module'}:{digest}"

    def source(self, probe: str = "") -> str:
        """Return the changed source.

        probe: name of a function that the source calls each time before the changed statement runs. Empty for no call.
        """
        source = source_of(self.module)
        changed = source[: self.start] + self.text + source[self.end :]
        first, last = self.probe
        if not probe or first < 0:
            return changed
        if first == last:
            return f"{changed[:first]}{probe}(); {changed[first:]}"
        last += len(changed) - len(source)
        return f"{changed[:first]}({probe}(), ({changed[first:last]}))[1]{changed[last:]}"

    def diff(self) -> str:
        """Return the file, the line number, and the changed lines before and after the change, as text."""
        before, after = source_of(self.module), self.source()
        first = before.rfind("\n", 0, self.start) + 1
        old = before[first : before.find("\n", self.end)]
        new = after[first : after.find("\n", self.start + len(self.text))]
        shown = [f"{sign} {line.strip()}" for sign, text in (("-", old), ("+", new)) for line in text.splitlines()]
        return "\n".join([f"{self.module.replace('.', '/')}.py:{self.line}", *shown])


@cache
def source_of(module: str) -> str:
    """Return the source of a module, without importing the module."""
    spec = find_spec(module)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"{module} has no source file")
    return Path(spec.origin).read_text()


def mutants(module: str) -> Iterator[Mutant]:
    """Yield every mutant of a module, in the order of its lines.

    Changes are made in the bodies of functions and in the constants of the module. Docstrings, annotations, defaults of
    arguments, assertions and error messages are not changed. If the body of an `if` ends by raising an error, its
    condition is not changed either, because checks use only arguments that the reference accepts. Raises ValueError if
    the source is not ASCII.
    """
    source = source_of(module)
    if not source.isascii():
        raise ValueError(f"{module} must be ASCII, because the positions in its syntax tree count bytes")
    starts = [0]
    for row in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(row))

    def span(node: Any) -> tuple[int, int]:
        return starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset

    seen: set[tuple[int, int, str]] = set()
    for function, statement, node in _nodes(ast.parse(source)):
        for change in changes(node):
            start, end = span(change.node)
            if (start, end, change.text) in seen or _same(source[start:end], change.text):
                continue
            seen.add((start, end, change.text))
            line = source.count("\n", 0, start) + 1
            yield Mutant(module, function, change.kind, line, start, end, change.text, _probe(statement, span))


def _probe(statement: ast.stmt | None, span: Callable[[ast.AST], tuple[int, int]]) -> tuple[int, int]:
    if statement is None:  # the module's own code always runs
        return -1, -1
    match statement:
        case ast.If(test=head) | ast.While(test=head) | ast.For(iter=head):
            return span(head)
        case ast.With(items=[first, *_]):
            return span(first.context_expr)
    return span(statement)[0], span(statement)[0]


def _same(before: str, after: str) -> bool:
    """Return whether two pieces of code have the same syntax tree."""
    try:
        return ast.dump(ast.parse(before.strip())) == ast.dump(ast.parse(after.strip()))
    except SyntaxError:  # a slice such as `1:2` is no code by itself
        return before == after


_Found = tuple[str, ast.stmt | None, ast.AST]
"""(qualified name of the function, innermost statement around the node, node)"""


def _nodes(tree: ast.Module) -> Iterator[_Found]:
    """Yield each node of the syntax tree that a mutant may change, with its function and its innermost statement."""
    for statement in tree.body:
        if isinstance(statement, ast.Assign | ast.AnnAssign):
            target = statement.targets[0] if isinstance(statement, ast.Assign) else statement.target
            plain = isinstance(target, ast.Name) and target.id not in _NOT_BEHAVIOUR
            if plain and statement.value is not None and not _is_type(statement.value):
                yield from (("", None, node) for _, node in _within(statement.value, None))
        else:
            yield from _functions(statement, "")


def _functions(node: ast.stmt, prefix: str) -> Iterator[_Found]:
    if isinstance(node, ast.ClassDef):
        for child in node.body:
            yield from _functions(child, f"{prefix}{node.name}.")
    elif isinstance(node, ast.FunctionDef):
        for child in node.body:
            yield from ((f"{prefix}{node.name}", *found) for found in _within(child, None))


def _is_type(node: ast.expr) -> bool:
    """Return whether a module constant is a type alias, such as `Callable[[int], int]`."""
    return isinstance(node, ast.Subscript) or (isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr))


def _within(node: ast.AST, statement: ast.stmt | None) -> Iterator[tuple[ast.stmt | None, ast.AST]]:
    """Yield a node and its descendants in the order of the source, each with its innermost statement.

    Leave out nodes that do not affect behaviour, such as annotations and error messages.
    """
    if isinstance(node, ast.Raise | ast.Assert | ast.JoinedStr | ast.Import | ast.ImportFrom):
        return
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return
    statement = node if isinstance(node, ast.stmt) else statement
    yield statement, node
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns", "args") and isinstance(node, ast.FunctionDef | ast.AnnAssign):
            continue
        if field == "test" and isinstance(node, ast.If) and ends_in_error(node.body):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from _within(child, statement)
