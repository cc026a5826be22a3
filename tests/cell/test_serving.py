"""`serve:`: a right server is judged and timed, every mistake of a server is a result, and no process is left behind."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM

from harness.cell.cell_run import CellRun
from harness.cell.job import Asset, Job, JobTask
from harness.cell.measure.memory import PeakMeter
from harness.cell.measure.phases import PhaseClock
from harness.cell.serving import phase, timing
from harness.cell.training import random_model
from harness.conformance.subject import Subject, adaptable_layers, configure
from harness.methods import servers
from harness.methods.registry import discover
from harness.methods.servers import vllm
from harness.methods.servers.kind import Launch, ServerKind
from harness.records.record import Cell, CheckResult, Evaluation, Outcome, Training
from harness.records.served import Served
from support import adapter_folders
from support.processes import eventually, gone
from support.repository import TESTS

pytestmark = pytest.mark.slow  # each test starts a server

LOADS = ["base", "one adapter", "base", "one adapter", "several adapters", "base and adapters"]
SCRIPT = TESTS / "support" / "model_server.py"
TARGETS = ("q_proj", "v_proj", "down_proj")


def arguments(launch: Launch) -> list[str]:
    adapters = [f"{name}={folder}" for name, folder in launch.adapters.items()]
    return ["-P", str(SCRIPT), str(launch.port), launch.name, str(launch.base), *adapters]


SMALL = ServerKind("small", "torch", arguments, distributions=("torch", "not-installed"), start_s=60.0, patience_s=60.0)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return adapter_folders.base(tmp_path_factory.mktemp("serving") / "tiny")


@pytest.fixture
def kind(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Offer the small server under the name `small`. The test may set its kind."""
    offered = SimpleNamespace(kind=SMALL)
    monkeypatch.setattr(servers, "kinds", lambda: {"small": offered.kind})
    monkeypatch.setattr(timing, "ROUNDS", 1)
    return offered


def subject_of(base: Path, model: Any = None, **knobs: Any) -> Subject:
    """Return a trained LoRA: random tensors of a size that changes the answers. model: by default that of the folder."""
    model = model or AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = configure("lora", {"rank": 3, "alpha": 6, "targets": list(TARGETS), **knobs})
    bases, own = adaptable_layers(model, config), list(model.parameters())
    adapted = discover().find("method", "lora", "reference")(model, config, torch.Generator().manual_seed(0))
    with torch.no_grad():
        for tensor in adapted.tensors().values():
            tensor.add_(0.3 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1)))
    return Subject("lora", config, "float32", model, adapted, bases, own)


def served(
    base: Path, folder: Path, subject: Subject | None = None, scheme: str = "folder", **fields: Any
) -> tuple[Served, dict[str, CheckResult]]:
    """Serve a LoRA. Return the measurements, and the results of the checks by name."""
    budget = {"training": Training(steps=1), "evaluation": Evaluation(items=1, prompt_tokens=8)}
    cell = Cell(model="m", task="t", method="lora", implementation="reference", serve="small", **{**budget, **fields})
    (folder / "logs").mkdir(exist_ok=True)
    model = Asset.model_construct(path=str(base), source=SimpleNamespace(scheme=scheme))
    job = Job.model_construct(
        run="run", folder=str(folder), attempt=1, cell=cell, device="cpu", server_python="", model=model, data=None,
        task=JobTask.model_construct(),
    )  # fmt: skip
    meter = PeakMeter(torch.device("cpu"))
    run = CellRun(job, discover(), PhaseClock(meter, lambda _: None), meter, lambda *_, **__: None, baseline_B=0)
    given = subject or subject_of(base)
    found = phase.serve(run, given, phase.draw(run, given))
    assert found is not None
    assert psutil.Process().children(recursive=True) == []
    assert [path.name for path in folder.iterdir()] == ["logs"]
    return found, {check.id.check: check for check in run.checks}


def outcomes(checks: dict[str, CheckResult]) -> dict[str, Outcome]:
    return {name.removeprefix("served-"): check.outcome for name, check in checks.items()}


def checks_passed(checks: dict[str, CheckResult]) -> set[str]:
    return {name for name, outcome in outcomes(checks).items() if outcome is Outcome.PASS}


# --- a right server


@pytest.mark.nightly
def test_a_right_server_is_judged_and_then_timed_under_every_load(base: Path, tmp_path: Path, kind: Any) -> None:
    found, checks = served(base, tmp_path)
    assert set(outcomes(checks).values()) == {Outcome.PASS}
    assert list(outcomes(checks)) == ["base", "one", "several", "mixed", "swap", "alive"]
    assert [one.load for one in found.times] == LOADS
    assert [one.requests for one in found.times] == [1, 1, 4, 4, 4, 4]
    assert [one.adapters for one in found.times] == [0, 1, 0, 1, 4, 2]
    for one in found.times:
        assert len(one.first_token_s) == len(one.token_s) == one.requests
        assert all(first <= one.round_s[0] for first in one.first_token_s)
    assert len(found.swap_s) == 1
    assert found.software == {"torch": torch.__version__}
    assert found.start_s is not None
    assert found.memory_B is not None
    assert found.memory_B > 2**25  # torch alone is larger
    assert found.because == ""


@pytest.mark.nightly
def test_rslora_and_targets_with_other_layers_of_the_same_name_are_saved_right(
    base: Path, tmp_path: Path, kind: Any
) -> None:
    paths = ["model.layers.1.self_attn.q_proj"]
    found, checks = served(base, tmp_path, subject_of(base, rslora=True, targets=paths))
    assert set(outcomes(checks).values()) == {Outcome.PASS}
    assert found.because == ""


@pytest.mark.nightly
def test_the_base_of_a_shape_is_saved_with_its_random_weights(base: Path, tmp_path: Path, kind: Any) -> None:
    model = random_model.build(base, torch.float32)
    random_model.draw(model, torch.device("cpu"))
    _, checks = served(base, tmp_path, subject_of(base, model), scheme="shape")
    assert set(outcomes(checks).values()) == {Outcome.PASS}


def test_a_seed_without_latencies_is_not_served(base: Path, tmp_path: Path, kind: Any) -> None:
    with pytest.raises(AssertionError):  # `served` asserts that there are measurements
        served(base, tmp_path, evaluation=Evaluation(items=1, latency=False))


# --- wrong answers


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("fault", "wrong"),
    [
        ("base rows changed", {"base", "mixed"}),
        ("one adapter for all requests at a time", {"several", "mixed"}),
        ("base rows keep the last adapter", {"mixed"}),
        ("stale adapter", {"swap"}),
    ],
)
def test_a_load_with_wrong_answers_is_not_timed(
    base: Path, tmp_path: Path, kind: Any, monkeypatch: pytest.MonkeyPatch, fault: str, wrong: set[str]
) -> None:
    monkeypatch.setenv("MODEL_SERVER_FAULT", fault)
    found, checks = served(base, tmp_path)
    assert {name for name, outcome in outcomes(checks).items() if outcome is Outcome.FAIL} == wrong
    names = {"base": "base", "one adapter": "one", "several adapters": "several", "base and adapters": "mixed"}
    for times in found.times:
        assert bool(times.round_s) is (names[times.load] in checks_passed(checks))
        assert bool(times.round_s) is not bool(times.because)
    assert bool(found.swap_s) is ("swap" in checks_passed(checks))


@pytest.mark.nightly
def test_a_server_that_does_not_load_adapters_is_timed_without_a_swap(
    base: Path, tmp_path: Path, kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODEL_SERVER_FAULT", "no loading")
    found, checks = served(base, tmp_path)
    assert outcomes(checks)["swap"] is Outcome.SKIPPED
    assert found.swap_s == []
    assert "not offered" in found.swap_because
    assert all(one.round_s for one in found.times)


# --- servers that do not answer


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("fault", "because"),
    [
        ("dies", "small ended with exit code 1 before it answered"),
        ("hangs at its start", "small did not answer within 5 s of its start"),
        ("port taken", "small ended with exit code 1 before it answered"),
        ("another server", "another server answers on port"),
        ("dies while it serves", "small ended with exit code 7"),
        ("hangs", "no complete answer in 2 seconds"),
        ("a token less in streams", "a stream with 15 of 16 tokens"),
    ],
)
def test_a_server_that_does_not_answer_is_a_result(
    base: Path, tmp_path: Path, kind: Any, monkeypatch: pytest.MonkeyPatch, fault: str, because: str
) -> None:
    monkeypatch.setenv("MODEL_SERVER_FAULT", fault)
    short = {"hangs at its start": {"start_s": 5.0}, "hangs": {"patience_s": 2.0}}.get(fault, {})
    kind.kind = ServerKind(**{**vars(SMALL), **short})
    found, checks = served(base, tmp_path)
    assert because in found.because
    assert checks["served-alive"].outcome is Outcome.FAIL
    assert checks["served-alive"].detail == found.because
    assert not any(one.round_s for one in found.times)


def test_a_server_that_is_not_installed_is_not_run(base: Path, tmp_path: Path, kind: Any) -> None:
    kind.kind = ServerKind("small", "no_such_module", arguments, environment="vllm")
    found, checks = served(base, tmp_path)
    assert found.because == "not run: small is not installed; `peft-harness env create vllm`"
    assert outcomes(checks) == {"alive": Outcome.SKIPPED}


KILLED = """
import sys, time
from pathlib import Path
from harness.cell.serving import server_process
from harness.methods.servers.kind import Launch, ServerKind

script, base, port = sys.argv[1], Path(sys.argv[2]), server_process.free_port()
kind = ServerKind("small", "torch", lambda launch: ["-P", script, str(launch.port), launch.name, str(base)])
launch = Launch(base, "base", {}, 1, "float32", "cpu", port, 64, 1)
with server_process.running(kind, server_process.ServerPython(sys.executable, {}), "", launch) as server:
    print("pid", server._process.pid, flush=True)
    time.sleep(600)
"""


def test_a_server_dies_with_the_process_that_started_it(base: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-P", "-c", KILLED, str(SCRIPT), str(base)], stdout=subprocess.PIPE, text=True
    ) as worker:
        assert worker.stdout is not None
        pid = next(int(line.split()[1]) for line in worker.stdout if line.startswith("pid "))
        assert not gone(pid)
        worker.kill()
        eventually(lambda: gone(pid), "the server has ended")


def test_the_command_of_vllm(tmp_path: Path) -> None:
    launch = Launch(tmp_path, "base", {"a": tmp_path / "a", "b": tmp_path / "b"}, 12, "float32", "cpu", 8123, 64, 8)
    given = vllm.SERVER.arguments(launch)
    options = {given[i]: given[i + 1] for i in range(len(given) - 1) if given[i].startswith("--")}
    assert options["--max-lora-rank"] == "16"  # the next larger value that vLLM takes
    assert options["--max-loras"] == "2"  # no slot stays empty
    assert options["--max-cpu-loras"] == "3"  # one more, for the hot-swap
    assert given[-3:] == [f"a={tmp_path / 'a'}", f"b={tmp_path / 'b'}", "--enforce-eager"]
