"""Find the values of `peft_type` that the installed peft has, and their config keys. Imports no torch.

Both are read from peft's source, because importing peft takes seconds.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path


@cache
def peft_types() -> tuple[str, ...]:
    """Return every `peft_type`. Return an empty tuple if peft is not installed or its source does not show them."""
    body = _classes("utils/peft_types.py").get("PeftType")
    return tuple(ast.literal_eval(line.value) for line in body.body if isinstance(line, ast.Assign)) if body else ()


def keys_of(kind: str) -> frozenset[str]:
    """Return the config keys of a `peft_type`. Return an empty set if peft's source does not show them."""
    configs = _configs()
    name = next((name for name, node in configs.items() if _kind(node) == kind), "")
    return frozenset(key for node in _lineage(name, configs) for key in _fields(node))


@cache
def _configs() -> dict[str, ast.ClassDef]:
    """Map the names of peft's config classes to their syntax trees."""
    return _classes("config.py", "tuners/*.py", "tuners/*/config.py")


def _classes(*patterns: str) -> dict[str, ast.ClassDef]:
    """Map names to the syntax trees of the classes in some files of peft. patterns: globs of files in peft's package."""
    package = find_spec("peft")
    if package is None or package.origin is None:
        return {}
    files = [file for pattern in patterns for file in sorted(Path(package.origin).parent.glob(pattern))]
    trees = (ast.parse(file.read_text(encoding="utf-8")) for file in files)
    return {node.name: node for tree in trees for node in tree.body if isinstance(node, ast.ClassDef)}


def _lineage(name: str, configs: dict[str, ast.ClassDef]) -> Iterator[ast.ClassDef]:
    """Yield the syntax trees of a class and its base classes."""
    if name in configs:
        yield configs[name]
        for base in configs[name].bases:
            yield from _lineage(ast.unparse(base), configs)


def _fields(node: ast.ClassDef) -> Iterator[str]:
    """Yield the names of the annotated fields of a class."""
    for line in node.body:
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
            yield line.target.id


def _kind(node: ast.ClassDef) -> str:
    """Return the PeftType that a config class sets, or an empty string."""
    for line in ast.walk(node):
        if isinstance(line, ast.Assign) and ast.unparse(line.targets[0]) == "self.peft_type":
            return line.value.attr if isinstance(line.value, ast.Attribute) else ""
    return ""
