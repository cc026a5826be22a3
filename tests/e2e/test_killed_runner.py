"""The runner is killed at a dozen moments, each time resumed: in the end exactly the Records that one life would leave."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from harness.assets import fetch, table
from harness.records import environment, store
from harness.records.record import Status
from harness.runner import executors, run
from harness.runner.executors.local import Local
from harness.suites import loader
from support import stub_attempts
from support.repository import TESTS
from support.sandbox import Sandbox

pytestmark = pytest.mark.e2e

KILLS, CELLS = 12, 120

# Lives are forked from one process: each would spend a second on imports otherwise, and the test would be about these.
_LIVES = """
import contextlib, json, os, random, signal, sys, time
from pathlib import Path
from harness.suites import loader
from support import stub_attempts
from harness.records import environment
from harness.report import html
from harness.runner import run
from harness.runner.executors.local import Local

suite, kills = sys.argv[1], int(sys.argv[2])
cells = loader.load(suite).plan.cells
here = environment.describe(environment.threads())
command = stub_attempts.stub(Path(), cells, here, {cell.seed: "slow" for cell in cells if cell.seed % 4 == 0})

def live():
    there = Path("run/run.json").exists()
    with contextlib.redirect_stdout(open(os.devnull, "w")):
        run.run_suite(suite, out=None if there else Path("run"), resume="run" if there else None, device="cpu",
            executor=Local(2, command))

def records():
    return len(list(Path("run/cells").glob("[!.]*.json")))

moments, found = random.Random(20), []
for _ in range(kills):
    more, soon = moments.randint(0, 16), moments.uniform(0.0, 0.06)
    enough = records() + more
    child = os.fork()
    if not child:
        try:
            live()
        finally:
            os._exit(0)
    # After some more Records and a bit; or, of none, at any time from the start on.
    while records() < enough and not os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
        time.sleep(0.002)
    time.sleep(soon if more else 5 * soon)
    os.kill(child, signal.SIGKILL)
    killed = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    found.append([killed, records(), Path("run/footer.json").exists()])
live()
print(json.dumps(found))
"""


@pytest.fixture
def assets(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFT_HARNESS_CACHE", sandbox.environment["PEFT_HARNESS_CACHE"])
    for name in ("tiny-llama", "toy-sentiment"):
        fetch.ensure(table.resolve(name, loader.load("smoke").sources, Path()))


@pytest.mark.usefixtures("assets")
def test_cells_that_end_while_the_run_is_taken_over_are_not_measured_again(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A killed runner leaves a Slurm array, whose elements the next runner ends; one has just finished its Cell."""
    monkeypatch.chdir(sandbox.folder)
    suite = sandbox.suite("{implementation: reference, seed: [0, 1]}")
    cells = loader.load(suite).plan.cells
    command = stub_attempts.stub(Path(), cells, environment.describe(environment.threads()))
    run.run_suite(suite, out=Path("run"), device="cpu", executor=Local(1, command))
    late = store.RunFolder(Path("run")).record_path(cells[1].cell_id, 1)
    late.rename("late.json")
    Path("run", "footer.json").unlink()
    monkeypatch.setattr(executors, "end_orphans", lambda folder: Path("late.json").rename(late))
    run.run_suite(suite, resume="run", device="cpu", executor=Local(1, command))
    assert [record.attempt for record in store.read_run(Path("run")).records] == [1, 1]


@pytest.mark.nightly
@pytest.mark.usefixtures("assets")
def test_kills_lose_nothing_and_repeat_nothing(sandbox: Sandbox) -> None:
    suite = sandbox.suite(f"{{implementation: reference, seed: {list(range(CELLS))}}}")
    path = os.pathsep.join([str(TESTS), sandbox.environment["PYTHONPATH"], *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-c", _LIVES, suite, str(KILLS)],
        cwd=sandbox.folder, env={**sandbox.environment, "PYTHONPATH": path},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    in_the_middle = [records for killed, records, footer in found if killed and not footer and 0 < records < CELLS]
    assert len(in_the_middle) >= KILLS // 4, found  # or the moments were badly chosen
    assert [records for _, records, _ in found] == sorted(records for _, records, _ in found)
    run = sandbox.read()
    assert Counter(record.cell_id for record in run.records) == Counter(cell.cell_id for cell in run.manifest.cells)
    assert {record.status for record in run.records} == {Status.OK}
    assert (run.broken, run.changed, run.missing()) == ({}, {}, [])
    assert run.footer is not None
    assert (run.footer.how, run.footer.counts) == ("finished", {"ok": CELLS})
    assert set(run.footer.sha256) == {"run.json", *(f"cells/{record.id}.json" for record in run.records)}
    assert store.RunFolder(run.path).next_attempt(run.records[0].cell_id) > 1
