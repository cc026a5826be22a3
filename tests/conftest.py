"""Fixtures that many tests share: a sandbox for the command, and a finished smoke run."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from harness.records import store
from support.sandbox import Finished, Sandbox, make_sandbox

# Several workers at once, each with a thread per core, would wait for each other in loops. Before torch is imported.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
# A process has Triton's interpreter, which the tests of this folder need, from its first import or never; without it the
# kernels would need a GPU. tests/kernels/test_ahead.py judges what they compile to.
collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreted"]


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
    """A cache that holds what the harness makes itself once the first run has made it."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def sandbox(tmp_path: Path, cache: Path) -> Sandbox:
    return make_sandbox(tmp_path, cache)


@pytest.fixture(scope="session")
def smoke(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> tuple[Finished, store.Run]:
    """`peft-harness run smoke`, in a folder whose files have the names of modules."""
    sandbox = make_sandbox(tmp_path_factory.mktemp("smoke"), cache)
    for name in ("random", "torch", "harness"):
        (sandbox.folder / f"{name}.py").write_text("raise SystemExit('a file of the current folder was imported')\n")
    finished = sandbox.command("run", "smoke", "--out", "run")
    assert sandbox.run_folder.is_dir(), finished.err
    return finished, sandbox.read()
