"""`night`: the commands that it prints for what comes next can be run as they are, and do what they say."""

from __future__ import annotations

import json
import os
import shlex
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from harness.bench.gpu import Gpu
from harness.cli import main
from harness.errors import Exit
from harness.regression.night import budget, parts
from harness.regression.night import run as nights
from harness.regression.night.parts import NightPart
from harness.regression.night.run import NightRequest, night

STUB = """
import sys
from pathlib import Path
from support import recorded_run
if sys.argv[1] == "run":
    recorded_run.write_run(Path(sys.argv[-1]), only=("head", "fused"))
"""


def next_steps(out: str) -> list[list[str]]:
    """Return the words of each command that the output of a night names under `next:`."""
    told = out.partition("\nnext:\n")[2].partition("\n\n")[0]
    return [shlex.split(line, comments=True) for line in told.splitlines()]


def values(words: list[str], option: str) -> list[str]:
    return [value for name, value in pairwise(words) if name == option]


def test_all_that_was_left_out_fits_into_the_budget_of_the_command_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(nights, "find_gpu", lambda: Gpu(name="A card"))
    night(NightRequest(budget.LAST_S["cuda"], "cuda", tmp_path / "night"), as_json=False)  # no part fits
    (again,) = next_steps(capsys.readouterr().out)
    assert again[:4] == ["peft-harness", "night", "--device", "cuda"]
    plan = nights._chosen(parts.on_gpu(), values(again, "--only"), "cuda")
    assert [one.name for one in plan] == [one.name for one in parts.on_gpu()]
    (told,) = values(again, "--budget")
    assert all(budget.planned(plan, 60.0 * int(told.removesuffix("m")), "cuda"))


def test_the_planned_command_of_the_claims_names_the_runs_of_the_night(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nights, "find_gpu", lambda: Gpu(name="A card"))
    night(NightRequest(budget.LAST_S["cuda"], "cuda", tmp_path / "night"), as_json=True)
    manifest = json.loads((tmp_path / "night" / "night.json").read_text())
    (claims,) = (one["command"] for one in manifest["parts"] if one["name"] == "claims")
    headlines = [one.name for one in parts.on_gpu() if one.name.startswith(parts.HEADLINE)]
    runs = {str(tmp_path / "night" / "parts" / name / "run") for name in headlines}
    assert set(values(shlex.split(claims), "--run")) == runs


@pytest.mark.slow
def test_claims_that_were_left_out_are_judged_from_the_runs_of_the_night(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stub = tmp_path / "stub.py"
    stub.write_text(STUB)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    first, second = (
        NightPart(f"headline-{name}", "?", "run", ("run", "suite", "--out", f"{parts.OUT}/run"), 1.0)
        for name in ("7b", "33b")
    )
    claims = NightPart("claims", "?", "claims", ("claims", parts.RUNS), 900.0)
    monkeypatch.setattr(parts, "on_cpu", lambda: [first, claims])
    night(NightRequest(600.0, "cpu", tmp_path / "one", command=(sys.executable, str(stub))), as_json=False)
    run = str(tmp_path / "one" / "parts" / "headline-7b" / "run")
    assert next_steps(capsys.readouterr().out) == [["peft-harness", "claims", "--run", run]]

    slow = NightPart(second.name, "?", "run", second.words, 900.0)
    monkeypatch.setattr(parts, "on_cpu", lambda: [first, slow, claims])
    night(NightRequest(600.0, "cpu", tmp_path / "two", command=(sys.executable, str(stub))), as_json=False)
    alone, again = next_steps(capsys.readouterr().out)
    assert alone[1] == "claims"
    assert values(again, "--only") == ["headline-33b", "claims"]  # its runs need a judgement, too


def test_the_command_that_makes_a_baseline_can_be_pasted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stub, out = tmp_path / "stub.py", tmp_path / "my night"
    stub.write_text("import sys; sys.exit(0)")
    monkeypatch.setattr(nights, "find_gpu", lambda: Gpu(name="A card"))
    monkeypatch.setattr(parts, "on_gpu", lambda: [NightPart("matrix", "?", "run", ("run", "suite"), 1.0)])
    monkeypatch.setattr(nights.documents, "read", lambda *_: nights.documents.PartReading("1 ok"))
    night(NightRequest(600.0, "cuda", out, command=(sys.executable, str(stub))), as_json=False)
    run = str(out / "parts" / "matrix" / "run")
    promote = ["peft-harness", "baseline", "promote", run, "night-a-card", "--reason", "first night"]
    assert promote in next_steps(capsys.readouterr().out)


def test_without_a_finished_headline_run_the_claims_judge_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without `--run`, they would judge published runs as if this night had measured them."""
    monkeypatch.setattr(parts, "on_cpu", lambda: [parts._claims(1.0)])
    request = NightRequest(600.0, "cpu", tmp_path / "night", command=(sys.executable, "-c", "raise SystemExit(0)"))
    assert night(request, as_json=True) == Exit.NOTHING_COMPARED
    found = json.loads((tmp_path / "night" / "parts" / "claims.json").read_text())
    assert (found["status"], found["because"]) == ("not-run", "no headline run of this night has finished")


def test_the_command_that_copies_a_table_of_a_card_works_from_every_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write = "import pathlib, sys; pathlib.Path(sys.argv[-1], 'a-card.json').write_text('{}')"
    part = NightPart("crossovers", "?", "card", ("bench", "--out", parts.OUT), 1.0)
    monkeypatch.setattr(parts, "on_cpu", lambda: [part])
    request = NightRequest(600.0, "cpu", tmp_path / "a night", command=(sys.executable, "-c", write))
    night(request, as_json=False)
    (copies,) = (step for step in next_steps(capsys.readouterr().out) if step[0] == "cp")
    assert copies[1] == str(tmp_path / "a night" / "parts" / "crossovers" / "a-card.json")
    assert Path(copies[2]).is_absolute()
    assert (Path(copies[2]) / "default.json").is_file()


def test_a_name_chooses_its_part_and_a_beginning_chooses_all_that_begin_so() -> None:
    def chosen(*only: str) -> list[str]:
        return [one.name for one in nights._chosen(parts.on_gpu(), only, "cuda")]

    assert chosen("matrix") == ["matrix"]
    assert chosen("step-lora", "ceil") == ["ceilings", "step-lora"]
    assert chosen("parity") == ["parity-bfloat16", "parity-float16", "parity-float32"]


def test_without_a_gpu_the_output_names_the_rehearsal_and_no_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(nights, "find_gpu", lambda: Gpu("no GPU: the driver is there, but torch is built for the CPU"))
    assert main(["night", "--out", str(tmp_path / "night")]) == Exit.INFRASTRUCTURE
    out, err = capsys.readouterr()
    assert out.startswith("nothing was run: no GPU: the driver is there, but torch is built for the CPU\n")
    assert "parity-bfloat16" not in out + err
    assert ["peft-harness", "night", "--device", "cpu"] in next_steps(out)
    assert "peft-harness night --device cpu" in (tmp_path / "night" / "index.html").read_text()


def test_without_scipy_the_pairs_are_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nights, "find_spec", lambda name: None)
    monkeypatch.setattr(parts, "on_cpu", lambda: [NightPart("canary", "?", "pairs", ("gate",), 1.0)])
    request = NightRequest(600.0, "cpu", tmp_path / "night", command=(sys.executable, "-c", "raise SystemExit(4)"))
    assert night(request, as_json=True) == Exit.NOTHING_COMPARED
    found = json.loads((tmp_path / "night" / "parts" / "canary.json").read_text())
    assert (found["status"], found["left_out"]) == ("not-run", False)
    assert found["because"] == "scipy, which judges pairs, is not installed"
