"""Fixtures that many tests share, e.g. a sandbox for the command and a finished smoke run."""

from __future__ import annotations

import gc
import itertools
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from harness.memory_model import answer_cache
from harness.records import store
from support import forked_modules
from support.once import once, shared_folder
from support.sandbox import Finished, ForkSandbox, Sandbox, make_fork_sandbox, make_sandbox

# A process that may not write bytecode compiles this project, and assertions, at each start. Tests start many processes.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
# With one thread per core, several workers would wait for each other in loops. This must precede the import of torch.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
# Ray gives its workers a low priority. Beside the tests of other workers they would hardly run.
os.environ.setdefault("RAY_worker_niceness", "0")
# The tests in this folder need Triton's interpreter. A process has it from its first import of Triton on, or never. Without
# the interpreter, the kernels would need a GPU. tests/kernels/test_ahead.py tests the compiled kernels.
collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreted"]


TIERS = {"e2e", "slow", "cluster", "build", "real"}


@pytest.hookimpl(tryfirst=True)  # run before pytest deselects tests by marker
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark each test that runs the whole command in a sandbox as `e2e`, unless it has the mark of a tier."""
    for item in items:
        whole_command = {"sandbox", "fork_sandbox"} & set(getattr(item, "fixturenames", ()))
        if whole_command and not TIERS & {mark.name for mark in item.iter_markers()}:
            item.add_marker("e2e")


_imported = 0
_tests = itertools.count()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Hide recent imports from the garbage collector, as the worker of a Cell does.

    A Cell collects garbage before each phase. With the imports of all tests, each collection takes a third of a second.
    """
    global _imported
    if len(sys.modules) > _imported:
        _imported = len(sys.modules)
        gc.collect()
        gc.freeze()


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder that holds only the tokenizer of the tiny Llama."""
    from harness.assets import generated

    generated.tiny_llama(folder := tmp_path_factory.mktemp("tokenizer"))
    (folder / "config.json").unlink()
    (folder / "model.safetensors").unlink()
    return folder


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a cache folder. The first run of the harness generates its models and data; later runs reuse them."""
    folder = shared_folder(tmp_path_factory) / "cache"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(autouse=True)
def predictions(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of cached predictions, a new one for each test: a test may replace what is cached."""
    folder = tmp_path_factory.getbasetemp() / f"predictions-{next(_tests)}"
    monkeypatch.setattr(answer_cache, "folder", lambda: folder)
    return folder


@pytest.fixture
def forks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the harness fork this process, which has imported torch, where it would start a new Python."""
    forked_modules.use(monkeypatch)


@pytest.fixture
def sandbox(tmp_path: Path, cache: Path) -> Sandbox:
    return make_sandbox(tmp_path, cache)


@pytest.fixture
def fork_sandbox(tmp_path: Path, cache: Path, forks: None) -> ForkSandbox:
    """Return a sandbox for tests of the work in a Cell, not of its process. It is fast, since nothing is imported again."""
    return make_fork_sandbox(tmp_path, cache)


@pytest.fixture(scope="session")
def smoke(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> tuple[Finished, store.Run]:
    """Run `peft-harness run smoke` once for all workers; return its output and the run.

    Files in the current folder have names of modules, so that an import from this folder ends the command.
    """

    def make(folder: Path) -> dict[str, Any]:
        sandbox = make_sandbox(folder, cache)
        for name in ("random", "torch", "harness"):
            (folder / f"{name}.py").write_text("raise SystemExit('a file of the current folder was imported')\n")
        return asdict(sandbox.command("run", "smoke", "--out", "run"))

    folder, finished = once(tmp_path_factory, "smoke", make)
    assert (folder / "run").is_dir(), finished["err"]
    return Finished(**finished), store.read_run(folder / "run")
