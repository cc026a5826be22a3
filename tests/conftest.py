"""Fixtures that many tests share: a sandbox for the command, and a finished smoke run."""

from __future__ import annotations

import fcntl
import gc
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from harness.records import store
from support import forked_modules
from support.sandbox import Finished, ForkSandbox, Sandbox, make_fork_sandbox, make_sandbox

# Several workers at once, each with a thread per core, would wait for each other in loops. Before torch is imported.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
# A process has Triton's interpreter, which the tests of this folder need, from its first import or never; without it the
# kernels would need a GPU. tests/kernels/test_ahead.py judges what they compile to.
collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreted"]


TIERS = {"e2e", "slow", "cluster", "build", "real"}


@pytest.hookimpl(tryfirst=True)  # before pytest deselects by marker
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark a test that runs the whole command in a sandbox as `e2e`."""
    for item in items:
        whole_command = {"sandbox", "fork_sandbox"} & set(getattr(item, "fixturenames", ()))
        if whole_command and not TIERS & {mark.name for mark in item.iter_markers()}:
            item.add_marker("e2e")


_imported = 0


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Hide what was imported since the last test from the garbage collector, as the worker of a Cell does.

    A Cell collects before each phase. With the imports of all tests a collection takes a third of a second.
    """
    global _imported
    if len(sys.modules) > _imported:
        _imported = len(sys.modules)
        gc.collect()
        gc.freeze()


def shared_folder(factory: pytest.TempPathFactory) -> Path:
    """Return the temporary folder of the whole session, which all workers of pytest-xdist share."""
    base = factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tokenizer of the tiny Llama, and nothing else."""
    from harness.assets import generated

    generated.tiny_llama(folder := tmp_path_factory.mktemp("tokenizer"))
    (folder / "config.json").unlink()
    (folder / "model.safetensors").unlink()
    return folder


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that holds what the harness generates, once the first run has generated it."""
    folder = shared_folder(tmp_path_factory) / "cache"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture
def forks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the harness fork this process, which has imported torch, where it would start Python anew."""
    forked_modules.use(monkeypatch)


@pytest.fixture
def sandbox(tmp_path: Path, cache: Path) -> Sandbox:
    return make_sandbox(tmp_path, cache)


@pytest.fixture
def fork_sandbox(tmp_path: Path, cache: Path, forks: None) -> ForkSandbox:
    """A sandbox for tests of what happens in a Cell, not of its process: quicker, since nothing is imported again."""
    return make_fork_sandbox(tmp_path, cache)


@pytest.fixture(scope="session")
def smoke(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> tuple[Finished, store.Run]:
    """`peft-harness run smoke`, once for all workers, in a folder whose files have the names of modules."""
    folder = shared_folder(tmp_path_factory) / "smoke"
    with (folder.with_suffix(".lock")).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        recorded = folder / "finished.json"
        if not recorded.exists():
            sandbox = make_sandbox(folder, cache)
            for name in ("random", "torch", "harness"):
                (folder / f"{name}.py").write_text("raise SystemExit('a file of the current folder was imported')\n")
            recorded.write_text(json.dumps(asdict(sandbox.command("run", "smoke", "--out", "run"))))
    finished = Finished(**json.loads(recorded.read_text()))
    assert (folder / "run").is_dir(), finished.err
    return finished, store.read_run(folder / "run")
