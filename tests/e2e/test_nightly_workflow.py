"""The nightly workflow: its own scripts, run by bash as a runner runs them, around a `peft-harness` that plays a part."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from support.repository import TOP

FILE = TOP / ".github" / "workflows" / "nightly.yml"

pytestmark = pytest.mark.skipif(
    not (shutil.which("bash") and shutil.which("git") and FILE.is_file()), reason="wants bash, git and a checkout"
)

PLAYED = """#!/usr/bin/env bash
echo "$*" >> "$CALLS"
case "$1 $2" in
  "run nightly-gpu")
    pass="${6##*-}"; code="RUN_$pass"
    if [ "${!code:-0}" != 9 ]; then mkdir -p "$6"; echo '{}' > "$6/run.json"; fi
    exit "${!code:-0}" ;;
  "night --device") echo "how the card is"; exit "${FIRST:-0}" ;;
  "history add")
    if [ "$ROWS" = 1 ]; then mkdir -p results/history; echo "$4" > "results/history/$4.jsonl"; fi
    exit "${ADD:-0}" ;;
  "history settle")
    echo "what was tried"
    if [ "${SETTLE:-0}" = 3 ]; then echo '{}' >> results/history/confirmations.jsonl; fi
    exit "${SETTLE:-0}" ;;
  "history detect") echo "what changed"; exit "${DETECT:-0}" ;;
  *) exit "${GATE:-0}" ;;
esac
"""


@dataclass(frozen=True)
class Night:
    """What a night left. failed: names of steps. calls: of the command. summary: the job's. pushed: subjects."""

    failed: list[str]
    calls: list[str]
    summary: str
    pushed: list[str]


def git(*words: str) -> str:
    who = ["-c", "user.name=A", "-c", "user.email=a@example.org"]
    return subprocess.run(["git", *who, *words], check=True, capture_output=True, text=True).stdout


def night(tmp_path: Path, *, baseline: bool = True, rows: bool = True, **codes: int) -> Night:
    """Run the job's scripts in a clone, while somebody else pushes. codes: of the command, by part; RUN_2=9: no folder."""
    workflow: dict[str, Any] = yaml.load(FILE.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)  # `on` is a text
    origin, here, other = (tmp_path / name for name in ("origin.git", "here", "other"))
    git("init", "-q", "--bare", "-b", "main", str(origin))
    git("clone", "-q", str(origin), str(other))
    git("-C", str(other), "checkout", "-q", "-b", "main")
    git("-C", str(other), "commit", "-q", "--allow-empty", "-m", "first")
    git("-C", str(other), "push", "-q", "origin", "main")
    git("clone", "-q", str(origin), str(here))
    (other / "x").write_text("meanwhile")
    git("-C", str(other), "add", "x")
    git("-C", str(other), "commit", "-q", "-m", "meanwhile")
    git("-C", str(other), "push", "-q", "origin", "main")
    if baseline:
        (here / "results/baselines/nightly").mkdir(parents=True)
        (here / "results/baselines/nightly/run.json").write_text("{}")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/peft-harness").write_text(PLAYED)
    (tmp_path / "bin/peft-harness").chmod(0o755)
    files = {name: tmp_path / name for name in ("GITHUB_ENV", "GITHUB_STEP_SUMMARY", "CALLS")}
    for file in files.values():
        file.write_text("")
    variables = {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "HOME": str(tmp_path), "GITHUB_REF_NAME": "main",
        "ROWS": str(int(rows)), **{name: str(code) for name, code in codes.items()}, **{n: str(f) for n, f in files.items()},
    }  # fmt: skip
    # A shell that the file names is started with pipefail, the one that a runner takes by itself is not.
    named = workflow.get("defaults", {}).get("run", {}).get("shell") == "bash"
    shell = ["bash", "--noprofile", "--norc", "-eo", "pipefail"] if named else ["bash", "-e"]
    failed: list[str] = []
    for step in workflow["jobs"]["gpu"]["steps"]:
        if "name" not in step or (failed and step.get("if") != "success() || failure()"):
            continue
        script = tmp_path / "step.sh"
        script.write_text(step["run"])
        later = dict(line.split("=", 1) for line in files["GITHUB_ENV"].read_text().splitlines())
        done = subprocess.run([*shell, str(script)], cwd=here, env=variables | later, check=False, capture_output=True)
        if done.returncode:
            failed.append(step["name"])
    pushed = git("-C", str(origin), "log", "--format=%s", "main").splitlines()
    return Night(failed, files["CALLS"].read_text().splitlines(), files["GITHUB_STEP_SUMMARY"].read_text(), pushed)


def added(found: Night) -> list[str]:
    (call,) = [call.split() for call in found.calls if call.startswith("history add")]
    return call[4:]


@pytest.mark.slow
def test_a_good_night_is_kept_beside_what_others_pushed(tmp_path: Path) -> None:
    found = night(tmp_path)
    assert found.failed == []
    assert found.pushed[0].startswith("History: the night of 20")
    assert found.pushed[1:] == ["meanwhile", "first"]
    assert [call.split()[0] for call in found.calls] == [
        "night", "run", "run", "run", "gate", "history", "history", "history",
    ]  # fmt: skip
    assert "how the card is" in found.summary
    assert "what was tried" in found.summary
    assert "what changed" in found.summary


@pytest.mark.parametrize(("code", "fails"), [(3, False), (4, True)])
def test_what_pairs_left_open_fails_nothing_and_pairs_that_did_not_run_do(
    code: int, fails: bool, tmp_path: Path
) -> None:
    found = night(tmp_path, SETTLE=code)
    assert found.failed == (["Try what looks slower"] if fails else [])
    assert [call.split()[1] for call in found.calls[-2:]] == ["settle", "detect"]
    said = [subject for subject in found.pushed if subject.startswith("History: what pairs said")]
    assert len(said) == (code == 3)  # here it left a line
    assert any(subject.startswith("History: the night of") for subject in found.pushed)


@pytest.mark.parametrize("code", [1, 4])
def test_a_red_cell_and_one_out_of_memory_stop_no_pass(code: int, tmp_path: Path) -> None:
    found = night(tmp_path, RUN_1=code)
    assert found.failed == []
    assert added(found) == [f"results/runs/night-{n}" for n in (1, 2, 3)]


def test_a_pass_that_left_nothing_is_told_and_the_others_are_kept(tmp_path: Path) -> None:
    found = night(tmp_path, RUN_2=9)
    assert found.failed == ["Three passes"]
    assert added(found) == [f"results/runs/night-{n}" for n in (1, 3)]
    assert found.pushed[0].startswith("History")


def test_a_finding_on_the_card_fails_the_job_and_the_passes_are_made(tmp_path: Path) -> None:
    found = night(tmp_path, FIRST=1)
    assert found.failed == ["Is the card right and fast?"]
    assert added(found) == [f"results/runs/night-{n}" for n in (1, 2, 3)]


def test_the_first_nights_are_green_and_say_what_is_next(tmp_path: Path) -> None:
    found = night(tmp_path, baseline=False, DETECT=5)
    assert found.failed == []
    assert "nothing to compare yet" in found.summary
    assert "No baseline `nightly` yet" in found.summary


def test_no_pass_at_all_is_no_night(tmp_path: Path) -> None:
    found = night(tmp_path, rows=False, RUN_1=9, RUN_2=9, RUN_3=9)
    assert {"Three passes", "Add the night"} <= set(found.failed)
    assert found.pushed == ["meanwhile", "first"]


@pytest.mark.parametrize(
    ("code", "rows", "fails"), [(1, True, False), (4, True, False), (4, False, True), (5, True, True)]
)
def test_what_was_left_out_of_a_night_fails_nothing_where_rows_were_kept(
    code: int, rows: bool, fails: bool, tmp_path: Path
) -> None:
    assert night(tmp_path, rows=rows, ADD=code).failed == (["Add the night"] if fails else [])


def test_a_confirmed_change_fails_the_job_and_is_in_its_summary_and_the_night_is_kept(tmp_path: Path) -> None:
    found = night(tmp_path, DETECT=1)
    assert found.failed == ["Slower, or gone?"]
    assert "history detect" in found.calls  # whose 3, of what nobody confirmed, is not asked for: that fails no night
    assert found.summary.endswith("```\nwhat was tried\n```\n```\nwhat changed\n```\n")
    assert found.pushed[0].startswith("History")


@pytest.mark.parametrize("baseline", [True, False])
def test_the_gate_fails_the_job_and_without_a_baseline_says_so(baseline: bool, tmp_path: Path) -> None:
    found = night(tmp_path, baseline=baseline, GATE=1)
    assert found.failed == (["Larger, worse or wrong?"] if baseline else [])
    assert ("No baseline `nightly` yet" in found.summary) != baseline
    assert found.pushed[0].startswith("History")
