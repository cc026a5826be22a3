"""Run the command in a test's own folder, with a cache and with a plug-in that misbehaves."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, TextIO

import pytest

from harness.cli import main
from harness.records import store
from support import forked_modules
from support.processes import PATIENCE_S, eventually

# -P: the command must not import modules from the current folder.
COMMAND = (sys.executable, "-P", "-m", "harness.cli")

_PLUGIN = """
import os
from harness import implements

def plain(model, config, generator):
    from reference.lora import attach
    return attach(model, config, generator)

@implements("lora", name="raises")
def raises(model, config, generator):
    raise RuntimeError("attaching \\udcff went wrong")  # a lone surrogate, as in a file name that is no text

@implements("lora", name="greedy")
def greedy(model, config, generator):
    # Takes memory piece by piece until the system, which is told to give 512 MiB more and nothing beyond, has no more.
    import resource, torch
    with open("/proc/self/statm") as pages:
        held = int(pages.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + 2**29, resource.RLIM_INFINITY))
    pieces = []
    while True:
        pieces.append(torch.ones(2**26, dtype=torch.uint8))

@implements("lora", name="wrong")
def wrong(model, config, generator):
    adapted = plain(model, config, generator)
    for layer in adapted.layers.values():
        layer.scaling *= 1.01
    return adapted

@implements("lora", name="nan")
def nan(model, config, generator):
    import torch
    adapted = plain(model, config, generator)
    def after_step(step):
        with torch.no_grad():
            adapted.parameters()[-1].fill_(float("nan"))
    adapted.after_step = after_step
    return adapted

@implements("lora", name="forgets")
def forgets(model, config, generator):
    # Computes LoRA, but freezes its first A in the first step, in which the gradient of A is zero.
    adapted = plain(model, config, generator)
    first = adapted.parameters()[0]
    adapted.after_step = lambda step: first.requires_grad_(False)
    return adapted

BY_IMPORT = {
    name: implements("lora", name=name, requires=[f"misbehaving_{name}"])(plain)
    for name in ("killed", "crashes", "exits", "leaves", "starved", "missing", "hangs", "vandal")
}

def implementations():
    return [raises, greedy, wrong, nan, forgets, *BY_IMPORT.values()]
"""

# The start-up of a Cell imports these modules first, so that tests need not wait for torch.
_ON_IMPORT = {
    "killed": "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)",
    "exits": "import sys\nsys.exit('no licence for this library')",
    "leaves": "import os\nprint('last words', flush=True)\nos._exit(7)",
    "crashes": "import ctypes\nctypes.string_at(0)",
    "starved": "raise MemoryError('nothing left')",
    # keeps the interpreter lock, so that no thread of the worker can run, and starts a child
    "hangs": (
        "import ctypes, os, subprocess, sys\n"
        "from pathlib import Path\n"
        "here = Path(os.environ['MISBEHAVING'])\n"
        "if not (here / 'behave').exists():\n"
        "    child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "    (here / 'pids.tmp').write_text(f'{os.getpid()} {child.pid}')\n"
        "    (here / 'pids.tmp').rename(here / 'pids')\n"
        "    ctypes.PyDLL(None).sleep(600)"
    ),
    "vandal": (
        "import os\n"
        "from pathlib import Path\n"
        "cells = Path(os.environ['MISBEHAVING']) / 'run' / 'cells'\n"
        "cells.rename(cells.with_name('gone'))\n"
        "cells.write_text('no folder')\n"
        "os._exit(7)"
    ),
}

# The Cells are those of the smoke suite, so that losses can be compared.
_SUITE = """
suite: faults
title: Implementations that misbehave
about: For tests.
matrix:
  - model: tiny-llama
    task: toy-sentiment
    method: lora
    training: {{steps: 12, batch: 8, warmup: 2, max_tokens: 24, lr: 5e-3}}
    evaluation: {{items: 32, batch: 16}}
    config: {{rank: 4, alpha: 8, targets: [q_proj, v_proj, down_proj]}}
    cells:
{cells}
"""


@dataclass(frozen=True)
class Finished:
    """Result of a command that has ended."""

    code: int
    out: str
    err: str


@dataclass(frozen=True)
class Sandbox:
    """Runs the command with the plug-in installed and with a given cache. `folder` is the test's, and the current folder."""

    folder: Path
    environment: dict[str, str]

    @property
    def run_folder(self) -> Path:
        return self.folder / "run"

    def suite(self, *cells: str) -> str:
        """Write a suite of these Cells (YAML mappings) and return its path."""
        path = self.folder / "faults.yaml"
        path.write_text(_SUITE.format(cells="\n".join(f"      - {cell}" for cell in cells)), encoding="utf-8")
        return str(path)

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*COMMAND, *arguments], cwd=self.folder, env=self.environment, text=True, encoding="utf-8",
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=hear_ctrl_c,
        )  # fmt: skip

    def finish(self, process: subprocess.Popen[str]) -> Finished:
        out, err = process.communicate(timeout=5 * PATIENCE_S)
        return Finished(process.returncode, out, err)

    def command(self, *arguments: str) -> Finished:
        return self.finish(self.start(*arguments))

    def read(self) -> store.Run:
        return store.read_run(self.run_folder)

    def hanging(self) -> list[int]:
        """Wait until the plug-in `hangs` hangs; return the process ids of the worker and of its child."""
        eventually((self.folder / "pids").exists, "the plug-in hangs")
        pids = [int(pid) for pid in (self.folder / "pids").read_text().split()]
        (self.folder / "pids").unlink()
        return pids


class ForkSandbox(Sandbox):
    """Runs the command in this process, and the harness's modules in forks of this process."""

    def command(self, *arguments: str) -> Finished:
        with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as captured:
            for name, value in {**self.environment, "OMP_NUM_THREADS": "1"}.items():
                patch.setenv(name, value)
            patch.syspath_prepend(self.folder / "plugin")
            patch.chdir(self.folder)
            forked_modules.use(patch)
            out, err = (captured.enter_context(_captured(name)) for name in ("stdout", "stderr"))
            code = main(list(arguments))
            return Finished(code, *(stream.seek(0) or stream.read() for stream in (out, err)))

    def start(self, *arguments: str) -> NoReturn:
        raise TypeError("a test of processes takes the fixture `sandbox`")


@contextlib.contextmanager
def _captured(name: str) -> Iterator[TextIO]:
    """Capture a stream of this process and of its children; yield the file with the output."""
    real: TextIO = getattr(sys, name)
    number = {"stdout": 1, "stderr": 2}[name]
    kept = os.dup(number)
    with tempfile.TemporaryFile("w+", encoding="utf-8", buffering=1) as stream:
        os.dup2(stream.fileno(), number)
        setattr(sys, name, stream)
        try:
            yield stream
        finally:
            setattr(sys, name, real)
            os.dup2(kept, number)
            os.close(kept)


def hear_ctrl_c() -> None:
    """Let the command receive SIGINT, even if the tests run in the background of a shell, where it would be ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def make_fork_sandbox(folder: Path, cache: Path) -> ForkSandbox:
    return ForkSandbox(**vars(make_sandbox(folder, cache)))


def make_sandbox(folder: Path, cache: Path) -> Sandbox:
    plugin = folder / "plugin"
    facts = plugin / "misbehaving-1.0.dist-info"
    facts.mkdir(parents=True)
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: misbehaving\nVersion: 1.0\n", encoding="utf-8")
    points = "[harness.implementations]\nmisbehaving = misbehaving:implementations\n"
    (facts / "entry_points.txt").write_text(points, encoding="utf-8")
    (plugin / "misbehaving.py").write_text(_PLUGIN, encoding="utf-8")
    for name, code in _ON_IMPORT.items():
        (plugin / f"misbehaving_{name}.py").write_text(code + "\n", encoding="utf-8")
    environment = {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(plugin), os.environ.get("PYTHONPATH")])),
        "MISBEHAVING": str(folder),
        "PEFT_HARNESS_CACHE": str(cache),
        "NO_COLOR": "1",
        "PYTHONIOENCODING": "utf-8",
    }
    return Sandbox(folder, {**os.environ, **environment})
