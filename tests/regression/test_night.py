"""`night`: what fits into the budget runs, what fails leaves a usable page, and the rest goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from harness.bench.gpu import Gpu
from harness.cli import main
from harness.errors import Exit, UsageError
from harness.process.supervisor import Subprocess
from harness.process.worker_pool import marked
from harness.regression.night import budget, part_run, parts
from harness.regression.night import run as nights
from harness.regression.night.parts import NightPart
from harness.regression.night.run import NightRequest, night
from harness.suites import loader
from harness.suites.expand import select
from support.processes import PATIENCE_S, eventually

STUB = """
import json, os, signal, subprocess, sys, time
from pathlib import Path
what = sys.argv[1]
def wait():
    Path(__file__).with_name("ready").touch()
    while True:  # Python handles a signal that came just before a sleep only after it
        time.sleep(0.05)
check = {"implementation": "fused", "kind": "operation", "target": "nf4_dequantize", "dtype": "bfloat16", "case": "64x64",
         "traceback": "", "result": {"check": "outputs", "error": None, "allowed": None, "detail": "", "nonfinite": 0}}
def document(**changed):
    result = check["result"] | changed.pop("result", {})
    row = check | {"standing": "fail"} | changed | {"result": result}
    print(json.dumps({"checks": [check | {"standing": "pass"}, row], "skipped": {}}), flush=True)
if what == "good":
    print(json.dumps({"checks": [check | {"standing": "pass"}], "skipped": {}}))
elif what == "raises":
    told = "raised Boom: in kernel _dequantize, grid (4,), num_warps=4"
    document(traceback="Traceback: in _dequantize", result={"detail": told})
    sys.exit(1)
elif what == "nan":
    document(result={"detail": "y", "nonfinite": 7})
    sys.exit(1)
elif what == "hangs":
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print("about to hang", file=sys.stderr, flush=True)
    wait()
elif what == "saves":
    def end(*_):
        print(json.dumps({"checks": [check | {"standing": "pass"}], "skipped": {}}), flush=True)
        os._exit(4)
    signal.signal(signal.SIGTERM, end)
    wait()
elif what == "wrong, then slow":
    row = {"name": "nf4", "shape": "8x8", "dtype": "float32", "device": "cpu", "ours": "fused", "other": "acme",
           "outcome": "refused", "because": "no parity: fused fails outputs", "parity": [
               {"implementation": "fused", "kind": "operation", "target": "nf4", "dtype": "float32", "case": "8x8",
                "result": {"check": "nf4/outputs/float32/call", "outcome": "fail"}}]}
    print(json.dumps({"benchmarks": [row]}), flush=True)
    wait()
elif what == "slow":
    wait()
elif what == "crashes":
    print("last words", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGSEGV)
elif what == "full":
    print("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 GiB", file=sys.stderr)
    sys.exit(4)
elif what == "garbage":
    print('{"checks": [')
    sys.exit(0)
"""


def part(
    word: str, estimate_s: float = 1.0, name: str = "", kind: Any = "check", is_reserved: bool = False
) -> NightPart:
    return NightPart(
        name or word,
        f"What if it {word}?",
        kind,
        (word, "--json", "--out", parts.OUT),
        estimate_s,
        is_reserved=is_reserved,
    )


def run(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    plan: list[NightPart],
    budget_s: float = 600.0,
    only: tuple[str, ...] = (),
) -> tuple[Exit, dict[str, dict[str, Any]], str]:
    """Run these parts with a command that plays them. Return exit code, results by part, and the page.

    The time of a part is over as soon as it waits, however slow this machine is. A part that does not wait has no limit.
    """
    stub, ready, wait = tmp_path / "stub.py", tmp_path / "ready", part_run._wait
    stub.write_text(STUB, encoding="utf-8")

    def until_it_waits(child: Subprocess, limit_s: float) -> tuple[int | None, bool]:
        eventually(lambda: ready.exists() or child.wait(0) is not None, "the part waits or ends")
        ready.unlink(missing_ok=True)
        return wait(child, 0.0)

    monkeypatch.setattr(part_run, "_wait", until_it_waits)
    monkeypatch.setattr(parts, "on_cpu", lambda: plan)
    out = tmp_path / "night"
    request = NightRequest(budget_s, "cpu", out, only, command=(sys.executable, str(stub)))
    code = night(request, as_json=True)
    results = {file.stem: json.loads(file.read_text()) for file in (out / "parts").glob("*.json")}
    footer = json.loads((out / "footer.json").read_text())
    assert footer["exit"] == code
    assert footer["left_out"] == {name: r["because"] for name, r in results.items() if r["left_out"]}
    assert footer["counts"] == {s: [r["status"] for r in results.values()].count(s) for s in footer["counts"]}
    return code, results, (out / "index.html").read_text()


def test_a_night_passes_if_its_parts_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, results, page = run(tmp_path, monkeypatch, [part("good"), part("good", name="better")])
    assert code == Exit.PASS
    assert {one["status"] for one in results.values()} == {"ok"}
    assert results["good"]["summary"] == "1 pass"
    assert "</span> pass</p>" in page
    assert "all 2 parts ran, and found nothing wrong" in page


def test_a_night_of_one_part_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = run(tmp_path, monkeypatch, [part("good")])[2]
    assert "the part ran, and found nothing wrong" in page


@pytest.mark.parametrize(
    ("word", "status", "told"),
    [
        ("raises", "finding", "in kernel _dequantize, grid (4,), num_warps=4"),
        ("nan", "finding", "7 numbers are not finite"),
        ("crashes", "failed", "died of SIGSEGV"),
        ("full", "failed", "CUDA out of memory. Tried to allocate 20.00 GiB"),
    ],
)
def test_a_part_that_fails_is_told_with_its_reproduction_and_the_next_part_runs(
    word: str, status: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, results, page = run(tmp_path, monkeypatch, [part(word), part("good")])
    assert code == (Exit.FAIL if status == "finding" else Exit.INFRASTRUCTURE)
    assert results[word]["status"] == status
    (failure,) = results[word]["failures"]
    assert told in failure["what"] + results[word]["because"]
    assert failure["reproduce"].startswith("peft-harness ")
    assert results["good"]["status"] == "ok"
    top, _, rest = page.partition('id="next"')
    assert told.partition(",")[0] in top
    assert failure["reproduce"] in rest
    assert "--json" not in failure["reproduce"]


def test_the_reproduction_of_a_check_names_its_operation_and_dtype(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, results, page = run(tmp_path, monkeypatch, [part("raises")])
    (failure,) = results["raises"]["failures"]
    assert failure["reproduce"] == "peft-harness check fused --op nf4_dequantize --dtype bfloat16"
    assert "Traceback: in _dequantize" in page


@pytest.mark.slow
def test_a_part_that_hangs_is_killed_with_all_its_children(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(part_run, "GRACE_S", 1.0)
    monkeypatch.setenv("OF_THIS_TEST", str(tmp_path))
    code, results, page = run(tmp_path, monkeypatch, [part("hangs", 0.1), part("good")])
    assert code == Exit.INFRASTRUCTURE
    assert results["hangs"]["status"] == "failed"
    assert "it took too long" in results["hangs"]["because"]
    assert "about to hang" in page
    assert results["good"]["status"] == "ok"
    assert [one for one in marked("OF_THIS_TEST", str(tmp_path)) if one.pid != os.getpid()] == []


@pytest.mark.slow
def test_a_part_is_ended_when_its_time_is_over(tmp_path: Path) -> None:
    ended = part_run.run(
        ["600"], {}, tmp_path, 0.5, (sys.executable, "-c", "import sys, time; time.sleep(int(sys.argv[1]))")
    )
    assert ended.cut
    assert not ended.interrupted
    assert ended.died == "died of SIGTERM"


def test_a_part_that_does_not_fit_is_not_run_and_a_smaller_one_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, results, page = run(tmp_path, monkeypatch, [part("good", 900.0, "large"), part("good")])
    assert code == Exit.PASS
    assert results["large"]["status"] == "not-run"
    assert "it needs about 15 min 00 s" in results["large"]["because"]
    assert results["large"]["seconds"] is None
    assert results["good"]["status"] == "ok"
    assert "peft-harness night --device cpu --only large" in page
    assert "pass, but parts are left out" in page
    assert "not-run: large" in page


def test_a_budget_that_ends_inside_a_part_keeps_what_it_has_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, results, page = run(tmp_path, monkeypatch, [part("saves", 0.1), part("good", 30.0)], budget_s=8.0)
    assert code == Exit.PASS
    assert results["saves"]["status"] == "cut"
    assert results["saves"]["summary"] == "1 pass"
    assert results["good"]["status"] == "not-run"
    assert "what it had measured is kept" in page


@pytest.mark.slow
def test_a_slow_part_is_cut_so_that_a_later_part_keeps_its_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budget, "LEAST_S", 1000.0)
    plan = [part("saves", 0.125), part("good", 200.0, is_reserved=True), part("good", 1.0, "last")]
    code, results, page = run(tmp_path, monkeypatch, plan, budget_s=400.0)
    assert code == Exit.PASS
    assert results["saves"]["status"] == "cut"
    assert "the rest is kept for later parts; what it had measured is kept" in results["saves"]["because"]
    assert results["good"]["status"] == results["last"]["status"] == "ok"
    assert "peft-harness night --device cpu --only saves" in page
    night_json = json.loads((tmp_path / "night" / "night.json").read_text())
    assert [one["limit_s"] for one in night_json["parts"]] == [185.0, 394.875, 194.875]


def test_three_slow_parts_of_parity_leave_ten_minutes_for_ceilings_operations_and_steps() -> None:
    """Each part before the headline claims takes all that it may, but a part that is not slow takes its estimate."""
    for device, plan in (("cuda", parts.on_gpu()), ("cpu", parts.on_cpu())):
        left, reached = 600.0 - budget.LAST_S[device], []
        for number, one in enumerate(plan):
            if one.estimate_s <= left:
                reached.append(one.name)
                most = budget.limit(one, plan[number + 1 :], left, device, 600.0)  # type: ignore[arg-type]
                assert most.seconds >= one.estimate_s
                left -= most.seconds + 2.0 if one.name.startswith("parity") else one.estimate_s  # 2 s: its end
        wanted = [one.name for one in plan if one.is_reserved]
        assert {name.partition("-")[0] for name in wanted} == {"parity", "ceilings", "operation", "step"}
        assert set(wanted) <= set(reached)


def test_a_part_that_takes_many_times_its_estimate_seems_to_hang() -> None:
    def limit(
        later: list[NightPart], left_s: float, device: parts.Device = "cuda", budget_s: float = 600.0
    ) -> budget.Limit:
        return budget.limit(part("good", 60.0), later, left_s, device, budget_s)

    assert limit([], 10_000.0).by == "estimate"
    assert limit([], 100.0).by == "budget"
    assert limit([part("good", 50.0, is_reserved=True)], 120.0).by == "share"
    usual_s = budget.DEFAULT_S["cpu"]
    usual, slower = (limit([], 10_000.0, "cpu", factor * usual_s).seconds for factor in (1, 2))
    assert slower == 2 * usual  # a slower machine
    assert limit([], 10_000.0, "cuda", 1200.0) == limit([], 10_000.0, "cuda")


@pytest.mark.parametrize(
    ("gpu", "baseline"),
    [
        (Gpu(name="NVIDIA H100 80GB HBM3"), "night-nvidia-h100-80gb-hbm3"),
        (Gpu(name="NVIDIA H100 80GB HBM3 MIG 1g.10gb"), "night-nvidia-h100-80gb-hbm3-mig-1g-10gb"),
        (Gpu(name="NVIDIA H100", note="nvidia-smi does not answer: it hangs"), "night-nvidia-h100"),
    ],
)
def test_the_card_has_the_name_that_torch_returns(
    gpu: Gpu, baseline: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(nights, "find_gpu", lambda: gpu)
    monkeypatch.setattr(parts, "on_gpu", list)
    night(NightRequest(600.0, "cuda", tmp_path / "night"), as_json=True)
    manifest = json.loads((tmp_path / "night" / "night.json").read_text())
    assert nights.baseline_name(manifest["card"]) == baseline
    assert manifest["notes"] == ([gpu.note] if gpu.note else [])
    assert (gpu.note in capsys.readouterr().err) or not gpu.note


def test_a_gpu_without_a_name_is_not_called_a_cpu() -> None:
    assert nights.baseline_name("") == "night-unknown-gpu"


def test_a_wrong_result_is_a_finding_also_in_a_part_that_is_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(part_run, "GRACE_S", 1.0)
    wrong = part("wrong, then slow", 0.1, "wrong", kind="bench")
    code, results, _ = run(tmp_path, monkeypatch, [wrong], budget_s=8.0)
    assert code == Exit.FAIL
    assert (results["wrong"]["status"], results["wrong"]["because"]) == (
        "finding",
        "nf4: no parity: fused fails outputs; the budget was over",
    )


def test_a_night_that_is_cut_before_it_measured_anything_is_not_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(part_run, "GRACE_S", 1.0)
    code, results, _ = run(tmp_path, monkeypatch, [part("slow", 0.1)], budget_s=8.0)
    assert code == Exit.NOTHING_COMPARED
    assert results["slow"]["status"] == "cut"
    assert "nothing was measured" in results["slow"]["because"]


def test_a_damaged_document_is_no_crash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, results, _ = run(tmp_path, monkeypatch, [part("garbage"), part("good")])
    assert code == Exit.INFRASTRUCTURE
    assert results["garbage"]["status"] == "failed"
    assert results["garbage"]["because"] == "its document cannot be read"
    assert results["good"]["status"] == "ok"


def test_only_chooses_parts_and_refuses_unknown_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, results, _ = run(tmp_path, monkeypatch, [part("good"), part("raises")], only=("go",))
    assert list(results) == ["good"]
    assert main(["night", "--device", "cpu", "--only", "nothing", "--out", str(tmp_path / "other")]) == Exit.USAGE
    assert "no part `nothing`" in capsys.readouterr().err


def test_without_a_gpu_every_part_is_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(nights, "find_gpu", lambda: Gpu("no GPU"))
    out = tmp_path / "night"
    assert main(["night", "--out", str(out), "--json"]) == Exit.INFRASTRUCTURE
    document = json.loads(capsys.readouterr().out)
    assert {one["status"] for one in document["results"]} == {"not-run"}
    assert len(document["results"]) == len(parts.on_gpu())
    assert document["exit"] == json.loads((out / "footer.json").read_text())["exit"] == Exit.INFRASTRUCTURE
    page = (out / "index.html").read_text()
    assert "nothing was run: no GPU" in page
    assert "baseline yet" not in page


@pytest.mark.slow
def test_ctrl_c_leaves_a_footer_and_a_page(tmp_path: Path) -> None:
    """The night of a real process, ended in its first part."""
    stub = tmp_path / "stub.py"
    stub.write_text(STUB, encoding="utf-8")
    out = tmp_path / "night"
    code = (
        "import sys; from pathlib import Path; from harness.regression.night import parts, run\n"
        "plan = [parts.NightPart(n, n, 'check', (n,), 1.0) for n in ('saves', 'good')]\n"
        "parts.on_cpu = lambda: plan\n"
        f"wanted = run.NightRequest(600, 'cpu', Path({str(out)!r}), command=(sys.executable, {str(stub)!r}))\n"
        "sys.exit(run.night(wanted, True))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    eventually((tmp_path / "ready").exists, "the part has set its handler")
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE_S) == Exit.INFRASTRUCTURE
    footer = json.loads((out / "footer.json").read_text())
    assert footer["how"] == "interrupted"
    assert footer["counts"] == {"cut": 1, "not-run": 1}
    assert footer["left_out"] == {"saves": "interrupted; what it had measured is kept", "good": "interrupted"}
    page = (out / "index.html").read_text()
    assert "peft-harness night --device cpu --only saves --only good" in page
    assert "1 pass; interrupted; what it had measured is kept" in page
    assert "Left out by the interruption: saves, good." in page


def test_every_command_of_the_plans_is_one_that_the_command_line_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    import click

    from harness.cli.app import commands

    for planned in (*parts.on_gpu(), *parts.on_cpu()):
        words = [w.replace(parts.OUT, "x") for w in planned.words if w != parts.RUNS]
        command = commands.get_command(click.Context(commands), words[0])
        assert command is not None, planned.name
        command.make_context(words[0], words[1:])  # raises for an option that it does not have


def test_a_suite_of_ones_own_takes_the_place_of_the_real_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = tmp_path / "half.yaml"
    own.write_text(loader.find(parts.REAL_SUITE).read_text())
    real = next(one for one in parts.on_gpu() if one.name == parts.REAL)
    assert parts.REAL_SUITE in real.words
    assert str(own) in parts.with_suite(real, own).words
    monkeypatch.setattr(parts, "on_gpu", lambda: [real])
    monkeypatch.setattr(nights, "find_gpu", lambda: Gpu(name="A card"))
    stub = tmp_path / "stub.py"
    stub.write_text("import sys; sys.exit(5)")
    request = NightRequest(600.0, "cuda", tmp_path / "night", real=own, command=(sys.executable, str(stub)))
    night(request, as_json=True)
    result = json.loads((tmp_path / "night" / "parts" / "matrix-real.json").read_text())
    assert result["command"].startswith(f"peft-harness run {own}")
    assert result["seconds"] is not None  # it was started: whether the model is here is for the suite to say


@pytest.mark.slow
def test_a_rehearsal_runs_cells_of_the_same_kind_as_the_headlines() -> None:
    def kinds(plan: list[NightPart]) -> set[tuple[object, ...]]:
        """Return a tuple for each kind of Cell that the parts of the headlines run."""
        found = set()
        for part in plan:
            if part.name.startswith("headline-"):
                cells, only = loader.load(part.words[1]).plan, part.words[part.words.index("--only") + 1]
                found |= {
                    (c.method, c.implementation, c.dtype, c.optimizer, str(c.base), c.training.checkpointing)
                    for c in select(cells, only).cells
                }
        return found

    assert kinds(parts.on_gpu()) == kinds(parts.on_cpu())


def test_a_rehearsal_without_a_budget_has_time_for_all_its_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = parts.on_cpu()
    monkeypatch.setattr(parts, "on_cpu", list)
    main(["night", "--device", "cpu", "--out", str(tmp_path / "night")])
    budget_s = json.loads((tmp_path / "night" / "night.json").read_text())["budget_s"]
    assert all(budget.planned(plan, budget_s, "cpu"))
    # The budget also keeps time around each part, and for the page.
    assert sum(one.estimate_s + budget.AROUND_S for one in plan) + budget.LAST_S["cpu"] <= budget_s


@pytest.mark.slow
def test_a_rehearsal_compares_its_run_with_itself_and_suggests_no_baseline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = [one for one in parts.on_cpu() if one.name in ("matrix", "baseline")]
    stub = tmp_path / "stub.py"
    stub.write_text(
        "import json, sys; from pathlib import Path; from support import recorded_run\n"
        "word, folder = sys.argv[1], Path(sys.argv[-1])\n"
        "if word == 'run': recorded_run.write_run(folder, only=('head', 'fused'))\n"
        "else: from harness.cli import main; sys.exit(main(sys.argv[1:]))\n"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    monkeypatch.setattr(parts, "on_cpu", lambda: plan)
    night(NightRequest(600.0, "cpu", tmp_path / "night", command=(sys.executable, str(stub))), as_json=True)
    result = json.loads((tmp_path / "night" / "parts" / "baseline.json").read_text())
    run_folder = str(tmp_path / "night" / "parts" / "matrix" / "run")
    assert result["status"] == "ok", result
    assert result["summary"] == "pass: 2 Cells compared, no regression"
    assert result["command"] == f"peft-harness gate {run_folder} --baseline {run_folder} --json"
    footer = json.loads((tmp_path / "night" / "footer.json").read_text())
    assert footer["verdict"] == "2 ok"
    assert "baseline promote" not in (tmp_path / "night" / "index.html").read_text()


def test_the_names_of_parts_are_distinct() -> None:
    for plan in (parts.on_gpu(), parts.on_cpu()):
        names = [one.name for one in plan]
        assert len(names) == len(set(names))
        assert names[0].startswith("parity")  # correctness comes first


def test_a_suite_that_is_not_there_is_refused_before_anything_runs(tmp_path: Path) -> None:
    out = tmp_path / "night"
    with pytest.raises(UsageError, match="no such file") as raised:
        night(NightRequest(60.0, "cpu", out, real=tmp_path / "none.yaml"), as_json=True)
    assert "--real" in raised.value.where
    assert not out.exists()


def test_the_command_for_what_was_left_out_names_the_suite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    suite = tmp_path / "my suite.yaml"
    suite.write_text(loader.find(parts.REAL_SUITE).read_text())
    for name, real in (("good", ""), (parts.REAL, f" --real '{suite}'")):
        monkeypatch.setattr(parts, "on_cpu", lambda name=name: [part("good", 30.0, name)])
        night(NightRequest(8.0, "cpu", tmp_path / name, real=suite), as_json=False)
        out, err = capsys.readouterr()
        assert f"peft-harness night --device cpu{real} --only {name}" in out
        assert (f"--real {suite} is not used" in err) is (not real)


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert main(["night", "--device", "cpu", "--out", str(tmp_path / "file" / "night")]) == Exit.USAGE
    assert f"--out {tmp_path / 'file' / 'night'}: cannot be made" in capsys.readouterr().err
