"""The checks: each names one property that an implementation can violate, and returns numbers.

A check is a function `check_<name>(subject, case) -> CheckResult` in one of these files; `peft-harness explain <name>`
prints its docstring. Every check leaves the subject as it found it.
"""

from __future__ import annotations

import ast
import importlib
import pkgutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from harness.records.record import CheckResult

Check = Callable[[Any, Any], CheckResult]


@cache
def every() -> dict[str, Check]:
    """Map names to checks, file by file."""
    found = {}
    for module in pkgutil.iter_modules(__path__):
        for name, function in vars(importlib.import_module(f"{__name__}.{module.name}")).items():
            if name.startswith("check_"):
                found[name.removeprefix("check_")] = function
    return found


def docstrings() -> dict[str, str]:
    """Map the name of every check to its docstring, read from the source without importing torch."""
    return {
        node.name.removeprefix("check_"): ast.get_docstring(node) or ""
        for file in sorted(Path(__file__).parent.glob("*.py"))
        for node in ast.parse(file.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("check_")
    }
