"""Keys of an adapter_config.json by `peft_type`, read from peft's source because its import takes seconds. No torch."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path


@dataclass(frozen=True)
class _Config:
    """A config class of peft."""

    bases: tuple[str, ...]
    """Names of its base classes."""
    keys: frozenset[str]
    """Its annotated fields."""
    kind: str
    """Its PeftType, or empty."""


def keys_of(kind: str) -> frozenset[str]:
    """Return the keys of a `peft_type` in the installed peft; empty if its source does not show them."""
    configs = _configs()
    name = next((name for name, config in configs.items() if config.kind == kind), "")
    return frozenset(key for config in _lineage(name, configs) for key in config.keys)


def _lineage(name: str, configs: dict[str, _Config]) -> Iterator[_Config]:
    if name in configs:
        yield configs[name]
        for base in configs[name].bases:
            yield from _lineage(base, configs)


@cache
def _configs() -> dict[str, _Config]:
    package = find_spec("peft")
    if package is None or package.origin is None:
        return {}
    top = Path(package.origin).parent
    found = (top / "config.py", *sorted(top.glob("tuners/*.py")), *sorted(top.glob("tuners/*/config.py")))
    files = [file for file in found if file.is_file()]
    trees = (ast.parse(file.read_text(encoding="utf-8")) for file in files)
    return {node.name: _config(node) for tree in trees for node in tree.body if isinstance(node, ast.ClassDef)}


def _config(node: ast.ClassDef) -> _Config:
    fields = {
        line.target.id for line in node.body if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name)
    }
    kinds = [
        line.value.attr
        for line in ast.walk(node)
        if isinstance(line, ast.Assign)
        and isinstance(line.value, ast.Attribute)
        and ast.unparse(line.targets[0]) == "self.peft_type"
    ]
    bases = tuple(ast.unparse(base) for base in node.bases)
    return _Config(bases, frozenset(fields), kinds[0] if kinds else "")
