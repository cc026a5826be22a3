"""Cells whose parity gate cannot differ share one: which Cells, what their Records say, and what is taken anew."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from harness.cell import gate_key
from harness.cell.job import Asset, Job, JobTask
from harness.errors import Exit
from harness.records.gate import Gate, shared
from harness.records.record import (
    AssetUse,
    Base,
    Cell,
    CheckResult,
    Evaluation,
    Outcome,
    Provider,
    Record,
    Status,
    Training,
)
from harness.runner.shared_gates import SharedGates
from support import recorded_run
from support.sandbox import ForkSandbox, Sandbox
from support.stub_attempts import SOURCE

CELL = recorded_run.cells()["fused"]
USE = AssetUse(name="m", source="s", sha256="a" * 64)


def key(cell: Cell = CELL, sha256: str = "a" * 64, device: str = "cpu", labels: int = 2, data: str = "d") -> str:
    asset = Asset(path="/nowhere", source=SOURCE, use=USE.model_copy(update={"sha256": sha256}))
    task = JobTask(
        name="t", spec={}, labels=labels, test=1, shuffle_seed=0, use=USE.model_copy(update={"sha256": data})
    )
    return gate_key.of_cell(cell, asset, task, device)


def changed(**fields: Any) -> Cell:
    return CELL.model_copy(update=fields)


def trained(**fields: Any) -> Cell:
    return changed(training=Training(**{**CELL.training.model_dump(), **fields}))


@pytest.mark.parametrize(
    "other",
    [
        changed(seed=7),
        changed(task="other-task"),
        changed(optimizer="adamw-8bit"),
        changed(evaluation=Evaluation(items=3, latency=False)),
        *(trained(**one) for one in ({"lr": 1.0}, {"steps": 2}, {"warmup": 1}, {"batch": 2}, {"loop": "trl"})),
    ],
    ids=lambda cell: cell.cell_id,
)
def test_what_only_chooses_the_numbers_shares_a_gate(other: Cell) -> None:
    assert key(other) == key()
    assert key(data="other data") == key()


@pytest.mark.parametrize(
    "other",
    [
        key(changed(method="dora")),
        key(changed(implementation="hf-peft")),
        key(changed(config={"rank": 4, "alpha": 16})),
        key(changed(base=Base(quantization="nf4", implementation="fused"))),
        key(changed(dtype="bfloat16")),
        key(changed(environment="peft==0.19.1")),
        key(trained(max_tokens=512)),
        key(sha256="b" * 64),
        key(device="cuda"),
        key(labels=3),
    ],
)
def test_what_chooses_the_code_has_its_own_gate(other: str) -> None:
    assert other not in ("", key())


def test_a_compiled_model_and_an_imported_adapter_never_share() -> None:
    assert key(trained(compile=True)) == ""
    assert key(changed(config={"adapter_sha256": "0" * 64})) == ""


def ordered(gates: SharedGates, jobs: Sequence[Job]) -> Iterator[Job]:
    """Yield the jobs as a runner takes them."""
    for cell in gates.in_order([job.cell for job in jobs], lambda cell: key(cell, USE.sha256)):
        (job,) = (job for job in jobs if job.cell == cell)
        yield job.model_copy(update={"known_gate": gates.known(job)})


def two_seeds_of_two_methods() -> list[Job]:
    asset = Asset(path="/nowhere", source=SOURCE, use=USE)
    task = JobTask(name="t", spec={}, labels=2, test=1, shuffle_seed=0, use=USE)
    return [
        Job(run="r", folder="f", attempt=1, cell=changed(method=method, seed=seed), model=asset, data=None, task=task,
            device="cpu")
        for method in ("lora", "dora") for seed in (0, 1)
    ]  # fmt: skip


@pytest.mark.parametrize("own", [False, True])
def test_while_a_gate_runs_cells_with_other_gates_go_first(own: bool) -> None:
    jobs, gates = two_seeds_of_two_methods(), SharedGates(own=own)
    queue = ordered(gates, jobs)
    taken = [next(queue) for _ in range(2)]
    assert [job.cell.method for job in taken] == (["lora", "lora"] if own else ["lora", "dora"])
    for job in taken:
        gates.add(key(job.cell), recorded_run.record("fused", job.cell, gate=Gate(key=f"gate of {job.cell.method}")))
    known = [job.known_gate.record if job.known_gate else "" for job in queue]
    assert known == ([""] * 2 if own else [f"{job.cell.cell_id}.1" for job in taken])


def test_if_only_cells_with_one_gate_are_left_the_next_one_runs_its_own() -> None:
    jobs = two_seeds_of_two_methods()[:2]
    assert [job.known_gate for job in ordered(SharedGates(), jobs)] == [None, None]


def test_software_and_threads_are_part_of_the_key(tmp_path: Path) -> None:
    from support.stub_attempts import Stubbed

    (job,) = Stubbed(tmp_path, 1).works()
    here, by = recorded_run.environment(), Provider(distribution="d", version="1")
    usual = gate_key.of_process(job, by, here)
    assert usual == gate_key.of_process(job.model_copy(update={"attempt": 2, "launched": 1.0}), by, here)
    others = [
        gate_key.of_process(job, by, here.model_copy(update={field: value}))
        for field, value in (("id", "other"), ("code_version", "other"), ("threads", 1))
    ]
    others.append(gate_key.of_process(job, by.model_copy(update={"version": "2"}), here))
    assert len({usual, *others}) == 5


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        *(
            (name, True)
            for name in (
                "ATEN_CPU_CAPABILITY", "CUBLAS_WORKSPACE_CONFIG", "CUDA_LAUNCH_BLOCKING", "KMP_AFFINITY", "MKL_CBWR",
                "MKL_ENABLE_INSTRUCTIONS", "NVIDIA_TF32_OVERRIDE", "OMP_DYNAMIC", "ONEDNN_MAX_CPU_ISA",
                "OPENBLAS_CORETYPE", "PEFT_HARNESS_COMPILE", "PEFT_HARNESS_CROSSOVERS",
                "PYTORCH_CUDA_ALLOC_CONF", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "TRITON_INTERPRET",
            )
        ),
        ("CUDA_VISIBLE_DEVICES", False), ("HOME", False), ("OMP_NUM_THREADS", False),
        ("PEFT_HARNESS_API_KEY", False), ("PEFT_HARNESS_CHILD", False),
    ],
)  # fmt: skip
def test_variables_that_may_change_a_number_are_part_of_the_key(
    name: str, counts: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from support.stub_attempts import Stubbed

    (job,) = Stubbed(tmp_path, 1).works()
    here, by = recorded_run.environment(), Provider(distribution="d", version="1")
    monkeypatch.delenv(name, raising=False)
    usual = gate_key.of_process(job, by, here)
    monkeypatch.setenv(name, "7")
    assert (gate_key.of_process(job, by, here) != usual) is counts


# --- whole runs ------------------------------------------------------------------------------------------------------


def by_seed(sandbox: Sandbox) -> dict[int, Record]:
    return {record.cell.seed: record for record in sandbox.read().latest().values()}


def rests_on(record: Record) -> str | None:
    return record.gate.record if record.gate else None


def numbers(record: Record) -> dict[str, Any]:
    """Return what does not depend on time: losses, scores, parameters, files and counted bytes."""
    assert record.measurements is not None, record.because
    found = record.measurements.model_dump(mode="json", exclude={"latency", "energy"})
    for name in ("step_seconds", "cpu_seconds", "outside_seconds"):
        found["training"].pop(name, None)
    found["memory"].pop("baseline_B")  # of the process
    return found


@pytest.mark.nightly
def test_seeds_share_a_gate_and_their_numbers_stay_the_same(fork_sandbox: ForkSandbox, tmp_path: Path) -> None:
    suite = fork_sandbox.suite("{implementation: hf-peft, seed: [0, 1]}")
    assert fork_sandbox.command("run", suite, "--out", "run").code == Exit.PASS
    shared = by_seed(fork_sandbox)
    assert [rests_on(record) for record in shared.values()] == ["", f"{shared[0].cell_id}.1"]
    assert [check.check for check in shared[0].checks] == [check.check for check in shared[1].checks]
    written = json.loads((fork_sandbox.run_folder / "cells" / f"{shared[1].id}.json").read_text())
    assert {check["check"].split("/")[3] for check in written["checks"]} == {"trained"}  # the others are of the gate
    fork_sandbox.run_folder.rename(tmp_path / "shared")
    assert fork_sandbox.command("run", suite, "--out", "run", "--own-gates").code == Exit.PASS
    own = by_seed(fork_sandbox)
    assert [rests_on(record) for record in own.values()] == ["", ""]
    assert {seed: numbers(record) for seed, record in own.items()} == {s: numbers(r) for s, r in shared.items()}


@pytest.mark.nightly
def test_a_failed_gate_is_shared_and_an_interrupted_one_is_not(fork_sandbox: ForkSandbox) -> None:
    cells = [f"{{implementation: {name}, seed: [0, 1]}}" for name in ("wrong", "raises")]
    finished = fork_sandbox.command("run", fork_sandbox.suite(*cells), "--out", "run")
    assert finished.code == Exit.FAIL
    records = list(fork_sandbox.read().latest().values())
    wrong, raises = ([r for r in records if r.cell.implementation == name] for name in ("wrong", "raises"))
    assert [(r.status, r.gate) for r in raises] == [(Status.ERROR, None)] * 2
    assert [r.status for r in wrong] == [Status.NONCONFORMING] * 2
    assert [rests_on(r) for r in wrong] == ["", wrong[0].id]
    assert wrong[1].because == f"{wrong[0].because} (the gate of Record {wrong[0].id})"
    # A resumed run tries the gate again.
    fork_sandbox.command("run", fork_sandbox.suite(*cells), "--resume", "run", "--only", "implementation=wrong")
    again = [r for r in fork_sandbox.read().latest().values() if r.cell.implementation == "wrong"]
    assert [(r.attempt, rests_on(r)) for r in again] == [(2, ""), (2, again[0].id)]


@pytest.mark.nightly
def test_a_resumed_run_takes_its_own_gates_and_measures_what_rests_on_a_lost_one(fork_sandbox: ForkSandbox) -> None:
    suite = fork_sandbox.suite("{implementation: reference, seed: [0, 1, 2]}")
    assert fork_sandbox.command("run", suite, "--out", "run").code == Exit.PASS
    first, second, _ = (record.id for record in by_seed(fork_sandbox).values())
    cells = fork_sandbox.run_folder / "cells"
    (cells / f"{second}.json").unlink()
    assert fork_sandbox.command("run", suite, "--resume", "run").code == Exit.PASS
    kept = {0: (1, ""), 1: (2, ""), 2: (1, first)}
    assert {seed: (r.attempt, rests_on(r)) for seed, r in by_seed(fork_sandbox).items()} == kept
    (cells / f"{first}.json").unlink()
    finished = fork_sandbox.command("run", suite, "--resume", "run")
    assert finished.err.count(f"rests on the parity gate of Record {first}, which is missing or was changed") == 1
    found = by_seed(fork_sandbox)
    assert {s: (r.attempt, rests_on(r)) for s, r in found.items()} == {0: (2, ""), 1: (2, ""), 2: (2, found[0].id)}


@pytest.mark.nightly
def test_merged_weights_are_checked_again_for_another_recipe_and_for_latencies(fork_sandbox: ForkSandbox) -> None:
    cells = [
        "{implementation: reference, latency: never}",
        "{implementation: reference, seed: 1, latency: never}",
        "{implementation: reference, seed: 2, latency: never, training: {lr: 1e-2}}",
        "{implementation: reference, seed: 3}",
    ]
    assert fork_sandbox.command("run", fork_sandbox.suite(*cells), "--out", "run").code == Exit.PASS
    found = by_seed(fork_sandbox)
    assert [rests_on(record) for record in found.values()] == ["", *[found[0].id] * 3]
    assert [bool(record.gate and record.gate.merging) for record in found.values()] == [False, True, False, False]
    assert [sum(check.of_merging for check in record.checks) for record in found.values()] == [1] * 4
    reused = fork_sandbox.run_folder / "cells" / f"{found[1].id}.json"
    assert "/merge/" not in reused.read_text(encoding="utf-8")


def checked(name: str, outcome: Outcome = Outcome.PASS) -> CheckResult:
    return CheckResult(check=f"lora/{name}/float32/trained", outcome=outcome, policy="noise_floor")


PASSED, FAILED = checked("merge"), checked("merge", Outcome.FAIL)


@pytest.mark.parametrize(
    ("attempts", "reused"),
    [
        ([("", 0, [PASSED])], True),
        ([("", 0, [FAILED])], False),
        ([("", 0, [checked("merge", Outcome.SKIPPED)])], False),
        ([("", 0, [checked("moved")])], False),
        ([("", 1, [PASSED])], False),  # a check of the gate, before training
        ([("", 1, [PASSED, PASSED])], True),
        ([("", 0, [FAILED]), ("", 0, [PASSED])], False),  # of two concurrent Cells
        ([("", 0, [PASSED]), ("", 0, [FAILED])], False),
        ([("", 0, [PASSED]), ("another", 0, [FAILED])], False),  # of a Cell that reuses the gate
        ([("", 0, [PASSED]), ("another", 0, [checked("moved")])], True),
    ],
)
def test_only_a_passed_check_of_merged_weights_is_reused(
    attempts: list[tuple[str, int, list[CheckResult]]], reused: bool
) -> None:
    job, *_ = two_seeds_of_two_methods()
    gates = SharedGates()
    for rests, own, checks in attempts:
        gate = Gate(key="gate", record=rests, checks=own)
        gates.add(key(job.cell), recorded_run.record("fused", job.cell, gate=gate, checks=checks))
    known = gates.known(job)
    assert known is not None
    assert known.merged_recipe == (job.cell.recipe_id if reused else "")


def test_a_record_that_reuses_a_check_of_merged_weights_that_is_not_there_is_unusable() -> None:
    job, other, *_ = two_seeds_of_two_methods()
    user = recorded_run.record("fused", other.cell, gate=Gate(key="gate", record=f"{job.cell.cell_id}.1", merging=True))
    for checks, found in (([PASSED], 2), ([checked("moved")], 1)):
        owner = recorded_run.record("fused", job.cell, gate=Gate(key="gate"), checks=checks)
        assert len(shared([owner, user])[0]) == found
