"""`peft-harness run smoke`, from the suite to the page: every sample, exact memory, what the report shows."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from html import escape
from pathlib import Path
from typing import Any

import pytest

from harness.assets import fetch
from harness.conformance.tolerance_constants import FOOTPRINT_LEDGER
from harness.errors import Exit
from harness.records import store
from harness.records.record import Outcome, Status
from support.run_records import adds_up, cells, losses, source, trained
from support.sandbox import Finished

PHASES = [
    "start-up", "load", "data", "predict", "attach", "parity", "train", "count", "save", "evaluate", "latency",
]  # fmt: skip


def test_smoke_passes(smoke: tuple[Finished, store.Run]) -> None:
    finished, run = smoke
    assert (finished.code, run.broken, run.missing()) == (Exit.PASS, {}, []), finished.err
    assert [r.status for r in run.records] == [Status.OK] * len(run.manifest.cells)
    assert "pass: both implementations of LoRA compute the same training run" in finished.out
    assert "Traceback" not in finished.err
    assert finished.err.count(" ok ") == len(run.records)  # one line a Cell, and standard output is for the summary
    assert finished.out.splitlines()[-1] == f"report: {Path('run', 'report.html')}"


def test_smoke_peaks_are_as_predicted(smoke: tuple[Finished, store.Run]) -> None:
    """Of every Cell that trains: so nothing of the gate's, such as its copy of the model, is there any more."""
    _, run = smoke
    trained = [r.measurements.memory for r in run.records if r.measurements and r.cell.training.steps]
    assert trained
    for memory in trained:
        assert memory.predicted is not None
        assert memory.predicted.peak_B is not None, memory.predicted.no_peak
        assert memory.counted_peak_B is not None
        assert abs(memory.predicted.peak_B - memory.counted_peak_B) <= FOOTPRINT_LEDGER * memory.counted_peak_B


def test_smoke_report_says_how_torch_was_built(smoke: tuple[Finished, store.Run]) -> None:
    _, run = smoke
    page = (run.path / "report.html").read_text(encoding="utf-8")
    assert "; CPU capability usage: " in page


def test_smoke_report_shows_every_cell(smoke: tuple[Finished, store.Run]) -> None:
    _, run = smoke
    page = (run.path / "report.html").read_text(encoding="utf-8")
    assert [c.cell_id for c in run.manifest.cells if c.cell_id not in page] == []


def test_smoke_keeps_its_suite_as_it_was_read(smoke: tuple[Finished, store.Run]) -> None:
    """The file may be gone or changed when somebody wants to repeat the run."""
    _, run = smoke
    text = run.manifest.suite_text
    assert hashlib.sha256(text.encode()).hexdigest() == run.manifest.suite_sha256
    assert escape(text[:200]) in (run.path / "report.html").read_text(encoding="utf-8")


def test_smoke_footer_adds_up(smoke: tuple[Finished, store.Run]) -> None:
    _, run = smoke
    footer = run.footer
    assert footer is not None
    assert (footer.how, footer.counts, footer.missing) == ("finished", {"ok": len(run.records)}, [])
    assert adds_up(footer)
    assert footer.seconds_in_cells >= sum(r.duration_s for r in run.records)


def test_smoke_phases_come_in_order(smoke: tuple[Finished, store.Run]) -> None:
    for record in smoke[1].records:
        trained = record.cell.training.steps > 0
        assert [p.name for p in record.phases] == [p for p in PHASES if trained or p not in ("train", "count")]
        assert all(p.peak_memory_B and p.end_memory_B for p in record.phases)
        inside = sum(p.seconds for p in record.phases)
        assert inside <= record.duration_s


def test_smoke_keeps_every_sample(smoke: tuple[Finished, store.Run]) -> None:
    for record in cells(smoke[1]):
        assert record.measurements is not None
        training = record.measurements.training
        assert training is not None
        steps, batch = record.cell.training.steps, record.cell.training.batch
        for samples in (training.losses, training.step_seconds, training.tokens, training.gradient_norms):
            assert len(samples) == steps
        assert all(s > 0 for s in training.step_seconds)
        assert 0 < training.timing_warmup < steps
        for real, padded in zip(training.tokens, training.padded_tokens, strict=True):
            assert batch < real <= padded <= batch * record.cell.training.max_tokens
            assert padded % batch == 0
        assert sum(training.tokens) < sum(training.padded_tokens)
        assert sum(training.step_seconds) < next(p.seconds for p in record.phases if p.name == "train")
    orders = {(*trained(r).tokens, trained(r).data_order_sha256) for r in cells(smoke[1])}
    assert len(orders) == 1  # the same data, in the same order, for every implementation and dtype
    starts: dict[str, set[str]] = {}
    for record in cells(smoke[1]):
        starts.setdefault(record.cell.dtype, set()).add(trained(record).initial_state_sha256)
    assert sorted(map(len, starts.values())) == [1, 1]
    assert all(re.fullmatch("[0-9a-f]{64}", one) for one in set.union(*starts.values()))


def test_smoke_says_how_busy_the_machine_was(smoke: tuple[Finished, store.Run]) -> None:
    for record in smoke[1].records:
        assert all(p.load_start is not None and p.load_end is not None for p in record.phases[1:])
        variables = record.environment.extra["variables"]
        assert isinstance(variables, dict)
        assert variables.get("OMP_WAIT_POLICY") == os.environ.get("OMP_WAIT_POLICY")
    for record in cells(smoke[1]):
        training = trained(record)
        assert training.cpu_seconds is not None
        assert record.environment.threads is not None
        # No thread can have run for longer than the clock; what other threads than torch's do is little.
        assert 0 < training.cpu_seconds < sum(training.step_seconds) * (record.environment.threads + 1)
        assert training.optimizer["name"] == "AdamW"


def _adapted_shapes(model: Path, targets: list[str]) -> list[tuple[int, int]]:
    config = json.loads((model / "config.json").read_text())
    hidden, inner, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    narrow = hidden // heads * config["num_key_value_heads"]
    shapes = {"q_proj": (hidden, hidden), "v_proj": (hidden, narrow), "down_proj": (inner, hidden)}
    return [shapes[name] for name in targets] * config["num_hidden_layers"]


def test_smoke_ledger_is_exact(smoke: tuple[Finished, store.Run], cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFT_HARNESS_CACHE", str(cache))
    model = fetch.ensure(source("tiny-llama"))
    for record in cells(smoke[1]):
        assert record.measurements is not None
        memory, counted = record.measurements.memory, record.measurements.parameters
        shapes = _adapted_shapes(model, record.cell.config["targets"])  # type: ignore[arg-type]
        rank: Any = record.cell.config["rank"]
        assert counted.adapter == counted.trainable == rank * sum(sum(shape) for shape in shapes)
        size = {"float32": 4, "float64": 8}[record.cell.dtype]
        assert memory.adapter_B == memory.gradients_B == size * counted.adapter
        # Two moments, and for each tensor (an A and a B a layer) the counter of steps, which torch keeps in float32.
        assert memory.optimizer_B == 2 * size * counted.adapter + 4 * 2 * len(shapes)
        # Weights and the rotary frequencies, which stay float32 and are kept twice.
        frozen = size * (counted.total - counted.adapter)
        assert memory.weights_B >= frozen
        assert memory.weights_B - frozen < 4 * 2 * model_head_size(model)
        # At one time there were at least all of these; and no more than them and what texts as long as can be would keep.
        assert memory.counted_peak_B is not None
        assert memory.predicted is not None
        taken = memory.weights_B + memory.adapter_B + memory.gradients_B + memory.optimizer_B
        assert taken < memory.counted_peak_B < memory.predicted.total_B
    (untrained,) = cells(smoke[1], "frozen")
    assert untrained.measurements is not None
    ledger = untrained.measurements.memory
    assert (ledger.adapter_B, ledger.gradients_B, ledger.optimizer_B) == (0, 0, 0)
    assert ledger.counted_peak_B is None
    assert untrained.measurements.parameters.trainable == 0


def model_head_size(model: Path) -> int:
    config = json.loads((model / "config.json").read_text())
    return int(config["hidden_size"] // config["num_attention_heads"])


def test_smoke_times_base_unmerged_and_merged(smoke: tuple[Finished, store.Run]) -> None:
    for record in smoke[1].records:
        assert record.measurements is not None
        found = {(m.variant, m.kind): m for m in record.measurements.latency if m.batch == 1}
        assert set(found) == {(v, k) for v in ("base", "unmerged", "merged") for k in ("prefill", "decode")}
        for (variant, _), latency in found.items():
            if record.cell.method == "frozen" and variant != "base":
                assert latency.seconds == []
                assert latency.because
            else:
                assert len(latency.seconds) > 1
                assert min(latency.seconds) > 0


def test_smoke_scores_the_same_items(smoke: tuple[Finished, store.Run]) -> None:
    ids = set()
    for record in smoke[1].records:
        assert record.measurements is not None
        accuracy = record.measurements.accuracy
        assert accuracy is not None
        assert len(accuracy.items) == len({i.id for i in accuracy.items}) == record.cell.evaluation.items
        assert {i.correct for i in accuracy.items} <= {0, 1}
        assert accuracy.value == sum(i.correct for i in accuracy.items) / len(accuracy.items)
        assert 0 <= accuracy.low < accuracy.value < accuracy.high <= 1
        assert accuracy.scored_by.startswith("lm-eval ")
        ids.add(tuple(i.id for i in accuracy.items))
    assert len(ids) == 1


def test_smoke_names_code_data_and_checks(smoke: tuple[Finished, store.Run]) -> None:
    _, run = smoke
    for record in run.records:
        assert record.environment.id == run.manifest.environment.id
        assert record.environment.code_version == run.manifest.environment.code_version
        assert record.environment.software["torch"]
        build = record.environment.extra["torch_build"]
        assert any(line.startswith("CPU capability usage: ") for line in build)
        assert not any("settings" in line or line.endswith(":") for line in build)
        assert len(record.environment.extra["torch_commit"]) == 40
        assert all(re.fullmatch("[0-9a-f]{64}", asset.sha256) for asset in record.assets)
        assert [asset.name for asset in record.assets] == ["tiny-llama", "toy-sentiment", "toy-sentiment"]
        assert record.provider is not None
        assert record.provider.distribution == "peft-harness"
        assert Counter(c.outcome for c in record.checks)[Outcome.PASS] >= 3


def test_every_implementation_starts_from_the_same_loss(smoke: tuple[Finished, store.Run]) -> None:
    first = {r.cell.implementation: losses(r)[0] for r in cells(smoke[1]) if r.cell.dtype == "float32"}
    assert set(first) == {"reference", "fused"}
    assert len(set(first.values())) == 1
