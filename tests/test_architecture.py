"""The house rules that no linter knows."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

from harness.conformance import checks, operations, parity_suite
from harness.conformance.case_selection import FEW
from harness.methods.registry import discover
from harness.methods.spec import methods
from support.repository import TESTS, TOP

SOURCES = sorted(p for part in ("harness", "reference") for p in (TOP / part).rglob("*.py") if "_data" not in p.parts)
TEST_FILES = sorted(TESTS.rglob("*.py"))
MOST_LINES = 400
VAGUE = {"utils", "util", "common", "base", "manager", "helpers", "helper", "misc", "core"}
# Where anything may go wrong that is not ours (a Cell, somebody else's plug-in), and where a fault of the page must not
# lose its reader the way to what was measured.
MAY_CATCH_ALL = {
    "harness/runner/worker.py": 1,
    "harness/methods/registry.py": 1,
    "harness/runner/run.py": 1,
    "harness/conformance/execution/suite_run.py": 1,
    "harness/conformance/adapter_files/loader_worker.py": 1,  # a base model of any class
    "harness/conformance/execution/worker.py": 1,
    "harness/conformance/checks/structure.py": 1,  # an implementation that refuses a layer
    "harness/conformance/checks/each_setting.py": 1,  # other checks report it
    "harness/conformance/mutants/difference.py": 1,
    "harness/conformance/mutants/trial.py": 1,
    "harness/cell/loop_checks/settings.py": 1,  # a trainer of another project
    "harness/process/forks.py": 1,
    "harness/kernels/compile/ahead.py": 2,
    "harness/methods/servers/__init__.py": 1,  # loads plug-ins
}


def name(path: Path) -> str:
    return path.relative_to(TOP).as_posix()


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imported(path: Path) -> Iterator[str]:
    """Yield the top-level package of every import of a file, wherever it stands in it."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name(path)}: relative import"
            yield str(node.module).partition(".")[0]


def test_there_is_something_to_look_at() -> None:
    assert {"harness/cli/__init__.py", "harness/conformance/checks/maths.py", "reference/lora.py"} <= set(
        map(name, SOURCES)
    )
    assert len(TEST_FILES) > 5


def test_import_contracts() -> None:
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    done = subprocess.run(command, cwd=TOP, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert ", 0 broken" in done.stdout


def imports_only(folder: str, allowed: set[str]) -> None:
    found = {
        name(path): set(imported(path)) - allowed - sys.stdlib_module_names for path in (TOP / folder).rglob("*.py")
    }
    assert {path: others for path, others in found.items() if others} == {}


def test_the_reference_imports_torch_and_the_standard_library_alone() -> None:
    imports_only("reference", {"torch", "reference"})


def test_kernels_import_torch_triton_and_each_other() -> None:
    imports_only("harness/kernels", {"torch", "triton", "harness"})


def test_a_file_is_short_and_says_what_it_is() -> None:
    assert [name(path) for path in SOURCES if path.read_text(encoding="utf-8").count("\n") > MOST_LINES] == []
    assert [name(path) for path in SOURCES if not ast.get_docstring(tree(path))] == []
    assert [name(path) for path in SOURCES if path.stem in VAGUE] == []


def test_no_folder_has_a_vague_name() -> None:
    assert not {part for path in SOURCES for part in path.relative_to(TOP).parts[:-1]} & VAGUE


def test_everything_is_caught_only_where_everything_may_happen() -> None:
    found: dict[str, int] = {}
    for path in SOURCES:
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.ExceptHandler) and catches_all(node.type) and not tidies_up(node):
                found[name(path)] = found.get(name(path), 0) + 1
    assert found == MAY_CATCH_ALL


def catches_all(kind: ast.expr | None) -> bool:
    kinds = kind.elts if isinstance(kind, ast.Tuple) else [kind]
    return any(k is None or (isinstance(k, ast.Name) and k.id in ("Exception", "BaseException")) for k in kinds)


def tidies_up(handler: ast.ExceptHandler) -> bool:
    """Whether the handler passes on what it caught, as it was."""
    last = handler.body[-1]
    return isinstance(last, ast.Raise) and last.exc is None


@pytest.mark.parametrize("method", methods())
def test_every_method_has_a_parity_suite_of_checks_that_exist(method: str) -> None:
    plan = parity_suite.load(method)
    assert plan.method == method
    assert plan.checks
    assert set(plan.checks) <= checks.every().keys()
    assert next(plan.cases(FEW), None) is not None


def test_every_parity_suite_belongs_to_something_that_can_be_implemented() -> None:
    others = {i.target for i in discover().implementations if i.kind in ("base", "loader")}
    known = {*methods(), *operations.every(), *others}
    assert {p.stem for p in (TOP / "suites" / "parity").glob("*.yaml")} == known


@pytest.mark.parametrize("operation", operations.every())
def test_every_operation_has_a_parity_suite_of_checks_that_exist(operation: str) -> None:
    plan = parity_suite.load_operation(operation)
    assert plan.operation == operation
    assert set(plan.checks) <= checks.every().keys()


def test_every_check_explains_itself() -> None:
    assert len(checks.every()) > 5
    assert [n for n, check in checks.every().items() if not check.function.__doc__] == []


def in_tests(wrong: Callable[[ast.Call], bool]) -> list[str]:
    """Return where the tests call something that is `wrong`."""
    return [
        f"{name(path)}:{node.lineno}"
        for path in TEST_FILES
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Call) and wrong(node)
    ]


def test_no_tolerance_is_typed_in_a_test() -> None:
    keys = {"rtol", "atol", "rel", "abs", "rel_tol", "abs_tol", "places", "delta"}
    functions = {"allclose", "isclose", "assert_close", "assertAlmostEqual"}

    def typed(call: ast.Call) -> bool:
        called = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
        return called in functions or any(k.arg in keys for k in call.keywords)

    assert in_tests(typed) == []


def test_a_skip_has_a_reason_and_nothing_is_rerun() -> None:
    def unexplained(call: ast.Call) -> bool:
        mark = ast.unparse(call.func).removeprefix("pytest.mark.")
        reasons = [k for k in call.keywords if k.arg == "reason"]
        return mark == "flaky" or (mark in ("skip", "skipif", "xfail") and not reasons)

    assert in_tests(unexplained) == []


# --- tiers of tests --------------------------------------------------------------------------------------------------

CONFIG = tomllib.loads((TOP / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["pytest"]["ini_options"]
TIERS = {marker.partition(":")[0] for marker in CONFIG["markers"]}


def tiers(marks: list[ast.expr]) -> set[str]:
    return {part.attr for mark in marks for part in ast.walk(mark) if isinstance(part, ast.Attribute)} & TIERS


def in_default_tier(path: Path) -> bool:
    """Whether a file of tests has one that a plain `pytest` runs."""
    body = tree(path).body
    whole = [
        node.value for node in body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "pytestmark"
    ]
    return not tiers(whole) and any(
        isinstance(node, ast.FunctionDef)
        and node.name.startswith("test_")
        and not tiers(node.decorator_list)
        and "sandbox" not in {argument.arg for argument in node.args.args}
        for node in body
    )


def test_every_package_has_a_test_in_the_default_tier() -> None:
    packages = {"reference", *(path.parent.name for path in (TOP / "harness").glob("*/__init__.py"))}
    quick = {path.parent.name for path in TEST_FILES if path.name.startswith("test_") and in_default_tier(path)}
    assert packages - quick == set()


def test_each_tier_is_left_out_by_default_and_run_in_ci_or_at_night() -> None:
    default = CONFIG["addopts"].partition("-m 'not (")[2].partition(")'")[0]
    others = re.findall(r'pytest -m "([^"]+)"', (TOP / ".ci" / "run").read_text(encoding="utf-8"))
    night = (TOP / ".github" / "workflows" / "nightly.yml").read_text(encoding="utf-8")
    assert set(default.split(" or ")) == TIERS
    interpreted = "not nightly"
    assert others == [f"({default.removesuffix(' or nightly')}) and not nightly", interpreted]
    assert "python -m pytest -m nightly" in night


def test_nothing_runs_on_import() -> None:
    # A module's body defines; it calls for nothing but a definition (and pydantic's second half of one).
    loose = [
        f"{name(path)}:{node.lineno}"
        for path in SOURCES
        for node in tree(path).body
        if isinstance(node, ast.Expr)
        and not isinstance(node.value, ast.Constant)
        and not ast.unparse(node).endswith(".model_rebuild()")
    ]
    assert loose == []
