"""A short rehearsal of a night, and a night whose kernels raise, return NaN and hang, and whose Cell has no memory left."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from harness.errors import Exit
from harness.kernels import card_tables, crossover
from harness.records.files import sha256
from support.sandbox import Sandbox

pytestmark = pytest.mark.e2e

_PLANTED = """
import time
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

def implementations():
    return [raises, nan, hangs]
"""
_NIGHT = """
import sys
from pathlib import Path
from harness.regression.night import parts, run
always = ("--dtype", "float32", "--jobs", "1", "--json")
def check(name, *more):
    return parts.Part(name, "?", "check", ("check", name, *always, *more), 60.0)
plan = [check("planted-raises"), check("planted-nan"), check("planted-hangs", "--patience", "2"),
        parts.Part("oom", "?", "run", ("run", sys.argv[1], "--device", "cpu", "--out", "{out}/run"), 120.0),
        check("reference", "--op", "nf4_dequantize")]
parts.on_cpu = lambda: plan
sys.exit(run.night(run.NightRequest(7200.0, "cpu", Path("night")), as_json=False))
"""


def results(folder: Path) -> dict[str, dict[str, Any]]:
    return {file.stem: json.loads(file.read_text()) for file in (folder / "parts").glob("*.json")}


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
    assert all(said in page for said in document["found"])
    table = card_tables.Entry(folder, "", document["table"])
    assert all(crossover.limits(table, operation) for operation in card_tables.CROSSOVERS)
    tuned_tiles.tiles(table[card_tables.TILES])  # the kernels can read it


@pytest.mark.nightly
@pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux")
def test_every_planted_failure_is_told_and_the_last_part_runs(sandbox: Sandbox) -> None:
    site = Path(sandbox.environment["PYTHONPATH"].split(os.pathsep)[0])
    info = site / "planted-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: planted\nVersion: 1.0\n", encoding="utf-8")
    points = "[harness.implementations]\nplanted = planted:implementations\n"
    (info / "entry_points.txt").write_text(points, encoding="utf-8")
    (site / "planted.py").write_text(_PLANTED, encoding="utf-8")
    suite = sandbox.suite("{id: greedy, implementation: greedy}")
    done = subprocess.run(
        [sys.executable, "-c", _NIGHT, suite], cwd=sandbox.folder, env=sandbox.environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
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
