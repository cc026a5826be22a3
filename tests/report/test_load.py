"""`harness.load`: the tables say what the Records say, in the right dtypes, and name what they had to leave out."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

import pandas as pd
import pytest

import harness
from harness.analysis.failed_checks import no_merged_speed
from harness.errors import UsageError
from harness.records import store
from harness.records.record import Failure, Gate, Memory, Outcome, Predicted, Record, Status
from harness.report.export.columns import TABLES
from harness.report.export.columns import declared as declared_columns
from harness.report.export.frames import Numbers
from support import recorded_run
from support.repository import PUBLISHED
from support.sandbox import Finished

REAL = PUBLISHED / "2026-11-24-quick-cpu"
ZERO_SHOT = "4e6102224418aa2e"
FUSED = recorded_run.cells()["fused"]


@pytest.fixture(scope="module")
def documents() -> list[dict[str, Any]]:
    """Records of a real run, read as plain JSON."""
    return [json.loads(path.read_text()) for path in sorted((REAL / "cells").glob("*.json"))]


@pytest.fixture(scope="module")
def numbers() -> Numbers:
    return harness.load(REAL)


def of(frame: Any, record: dict[str, Any]) -> Any:
    """Return the rows of one attempt."""
    mine = (frame["run"] == record["run"]) & (frame["cell_id"] == record["cell_id"])
    return frame[mine & (frame["attempt"] == record["attempt"])]


def cell(frame: Any, cell_id: str) -> Any:
    (row,) = frame[frame["cell_id"] == cell_id].to_dict("records")
    return row


# ---- what the tables hold


@pytest.mark.slow
def test_a_row_per_attempt_holds_the_values_of_its_record(numbers: Numbers, documents: list[dict[str, Any]]) -> None:
    assert len(numbers.cells) == len(documents) == 10
    for record in documents:
        (row,) = of(numbers.cells, record).to_dict("records")
        it, m = record["cell"], record["measurements"]
        assert all(row[name] == it[name] for name in ("model", "task", "method", "implementation", "dtype", "seed"))
        assert (row["status"], row["latest"], row["base"]) == ("ok", True, it["base"]["quantization"])
        assert (row["training.steps"], row["training.lr"]) == (it["training"]["steps"], it["training"]["lr"])
        assert row["parameters.trainable"] == m["parameters"]["adapter"] + m["parameters"]["head"]
        right = [item["correct"] for item in m["accuracy"]["items"]]
        assert (row["accuracy"], row["accuracy_n"]) == (m["accuracy"]["value"], len(right))
        assert row["duration_s"] == record["duration_s"]
        assert row["started"] == pd.Timestamp(record["started"])
        # Every part of the ledger, those that this old Record leaves at their default too.
        ledger = Memory.model_validate(m["memory"]).model_dump()
        assert (ledger.pop("predicted"), ledger.pop("not_predicted")) == (None, "")
        assert pd.isna(row["memory.not_predicted"])
        assert all(pd.isna(row[f"memory.predicted.{name}"]) for name in Predicted.model_fields)
        assert {name: row[f"memory.{name}"] for name in ledger} == ledger
        phases = {phase["name"]: phase for phase in record["phases"]}
        assert {n: row[f"phase_s.{n}"] for n in phases} == {n: p["seconds"] for n, p in phases.items()}
        if m["training"]:
            assert row["training_peak_B"] == phases["train"]["peak_memory_B"]
            steady = m["training"]["step_seconds"][m["training"]["timing_warmup"] :]
            assert (row["step_s"], row["step_n"]) == (median(steady), len(steady))
            assert row["tokens_per_s"] == sum(m["training"]["tokens"][-len(steady) :]) / sum(steady)
        e = record["environment"]
        assert (row["environment.id"], row["environment.torch"]) == (e["id"], e["software"]["torch"])
        assert row["environment.memory_B"] == int(e["machine"]["memory_B"])


def test_every_config_key_is_a_column(numbers: Numbers, documents: list[dict[str, Any]]) -> None:
    knobs = {f"config.{name}" for record in documents for name in record["cell"]["config"]}
    assert {name for name in numbers.cells.columns if name.startswith("config.")} == knobs
    for record in documents:
        (row,) = of(numbers.cells, record).to_dict("records")
        given = record["cell"]["config"]
        for knob in ("rank", "alpha", "dropout"):
            assert row[f"config.{knob}"] == given[knob] if knob in given else pd.isna(row[f"config.{knob}"])
        if "targets" in given:
            assert json.loads(row["config.targets"]) == given["targets"]
    assert numbers.cells["rank"].equals(numbers.cells["config.rank"])


def test_a_row_per_raw_sample(numbers: Numbers, documents: list[dict[str, Any]]) -> None:
    expected = 0
    for record in documents:
        rows, m = of(numbers.samples, record), record["measurements"]
        series = m["training"] or {}
        for kind in ("step_seconds", "losses", "gradient_norms", "tokens", "padded_tokens"):
            mine = rows[rows["kind"] == kind]
            values = series.get(kind, [])
            expected += len(values)
            assert mine["value"].tolist() == values
            assert mine["index"].tolist() == list(range(len(values)))
            assert mine["warmup"].tolist() == [i < series["timing_warmup"] for i in range(len(values))]
            assert set(mine["unit"]) <= {"s" if kind == "step_seconds" else "1"}
        for latency in m["latency"]:
            mine = rows[(rows["kind"] == f"latency_{latency['kind']}") & (rows["variant"] == latency["variant"])]
            expected += len(latency["seconds"])
            assert mine["value"].tolist() == latency["seconds"]
            assert set(mine["latency_tokens"]) <= {latency["tokens"]}
            assert not mine["warmup"].any()
    assert len(numbers.samples) == expected > 3000


def test_a_row_per_item_and_per_check(numbers: Numbers, documents: list[dict[str, Any]]) -> None:
    for record in documents:
        items = of(numbers.items, record)
        assert [{"id": i.item, "correct": i.correct} for i in items.itertuples()] == record["measurements"]["accuracy"][
            "items"
        ]
        checks = of(numbers.checks, record)
        for row, check in zip(checks.to_dict("records"), record["checks"], strict=True):
            given = {name: value for name, value in check.items() if value not in ("", None)}
            assert {name: row[name] for name in given} == given
            assert all(pd.isna(row[name]) for name in check.keys() - given.keys())
    assert len(numbers.items) == sum(len(r["measurements"]["accuracy"]["items"]) for r in documents)
    assert len(numbers.checks) == sum(len(r["checks"]) for r in documents)


def test_a_missing_value_is_na_and_never_zero(numbers: Numbers) -> None:
    row = cell(numbers.cells, ZERO_SHOT)
    never = ("config.rank", "rank", "step_s", "tokens_per_s", "training_peak_B", "phase_s.train", "because", "no_speed")
    assert [name for name in never if not pd.isna(row[name])] == []
    assert row["accuracy_n"] == 200
    assert (row["training.steps"], row["parameters.trainable"]) == (0, 0)  # these are noughts


def test_dtypes(numbers: Numbers) -> None:
    for table in TABLES:
        frame = getattr(numbers, table)
        declared = {column.name: column.dtype for column in declared_columns(table) if column.dtype}
        for name, dtype in frame.dtypes.items():
            assert str(dtype) in {"string", "Int64", "Float64", "boolean", "datetime64[us, UTC]"}, (table, name)
            assert str(dtype) == declared.get(name, str(dtype))
    kinds = {name: str(numbers.cells.dtypes[f"config.{name}"]) for name in ("rank", "alpha", "targets")}
    assert kinds == {"rank": "Int64", "alpha": "Float64", "targets": "string"}


def test_every_column_is_documented_with_its_unit(numbers: Numbers) -> None:
    for table in TABLES:
        described = numbers.columns[numbers.columns["table"] == table]
        assert described["column"].tolist() == getattr(numbers, table).columns.tolist()
        assert described["dtype"].tolist() == [str(dtype) for dtype in getattr(numbers, table).dtypes]
    assert numbers.columns["meaning"].str.len().min() > 4
    units = dict(zip(numbers.columns["column"], numbers.columns["unit"], strict=True))
    assert set(numbers.columns["unit"].dropna()) == {"s", "B", "1", "1/s", "J", "W", "Hz", "°C"}
    for column, unit in units.items():  # a name that ends in a unit must not say another
        stem = column.partition(".")[0] if column.startswith("phase_") else column
        if stem.endswith(("_s", "_B")) and not stem.endswith("tokens_per_s"):
            assert unit == stem[-1], column


def test_a_run_of_today_has_every_declared_column(smoke: tuple[Finished, store.Run]) -> None:
    _, run = smoke
    numbers = harness.load(run.path)
    assert len(numbers.cells) == len(run.records)
    assert numbers.cells["environment.torch"].notna().all()
    trained = numbers.cells[numbers.cells["training.steps"] > 0]
    assert trained[["step_s", "tokens_per_s", "accuracy", "device", "provider_version"]].notna().all(axis=None)
    assert numbers.left_out == ()


# ---- several runs, attempts that failed


def test_cells_that_failed_are_rows_without_numbers(tmp_path: Path) -> None:
    failure = Failure(kind="OutOfMemoryError", message="no room", phase="train", requested_B=2**40, last_peak_B=2**30)

    def change(name: str, record: Record) -> Record:
        return recorded_run.failed(record, Status.OOM, failure=failure) if name == "fused" else record

    run = recorded_run.write_run(tmp_path / "run", change=change)
    numbers = harness.load(run.path)
    row = cell(numbers.cells, FUSED.cell_id)
    assert (row["status"], row["because"]) == ("oom", "the worker raised RuntimeError")
    assert (row["failure.kind"], row["failure.requested_B"]) == ("OutOfMemoryError", 2**40)
    measured = ("accuracy", "scored_by", "parameters.", "memory.", "training_peak", "step_", "tokens_per_s")
    assert [name for name in row if name.startswith(measured) and not pd.isna(row[name])] == []
    for frame in (numbers.samples, numbers.items):
        assert FUSED.cell_id not in set(frame["cell_id"])
        assert len(set(frame["cell_id"])) == 9


def test_no_speed_of_what_failed_a_check(tmp_path: Path) -> None:
    def red(name: str) -> Record:
        good = recorded_run.record("fused", FUSED)
        check = good.checks[0].model_copy(update={"check": name, "outcome": Outcome.FAIL})
        return good.model_copy(update={"checks": [*good.checks, check]})

    for check, merged_alone in (("lora/gradient/float32/warm", False), ("lora/merge/float32/trained", True)):
        record = red(check)
        folder = tmp_path / check.replace("/", "-")
        run = recorded_run.write_run(folder, only=["fused"], change=lambda *_, record=record: record)
        numbers = harness.load(run.path)
        row = cell(numbers.cells, FUSED.cell_id)
        assert pd.isna(row["step_s"]) is not merged_alone
        assert pd.isna(row["tokens_per_s"]) is not merged_alone
        refused = numbers.samples[numbers.samples["no_speed"].notna()]
        assert set(refused["no_speed"]) == {no_merged_speed(record)}
        marked = {(s.kind, s.variant if isinstance(s.variant, str) else "") for s in refused.itertuples()}
        merged, all_adapted = {("latency_forward", "merged")}, {("latency_forward", "unmerged"), ("step_seconds", "")}
        assert marked == (merged if merged_alone else merged | all_adapted)


def test_only_the_newest_attempt_is_marked_as_the_one_that_counts(tmp_path: Path) -> None:
    second = recorded_run.record("fused", FUSED, attempt=2)
    run = recorded_run.write_run(
        tmp_path / "run", extra=[second], change=lambda name, r: recorded_run.failed(r) if name == "fused" else r
    )
    cells = harness.load(run.path).cells
    mine = cells[cells["cell_id"] == FUSED.cell_id]
    assert mine[["attempt", "status", "latest"]].values.tolist() == [[1, "error", False], [2, "ok", True]]
    assert cells["latest"].sum() == 10


def test_several_runs_are_distinguished_and_a_copy_counts_once(tmp_path: Path) -> None:
    first = recorded_run.write_run(tmp_path / "first", run="first")
    other = recorded_run.write_run(tmp_path / "other", run="other", only=["fused"])
    shutil.copytree(first.path, tmp_path / "copy")
    numbers = harness.load(first.path, str(other.path), tmp_path / "copy")
    assert numbers.cells["run"].value_counts().to_dict() == {"first": 10, "other": 1}
    assert not numbers.samples.duplicated(["run", "cell_id", "attempt", "kind", "variant", "index"]).any()
    assert numbers.left_out == ()


def test_config_keys_of_mixed_types_are_text_and_long_numbers_stay_exact(tmp_path: Path) -> None:
    seed = 2**63
    knobs = ({"a": True, "b": 1, "c": "x", "d": 2**60 + 1, "rank": "all"}, {"a": False, "b": 2.5, "c": 1, "d": None})
    cells = [FUSED.model_copy(update={"config": config, "seed": seed + i}) for i, config in enumerate(knobs)]
    run = recorded_run.write_run(
        tmp_path / "run", only=["fused"], cells=cells, change=lambda *_: None,
        extra=[recorded_run.record("fused", one) for one in cells],
    )  # fmt: skip
    made = harness.load(run.path).cells
    kinds = {"config.a": "boolean", "config.b": "Float64", "config.c": "string", "config.d": "Int64", "seed": "string"}
    assert {name: str(made.dtypes[name]) for name in kinds} == kinds
    assert made["config.c"].tolist() == ["x", "1"]
    assert made["config.d"][0] == 2**60 + 1
    assert made["seed"].tolist() == [str(seed), str(seed + 1)]
    assert made["rank"].isna().all()


# ---- what is not whole


def test_a_torn_file_is_left_out_and_named_and_the_rest_is_there(tmp_path: Path) -> None:
    shutil.copytree(REAL, tmp_path / "run")
    torn = tmp_path / "run" / "cells" / f"{ZERO_SHOT}.1.json"
    torn.write_bytes(torn.read_bytes()[:-100])
    with pytest.warns(UserWarning, match="left out: ") as warned:
        numbers = harness.load(tmp_path / "run")
    assert [str(w.message) for w in warned] == [f"left out: {what}" for what in numbers.left_out]
    assert {w.filename for w in warned} == {__file__}
    assert len(numbers.cells) == 9
    assert ZERO_SHOT not in set(numbers.items["cell_id"])
    assert f"{torn.name} cannot be read: not a complete Record" in numbers.left_out[0]
    assert "zero-shot" in numbers.left_out[1]
    assert numbers.left_out[1].endswith("has no Record")
    assert "2 left out" in repr(numbers)


def test_a_record_that_was_changed_is_left_out_and_named(tmp_path: Path) -> None:
    run = recorded_run.write_run(tmp_path / "run")
    path = store.RunFolder(run.path).record_path(FUSED.cell_id, 1)
    path.write_text(path.read_text().replace('"duration_s"', '"duration_s" '))
    with pytest.warns(UserWarning, match="was changed after the run"):
        numbers = harness.load(run.path)
    assert FUSED.cell_id not in set(numbers.cells["cell_id"])
    assert len(numbers.cells) == 9


@pytest.mark.slow
def test_records_of_one_attempt_that_differ_are_not_mixed(tmp_path: Path) -> None:
    first = recorded_run.write_run(tmp_path / "first", run="one")
    other = recorded_run.write_run(
        tmp_path / "other", run="one", change=lambda n, r: recorded_run.failed(r) if n == "fused" else r
    )
    with pytest.warns(UserWarning, match=f"Record {FUSED.cell_id}.1 differs from the one in another folder"):
        numbers = harness.load(first.path, other.path)
    assert cell(numbers.cells, FUSED.cell_id)["status"] == "ok"


def test_a_run_without_records_has_empty_tables_with_the_same_columns(tmp_path: Path, numbers: Numbers) -> None:
    run = recorded_run.write_run(tmp_path / "run", only=["fused"], change=lambda *_: None, footer=False)
    with pytest.warns(UserWarning, match="has no Record"):
        empty = harness.load(run.path)
    for table in TABLES:
        frame, full = getattr(empty, table), getattr(numbers, table)
        assert len(frame) == 0
        assert frame.dtypes.to_dict() == {name: full.dtypes[name] for name in frame.columns}
    assert "accuracy" in empty.cells.columns


@pytest.mark.slow
def test_an_unknown_run_is_refused_as_by_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="no run 'nowhere'"):
        harness.load("nowhere")
    recorded_run.write_run(store.RUNS / "one", run="one")
    assert len(harness.load("latest").cells) == len(harness.load("on").cells) == 10


@pytest.mark.slow
def test_import_harness_is_light_and_load_needs_no_torch() -> None:
    code = (
        "import sys, harness\n"
        "assert not {'pandas', 'numpy', 'torch', 'pydantic'} & set(sys.modules)\n"
        "harness.load(sys.argv[1])\n"
        "print(sorted({'pandas', 'torch', 'transformers', 'peft', 'reference'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(REAL)], capture_output=True, text=True, check=True)
    assert done.stdout == "['pandas']\n"


def test_labels_distinguish_configurations_but_not_seeds(tmp_path: Path) -> None:
    keys = {"peft_type": "LORA", "r": 4}
    configs: list[dict[str, Any]] = [keys, keys | {"bias": "all"}, {"peft_type": "IA3"}]
    peft = {"method": "peft", "implementation": "hf-peft"}
    cells = [FUSED.model_copy(update=peft | {"config": {"adapter_config": one}}) for one in configs]
    cells.append(cells[0].model_copy(update={"seed": 7}))
    notes = ["no reference", "a second; with a semicolon"]
    good = recorded_run.record("fused", FUSED)
    written = [
        good.model_copy(update={"cell": one, "cell_id": one.cell_id, "notes": notes if one is cells[1] else []})
        for one in cells
    ]
    run = recorded_run.write_run(
        tmp_path / "run", only=["fused"], change=lambda *_: None, extra=written, footer=False, cells=cells
    )
    with pytest.warns(UserWarning, match="left out") if run.missing() else contextlib.nullcontext():
        frame = harness.load(run.path).cells
    plain, biased, ia3, again = (cell(frame, one.cell_id) for one in cells)
    assert plain["label"] == again["label"]
    assert len({plain["label"], biased["label"], ia3["label"]}) == 3
    assert biased["label"].endswith(" bias=all")
    assert (plain["rank"], biased["rank"]) == (4, 4)
    assert pd.isna(ia3["rank"])
    assert json.loads(biased["notes"]) == notes
    assert pd.isna(plain["notes"])


def test_the_checks_of_a_shared_gate_are_marked_where_they_are_repeated(tmp_path: Path) -> None:
    def gated(name: str, record: Record) -> Record:
        own = record.checks[:1] if name == "fused" else []
        gate = Gate(key="k", record="" if name == "fused" else f"{fused}.1", checks=len(own))
        return record.model_copy(update={"checks": [*own, *record.checks[1:2]], "gate": gate})

    fused = recorded_run.cells()["fused"].cell_id
    run = recorded_run.write_run(tmp_path / "run", only=["fused", "hf-peft"], change=gated)
    numbers = harness.load(run.path)
    checks = numbers.checks
    assert {len(own) for _, own in checks.groupby("cell_id")} == {2}
    assert checks[checks["cell_id"] == fused]["shared"].tolist() == [False, False]
    assert checks[checks["cell_id"] != fused]["shared"].tolist() == [True, False]
    assert numbers.columns.query("table == 'checks'")["column"].tolist() == list(checks.columns)
