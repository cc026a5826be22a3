"""A short rehearsal of a night, and nights that go wrong: failing kernels, no memory, no time, and Ctrl-C."""

from __future__ import annotations

import html
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from harness.errors import Exit
from harness.kernels import card_tables, crossover
from harness.process.worker_pool import marked
from harness.records.files import sha256
from support.processes import eventually
from support.sandbox import Sandbox

pytestmark = pytest.mark.e2e

_PLANTED = """
import os
import time
from pathlib import Path
from harness import implements

class Kernel:
    __name__ = "_planted"
    arg_names = ("packed", "BLOCK")
    def __getitem__(self, grid):
        def run(*_, **__):
            raise RuntimeError("Triton Error [CUDA]: misaligned address")
        return run

def op(name):
    return implements("nf4_dequantize", name=name, kind="operation", dtypes=("float32",))

@op("planted-raises")
def raises(packed, **_):
    from harness.kernels.triton.support.launch import launch
    launch(Kernel(), (1,), packed, BLOCK=64, num_warps=4)

@op("planted-nan")
def nan(packed, absmax, block, shape, dtype):
    import torch
    return torch.full(tuple(shape), torch.nan, dtype=dtype)

@op("planted-hangs")
def hangs(**_):
    time.sleep(600)

def compute(**arguments):
    from harness.kernels.torch.nf4 import dequantize
    return dequantize(**arguments)

@op("planted-slow")
def slow(calls=[], **arguments):
    if len(calls) == 8:
        Path(os.environ["MISBEHAVING"], "waits").touch()
        time.sleep(600)
    calls.append(0)
    return compute(**arguments)

def implementations():
    return [raises, nan, hangs, slow]
"""
_NIGHT = """
import sys
from pathlib import Path
from harness.regression.night import parts, run
always = ("--dtype", "float32", "--jobs", "1", "--json")
def check(name, *more):
    return parts.NightPart(name, "?", "check", ("check", name, *always, *more), 60.0)
plan = [check("planted-raises"), check("planted-nan"), check("planted-hangs", "--patience", "2"),
        parts.NightPart("oom", "?", "run", ("run", sys.argv[1], "--device", "cpu", "--out", "{out}/run"), 120.0),
        check("reference", "--op", "nf4_dequantize")]
parts.on_cpu = lambda: plan
sys.exit(run.night(run.NightRequest(7200.0, "cpu", Path("night")), as_json=False))
"""


_SHORT = """
import sys, time
from pathlib import Path
from harness.regression.night import part_run, parts, run
always = ("check", "planted-slow", "--dtype", "float32", "--jobs", "1", "--json")
plan = [parts.NightPart("slow", "?", "check", always, 60.0), parts.NightPart("later", "?", "check", always, 595.0)]
parts.on_cpu = lambda: plan
wait = part_run._wait
def until_it_waits(child, limit_s):  # so the end of the budget does not depend on the speed of this machine
    while not Path("waits").exists() and child.wait(0) is None:
        time.sleep(0.1)
    return wait(child, 0.0)
part_run._wait = until_it_waits
sys.exit(run.night(run.NightRequest(600.0, "cpu", Path("night")), as_json=False))
"""


@pytest.fixture
def planted(sandbox: Sandbox) -> Sandbox:
    """Install the implementations of `_PLANTED`."""
    site = Path(sandbox.environment["PYTHONPATH"].split(os.pathsep)[0])
    info = site / "planted-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: planted\nVersion: 1.0\n", encoding="utf-8")
    points = "[harness.implementations]\nplanted = planted:implementations\n"
    (info / "entry_points.txt").write_text(points, encoding="utf-8")
    (site / "planted.py").write_text(_PLANTED, encoding="utf-8")
    return sandbox


def run_script(sandbox: Sandbox, script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", script, *arguments], cwd=sandbox.folder, env=sandbox.environment, capture_output=True,
        text=True, check=False,
    )  # fmt: skip


def results(folder: Path) -> dict[str, dict[str, Any]]:
    return {file.stem: json.loads(file.read_text()) for file in (folder / "parts").glob("*.json")}


@pytest.mark.nightly
@pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux")
def test_a_short_rehearsal(sandbox: Sandbox) -> None:
    words = ("--only", "parity-bfloat16", "--only", "crossovers", "--budget", "30m", "--out", "night")
    done = sandbox.command("night", "--device", "cpu", *words)
    assert done.code == Exit.PASS, done.err
    folder = sandbox.folder / "night"
    found = results(folder)
    assert {name: one["status"] for name, one in found.items()} == {"parity-bfloat16": "ok", "crossovers": "ok"}
    assert found["parity-bfloat16"]["summary"].endswith(" pass")
    assert (folder / "parts" / "parity-bfloat16" / "check.html").is_file()
    footer = json.loads((folder / "footer.json").read_text())
    assert footer["sha256"]["crossovers.json"] == sha256(folder / "parts" / "crossovers.json")
    from harness.kernels.triton.support import tuned_tiles  # needs Triton

    page = (folder / "index.html").read_text()
    assert "Rehearsal of a night" in page
    document = json.loads((folder / "parts" / "crossovers" / "crossovers.json").read_text())
    assert [said.partition(":")[0] for said in document["found"]] == [*card_tables.CROSSOVERS, card_tables.TILES]
    assert all(html.escape(said) in page for said in document["found"])
    table = card_tables.Entry(folder, "", document["table"])
    assert all(crossover.limits(table, operation) for operation in card_tables.CROSSOVERS)
    tuned_tiles.tiles(table[card_tables.TILES])  # the kernels can read it


def test_a_budget_that_ends_in_a_part_keeps_its_checks_and_names_what_is_left(planted: Sandbox) -> None:
    done = run_script(planted, _SHORT)
    assert done.returncode == Exit.PASS, done.stderr
    found = results(planted.folder / "night")
    assert found["slow"]["status"] == "cut"
    assert found["slow"]["because"] == "the budget was over; what it had measured is kept"
    assert re.match(r"[1-9]\d* pass", found["slow"]["summary"])
    assert found["later"]["status"] == "not-run"
    footer = json.loads((planted.folder / "night" / "footer.json").read_text())
    assert (footer["how"], footer["left_out"].keys()) == ("finished", {"slow", "later"})
    page = (planted.folder / "night" / "index.html").read_text()
    for told in (
        "pass, but parts are left out",
        "the budget was over",
        "peft-harness night --device cpu --only slow --only later",
    ):
        assert told in page
    assert [one.pid for one in marked("MISBEHAVING", str(planted.folder))] == []


@pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux")
def test_ctrl_c_ends_the_command_with_a_page_and_no_process_left(sandbox: Sandbox) -> None:
    words = ("--only", "parity-bfloat16", "--only", "crossovers", "--budget", "30m", "--out", "night")
    process = sandbox.start("night", "--device", "cpu", *words)
    folder = sandbox.folder / "night"
    log = folder / "parts" / "parity-bfloat16" / "log.txt"
    # The file exists before its process does, and a part whose process was not started is `not-run`.
    eventually(lambda: log.exists() and "checking" in log.read_text(), "the first part checks something")
    process.send_signal(signal.SIGINT)
    done = sandbox.finish(process)
    assert done.code == Exit.INFRASTRUCTURE, done.err
    assert {name: one["status"] for name, one in results(folder).items()} == {
        "parity-bfloat16": "cut", "crossovers": "not-run",
    }  # fmt: skip
    assert json.loads((folder / "footer.json").read_text())["how"] == "interrupted"
    for told in (done.out, (folder / "index.html").read_text()):
        assert "interrupted" in told
        assert "peft-harness night --device cpu --only parity-bfloat16 --only crossovers" in told
    assert [one.pid for one in marked("MISBEHAVING", str(sandbox.folder))] == []


@pytest.mark.nightly
@pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux")
def test_every_planted_failure_is_told_and_the_last_part_runs(planted: Sandbox) -> None:
    sandbox = planted
    done = run_script(sandbox, _NIGHT, sandbox.suite("{id: greedy, implementation: greedy}"))
    assert done.returncode == Exit.FAIL, done.stderr
    found = results(sandbox.folder / "night")
    assert found["reference"]["status"] == "ok"
    raised = found["planted-raises"]["failures"][0]
    assert "misaligned address" in raised["what"]
    assert "in kernel _planted, grid (1,): packed=uint8[" in raised["what"]
    assert "BLOCK=64, num_warps=4" in raised["what"]
    assert "in raises" in raised["traceback"]
    assert raised["reproduce"] == "peft-harness check planted-raises --op nf4_dequantize --dtype float32"
    assert any("not finite" in one["what"] for one in found["planted-nan"]["failures"])
    (hung,) = found["planted-hangs"]["failures"]
    assert "no result for 2 s; killed" in hung["what"]
    (full,) = found["oom"]["failures"]
    assert full["where"].endswith(": oom")
    assert "memory" in full["what"]
    page = (sandbox.folder / "night" / "index.html").read_text()
    for told in ("misaligned address", "not finite", "no result for 2 s", "oom", "reference"):
        assert told in page
