"""Several adapters in one batch: each row is its own adapter's before it is timed; percentiles of what was timed."""

from __future__ import annotations

import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from harness.analysis import tracked_metrics
from harness.analysis.run_facts import analyse
from harness.analysis.statistics.intervals import percentile
from harness.cell.measure import multi_adapter_latency
from harness.conformance.subject import Subject, adaptable_layers, configure
from harness.methods.registry import discover
from harness.records.record import DECODED, Cell, CheckResult, Evaluation, Latency, Outcome, Training
from harness.report import view
from harness.report.export import rows
from support import recorded_run
from support.report_page import row

VOCABULARY = 20
TARGETS = ("q_proj", "k_proj", "down_proj")


@pytest.fixture(autouse=True)
def _one_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multi_adapter_latency, "BLOCKS", 1)


def llama() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=64,
        )
    )  # fmt: skip


def subject_of(
    implementation: str, model: Any, method: str = "lora", targets: tuple[str, ...] = TARGETS, dtype: str = "float32"
) -> Subject:
    knobs = {"rank": 3, "targets": list(targets)} if method != "full" else {}
    config = configure(method, knobs)
    bases, own = adaptable_layers(model, config), list(model.parameters())
    attached = discover().find("method", method, implementation)(model, config, torch.Generator().manual_seed(0))
    with torch.no_grad():
        for tensor in attached.tensors().values():
            tensor.add_(0.1 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1)))
    return Subject(method, config, dtype, model, attached, bases, own)


def cell(implementation: str, method: str = "lora") -> Cell:
    budget: Any = {"training": Training(steps=1), "evaluation": Evaluation(items=1)}
    return Cell(model="m", task="t", method=method, implementation=implementation, **budget)


def measure(subject: Subject, implementation: str, registry: Any = None) -> tuple[list[Latency], list[CheckResult]]:
    asked = cell(implementation, subject.method)
    return multi_adapter_latency.measure(subject, asked, True, VOCABULARY, registry or discover())


@pytest.mark.parametrize("implementation", ["reference", "fused", "hf-peft"])
def test_who_offers_it_is_checked_and_timed_and_left_as_it_was(implementation: str) -> None:
    subject = subject_of(implementation, llama().eval())
    ids = torch.arange(10)[None]
    layers, names = dict(subject.adapted.layers), [name for name, _ in subject.model.named_parameters()]
    with torch.no_grad():
        before = subject.model(input_ids=ids).logits
        found, (check,) = measure(subject, implementation)
        assert torch.equal(subject.model(input_ids=ids).logits, before)
    assert (check.check, check.outcome) == ("lora/multi-adapter/float32/trained", Outcome.PASS)
    assert check.allowed is not None
    assert {(x.variant, x.kind, x.batch, x.adapters) for x in found} == {
        (variant, kind, multi_adapter_latency.ADAPTERS, adapters)
        for variant, adapters in (("unmerged", 1), ("multi-adapter", multi_adapter_latency.ADAPTERS))
        for kind in ("prefill", "decode")
    }
    assert all(len(x.seconds) > 1 and min(x.seconds) > 0 and not x.because for x in found)
    assert {x.tokens for x in found if x.kind == "decode"} == {DECODED}
    assert all(subject.model.get_submodule(path) is layer for path, layer in layers.items())
    assert [name for name, _ in subject.model.named_parameters()] == names


def fake(call: Any) -> Any:
    return SimpleNamespace(find=lambda *_: call)


@pytest.mark.slow
def test_the_rows_are_judged_by_their_own_adapters() -> None:
    """Every way to mix them up is seen, in the last layer too, and no time is told of it."""
    plain = discover().find("operation", "multi_lora_linear", "reference")

    def one_for_all(ids: Any, **rest: Any) -> Any:
        return plain(ids=torch.zeros_like(ids), **rest)

    def turned(ids: Any, **rest: Any) -> Any:
        return plain(ids=ids.flip(0), **rest)

    def unscaled(scalings: Any, **rest: Any) -> Any:
        return plain(scalings=[1.0] * len(scalings), **rest)

    def one_row_wrong(**given: Any) -> Any:
        y = plain(**given)
        return torch.cat([y[:-1], y[-1:] * (1 + 1e-4)])

    for wrong in (one_for_all, turned, unscaled, one_row_wrong):
        found, (check,) = measure(subject_of("reference", llama()), "reference", fake(wrong))
        assert check.outcome is Outcome.FAIL, wrong.__name__
        assert [x.seconds for x in found] == [[], [], [], []]
        assert all(x.because.startswith("no speed without parity: lora/multi-adapter/float32/trained") for x in found)
    _, (check,) = measure(subject_of("reference", llama()), "reference", fake(plain))
    assert check.outcome is Outcome.PASS


class ByKeyword(nn.Module):
    """A model that calls its layer by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up = nn.Embedding(VOCABULARY, 8), nn.Linear(8, VOCABULARY)

    def forward(self, input_ids: Any, use_cache: bool = False) -> Any:
        return SimpleNamespace(
            logits=self.up(**{next(iter(inspect.signature(self.up.forward).parameters)): self.embed(input_ids)})
        )


def test_a_layer_that_is_called_by_keyword_is_said() -> None:
    found, checks = measure(subject_of("reference", ByKeyword(), targets=("up",)), "reference")
    assert checks == []
    assert "up is called by keyword" in found[0].because


@pytest.mark.parametrize(
    "error", [IndexError("row 4"), TypeError("ids?"), ValueError("rank"), torch.OutOfMemoryError("CUDA out of memory")]
)
@pytest.mark.parametrize("after", [0, 40])
def test_what_cannot_mix_loses_no_cell(error: Exception, after: int) -> None:
    """Neither at the check nor, a few calls later, while it is timed."""
    plain, calls = discover().find("operation", "multi_lora_linear", "reference"), [0]

    def broken(**given: Any) -> Any:
        calls[0] += 1
        if calls[0] > after:
            raise error
        return plain(**given)

    subject = subject_of("reference", llama())
    layers = dict(subject.adapted.layers)
    found, (check,) = measure(subject, "reference", fake(broken))
    assert (check.check, check.outcome) == ("lora/multi-adapter/float32/trained", Outcome.SKIPPED)
    assert check.detail == f"could not be tried: {type(error).__name__}: {error}"
    assert {(x.variant, x.adapters, x.because, tuple(x.seconds)) for x in found} == {
        ("unmerged", 1, check.detail, ()), ("multi-adapter", multi_adapter_latency.ADAPTERS, check.detail, ())
    }  # fmt: skip
    assert all(subject.model.get_submodule(path) is layer for path, layer in layers.items())


def test_who_does_not_offer_it_says_why() -> None:
    def because(found: tuple[list[Latency], list[CheckResult]]) -> str:
        latencies, checks = found
        assert checks == []
        assert {(x.variant, x.adapters, tuple(x.seconds)) for x in latencies} == {
            ("unmerged", 1, ()),
            ("multi-adapter", multi_adapter_latency.ADAPTERS, ()),
        }
        (why,) = {x.because for x in latencies}
        return why

    assert because(measure(subject_of("loralib", llama()), "loralib")) == (
        "loralib offers neither multi_lora_linear nor `mixed`"
    )
    for method in ("full", "dora"):
        said = because(measure(subject_of("reference", llama(), method), "reference"))
        assert said.endswith(f"an operation of lora (multi_lora_linear); {method} has none")
    conv = GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_positions=64, n_embd=8, n_layer=1, n_head=2))
    said = because(measure(subject_of("reference", conv, targets=("c_attn",)), "reference"))
    assert said.endswith("takes a dense linear layer; transformer.h.0.attn.c_attn is a Conv1D")


class Flat(nn.Module):
    """A model that lays all tokens of its batch in one row, as some do before their experts."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up = nn.Embedding(VOCABULARY, 8), nn.Linear(8, VOCABULARY)

    def forward(self, input_ids: Any, use_cache: bool = False) -> Any:
        return SimpleNamespace(logits=self.up(self.embed(input_ids).flatten(0, 1)).view(*input_ids.shape, -1))


def test_a_layer_that_cannot_tell_the_rows_apart() -> None:
    found, checks = measure(subject_of("fused", Flat(), targets=("up",)), "fused")
    assert checks == []
    assert "up gets 128 rows for a batch of 4" in found[0].because


@pytest.mark.parametrize(
    ("count", "shown"),
    [(1, {}), (2, {0.5: 1}), (19, {0.5: 10}), (20, {0.5: 10, 0.95: 19}), (100, {0.95: 95, 0.99: 99})],
)
def test_a_percentile_needs_a_sample_beyond_it(count: int, shown: dict[float, float]) -> None:
    samples = [float(i) for i in range(count, 0, -1)]
    found = {share: value for share in (0.5, 0.95, 0.99) if (value := percentile(samples, share)) is not None}
    assert found.items() >= shown.items()
    assert set(found) == {share for share, least in ((0.5, 2), (0.95, 20), (0.99, 100)) if count >= least}


# --- what a reader sees ----------------------------------------------------------------------------------------------


def with_mixed(name: str, made: Any) -> Any:
    """Give two Cells times of several adapters; the second one's check of it is red."""
    if name not in ("fused", "hf-peft"):
        return made
    times = {"batch": 4, "tokens": 32, "kind": "forward"}
    more = [
        Latency(variant="unmerged", seconds=[0.002] * 20, **times),  # type: ignore[arg-type]
        Latency(variant="multi-adapter", seconds=[0.003] * 19 + [0.009] * 2, adapters=4, **times),  # type: ignore[arg-type]
    ]
    measured = made.measurements.model_copy(update={"latency": made.measurements.latency + more})
    outcome = Outcome.PASS if name == "fused" else Outcome.FAIL
    check = CheckResult(check="lora/multi-adapter/float32/trained", outcome=outcome, error=1.0, allowed=2.0)
    return made.model_copy(update={"measurements": measured, "checks": [*made.checks, check]})


def as_told_now(name: str, made: Any) -> Any:
    """Say which batch the mixed one is held against, and time one of its size on its own besides."""
    found = with_mixed(name, made)
    if found is made:
        return made
    *own, one, several = found.measurements.latency
    as_large = [x.model_copy(update={"batch": 4, "tokens": 32, "seconds": [0.007] * 20}) for x in own]
    told = [*as_large, one.model_copy(update={"adapters": 1}), several]
    return found.model_copy(update={"measurements": found.measurements.model_copy(update={"latency": told})})


def test_a_batch_as_large_as_the_mixed_one_is_its_own(tmp_path: Path) -> None:
    run = recorded_run.write_run(tmp_path / "run", change=as_told_now)
    built = view.build([analyse(run)])["runs"][0]
    fused = next(r for r in run.records if r.cell.implementation == "fused" and r.cell.method == "lora")
    shown = row(built["mixed"], fused)
    assert (shown["One for all, ms"]["text"], shown["One each, ms"]["text"]) == ("2.00", "3.00")
    alone = row(built["latency"], fused)
    assert (alone["Pass"]["text"], alone["Unmerged, ms"]["text"]) == ("forward 4 × 32", "7.00")
    asked = fused.cell.evaluation.model_copy(update={"prompt_batch": 4})
    for cell, own, beside in (
        (fused.cell.model_copy(update={"evaluation": asked}), 0.007, 0.002),
        (fused.cell, 0.002, None),  # as histories and baselines have called it
    ):
        times = tracked_metrics.tracked(fused.model_copy(update={"cell": cell})).values
        assert times["latency_s/unmerged/forward/4x32"] == own
        assert times.get("latency_s/unmerged-beside-several/forward/4x32") == beside


def refused(name: str, made: Any) -> Any:
    """As told now, where several adapters cannot be mixed."""
    found = as_told_now(name, made)
    if found is made:
        return made
    *own, one, several = found.measurements.latency
    none = {"seconds": [], "because": "hf-peft offers no multi_lora_linear"}
    told = [*own, one.model_copy(update=none), several.model_copy(update=none)]
    return found.model_copy(update={"measurements": found.measurements.model_copy(update={"latency": told})})


def test_a_batch_as_large_as_one_that_cannot_be_mixed_is_shown(tmp_path: Path) -> None:
    run = recorded_run.write_run(tmp_path / "run", change=refused)
    built = view.build([analyse(run)])["runs"][0]
    fused = next(r for r in run.records if r.cell.implementation == "fused" and r.cell.method == "lora")
    assert row(built["latency"], fused)["Unmerged, ms"]["text"] == "7.00"
    assert row(built["mixed"], fused)["One for all, ms"]["why"] == "hf-peft offers no multi_lora_linear"


def test_the_report_has_them_beside_one_adapter_for_all(tmp_path: Path) -> None:
    run = recorded_run.write_run(tmp_path / "run", change=with_mixed)
    built = view.build([analyse(run)])["runs"][0]
    by_name = {r.cell.implementation: r for r in run.records if r.cell.method == "lora"}
    shown = row(built["mixed"], by_name["fused"])
    assert (shown["Pass"]["text"], shown["Adapters"]["text"]) == ("forward 4 × 32", "4")
    assert (shown["One for all, ms"]["text"], shown["One each, ms"]["text"]) == ("2.00", "3.00")
    assert shown["Each / all"]["text"] == "1.50"
    assert "p95 9.00" in shown["One each, ms"]["small"]
    assert shown["One each, ms"]["why"] == "21 samples; p50 3.00 ms, p95 9.00 ms, no p99 with fewer than 100"
    red = row(built["mixed"], by_name["hf-peft"])
    assert red["One each, ms"]["value"] is red["Each / all"]["value"] is None
    assert "no speed without parity: lora/multi-adapter" in red["One each, ms"]["why"]
    assert red["One for all, ms"]["text"] == "2.00"  # the check of mixing says nothing of one adapter
    assert row(built["latency"], by_name["hf-peft"])["Unmerged, ms"]["value"] is not None
    workloads = {r["fields"][0]["text"] for g in built["latency"]["groups"] for r in g["rows"]}
    assert not any("4 ×" in one for one in workloads)
    samples = [s for s in rows.samples(by_name["hf-peft"]) if s["variant"] == "multi-adapter"]
    assert {(s["latency_adapters"], s["latency_batch"]) for s in samples} == {(4, 4)}
    assert all("multi-adapter" in str(s["no_speed"]) for s in samples)
