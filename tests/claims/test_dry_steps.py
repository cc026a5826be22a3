"""Claims of memory that are rehearsed by a training step without data, at the whole shape."""

from __future__ import annotations

import pytest

from harness.claims import record_sources
from harness.claims.measure import NotRunError
from harness.claims.measures import dry_steps
from harness.claims.measures.records import predicted
from harness.memory_model import dry_step, isolated_step

pytestmark = pytest.mark.slow

SUITE = "headline-gpu"


@pytest.fixture(autouse=True)
def _anew() -> None:
    dry_steps._peak.cache_clear()


@pytest.mark.nightly
def test_a_step_s_peak_is_that_of_the_cell_at_its_whole_shape() -> None:
    found = dry_steps.step_peak(SUITE, "speed-lora")
    cell = record_sources.cell(SUITE, "speed-lora")
    config = {**dry_steps.shape_of(cell)[0]}
    assert (
        found.value
        == isolated_step.peak(cell, config, "causal", dry_step.longest_batches(cell, "causal", 512))["peak_B"]
    )
    assert config["num_hidden_layers"] == 8
    assert found.value > predicted(cell).weights_B


@pytest.mark.nightly
def test_what_is_paged_is_not_on_the_device() -> None:
    found, cell = dry_steps.step_peak(SUITE, "qlora-7b"), record_sources.cell(SUITE, "qlora-7b")
    peak, _ = dry_steps._peak(SUITE, "qlora-7b")
    assert found.value == peak - predicted(cell).optimizer_host_B < peak


@pytest.mark.nightly
def test_an_encoder_has_its_new_head() -> None:
    assert dry_steps.shape_of(record_sources.cell(SUITE, "deberta-lora-r1"))[1] == "encoder"
    more = dry_steps.step_peak_more(SUITE, "deberta-adalora-r1", "deberta-lora-r1")
    assert more.value > 0
    assert dry_steps.step_peak_more(SUITE, "deberta-lora-r1", "deberta-adalora-r1").value == -more.value


def test_why_there_is_no_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isolated_step, "peak", lambda *_: {"no_peak": "it took too long"})
    with pytest.raises(NotRunError, match="it took too long"):
        dry_steps.step_peak(SUITE, "speed-lora")
    with pytest.raises(NotRunError, match="has its weights in files"):
        dry_steps.step_peak("claims-small", "lora")
