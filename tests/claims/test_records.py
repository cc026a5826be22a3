"""Claims that Records decide: what measures make of made Records, and which Records they take."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from harness.analysis.statistics.process_runs import FEWEST
from harness.claims import claim_file, record_sources, worker
from harness.claims.claim import Claim, MeasureRequest
from harness.claims.judge import ClaimVerdict, JudgedClaim, Missing, judge
from harness.claims.measure import MeasureResult, NotRunError
from harness.claims.measures import learning_rates, times, training_results
from harness.claims.measures import records as measures
from harness.claims.printed_number import Dimension, Rounding, parse
from harness.cli import main
from harness.errors import Exit
from harness.records.cost import GpuPhase
from harness.records.memory import Predicted
from harness.records.record import Cell, Latency, Outcome, Phase, Record, Status
from harness.suites import loader
from harness.suites.expand import Plan
from support import recorded_run
from support.recorded_run import MIB

BASELINE = 410 * MIB
Recorded = Callable[..., Path]


def changed(record: Record, **parts: Any) -> Record:
    """Return a Record with other measurements, e.g. `training={"step_seconds": [...]}`."""
    m = record.measurements
    assert m is not None
    deeper = {
        key: getattr(m, key).model_copy(update=value) if isinstance(value, dict) else value
        for key, value in parts.items()
    }
    return record.model_copy(update={"measurements": m.model_copy(update=deeper)})


def peaking(record: Record, mebibytes: int) -> Record:
    """Return a Record whose training took so much above what its imports take."""
    peak = BASELINE + mebibytes * MIB
    phases = [p.model_copy(update={"peak_memory_B": peak}) if p.name == "train" else p for p in record.phases]
    return record.model_copy(update={"phases": phases})


def cell(seed: int = 0, name: str = "fused", **fields: Any) -> Cell:
    return recorded_run.cells(seed)[name].model_copy(update=fields)


def several(share: Sequence[float], name: str = "fused") -> list[Record]:
    """Return a Record for each seed with this accuracy."""
    return [
        recorded_run.with_accuracy(recorded_run.record(name, cell(seed, name)), one) for seed, one in enumerate(share)
    ]


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorded]:
    """Write a run of a suite with these entries, and let measures find it."""

    def write(name: str = "one", *, footer: bool = True, **entries: Sequence[Record]) -> Path:
        every = [record for side in entries.values() for record in side]
        records = [r.model_copy(update={"run": name}) for r in every]
        asked = [record.cell for record in records]
        ids = {record.cell_id: entry for entry, side in entries.items() for record in side}
        recorded_run.write_run(
            tmp_path / name, run=name, suite="made", cells=asked, change=lambda *_: None, extra=records, footer=footer,
            started=f"2026-01-0{len(list(tmp_path.iterdir())) + 1}T09:00:00Z",
        )  # fmt: skip
        suite = SimpleNamespace(
            about="", entries=[SimpleNamespace(id=one) for one in entries], plan=Plan(tuple(asked), ids, ())
        )
        monkeypatch.setattr(record_sources, "_read", lambda _: suite)
        record_sources.look_in(path for path in tmp_path.iterdir() if path.is_dir())
        return tmp_path / name

    yield write
    record_sources.look_in([])


def judged(
    found: MeasureResult | Missing,
    printed: str,
    dimension: Dimension = "ratio",
    tier: Any = "gpu-synthetic",
    rule: Any = "nearest",
) -> JudgedClaim:
    figure = None if dimension == "property" else parse(printed, dimension)
    rounding = Rounding("about", Fraction(1, 50)) if rule == "about" else Rounding(rule)
    claim = Claim(
        "id",
        "It is so.",
        "paper",
        "v1",
        "Table 1",
        tier,
        printed,
        dimension,
        MeasureRequest("m", {}),
        figure,
        rounding,
        scale="small scale" if tier == "trained" else "",
    )
    return judge(claim, [found])


@pytest.mark.parametrize(
    ("least", "most", "printed", "rule", "verdict"),
    [
        ("1.1", "1.9", "< 2x", "nearest", ClaimVerdict.REPRODUCED),
        ("1.9", "2.1", "< 2x", "nearest", ClaimVerdict.INCONCLUSIVE),
        ("2", "2.1", "< 2x", "nearest", ClaimVerdict.NOT_REPRODUCED),
        ("0.99", "1.01", "1x", "about", ClaimVerdict.REPRODUCED),
        ("0.97", "1.01", "1x", "about", ClaimVerdict.INCONCLUSIVE),
        ("0.9", "1.1", "1x", "about", ClaimVerdict.INCONCLUSIVE),
        ("1.03", "1.1", "1x", "about", ClaimVerdict.NOT_REPRODUCED),
        ("2.6", "3.4", "3x", "nearest", ClaimVerdict.REPRODUCED),
        ("2.6", "3.6", "3x", "nearest", ClaimVerdict.INCONCLUSIVE),
    ],
)
def test_an_interval_is_judged_by_all_of_it(
    least: str, most: str, printed: str, rule: str, verdict: ClaimVerdict
) -> None:
    assert judged(MeasureResult(Fraction(least), "", Fraction(most)), printed, rule=rule).verdict is verdict


def test_both_ends_of_an_interval_must_come_out_under_one_reading() -> None:
    """47.9 GB is below 48 GB, and 51 GB is below 48 GiB: read as GiB, all of it is."""
    row = judged(MeasureResult(47_900_000_000, "", 51_000_000_000), "< 48 GB", "bytes")
    assert (row.verdict, row.under) == (ClaimVerdict.UNDER, "GB read as GiB")


def test_the_peak_of_several_seeds_is_an_interval_above_the_imports(runs: Recorded) -> None:
    runs(a=[peaking(r, m) for r, m in zip(several([0.8] * 3), (300, 320, 310), strict=True)])
    found = measures.peak_memory("made", "a")
    assert (found.value, found.most) == (300 * MIB, 320 * MIB)
    assert "Example 4-core" in found.how


@pytest.mark.parametrize(
    ("held", "counted", "most", "verdict", "said"),
    [
        (320, None, 320, ClaimVerdict.REPRODUCED, "without CUDA's context"),
        (320, 420, 420, ClaimVerdict.INCONCLUSIVE, f"driver counted {420 * MIB:,} B, with CUDA's context"),
        (450, 420, 450, ClaimVerdict.INCONCLUSIVE, f"allocator held {450 * MIB:,} B"),
        (None, None, None, ClaimVerdict.REPRODUCED, "without CUDA's context"),
    ],
)
def test_a_gpu_has_enough_if_all_that_was_taken_of_it_is_below(
    runs: Recorded, held: int | None, counted: int | None, most: int | None, verdict: ClaimVerdict, said: str
) -> None:
    """Tensors take 300 MiB of the 400 that are there."""
    record = peaking(recorded_run.record("fused", cell()), 300)
    gpu = GpuPhase(reserved_B=held and held * MIB, driver_B=counted and counted * MIB)
    phases = [phase.model_copy(update={"gpu": gpu}) for phase in record.phases]
    runs(a=[record.model_copy(update={"phases": phases})])
    found = measures.device_memory("made", "a")
    assert (found.value, found.most) == (300 * MIB, most and most * MIB)
    assert judged(found, "< 400 MiB", "bytes").verdict is verdict
    assert said in found.how


def test_a_ratio_of_peaks_is_as_wide_as_both_leave_open(runs: Recorded) -> None:
    left = [peaking(r, m) for r, m in zip(several([0.8] * 2), (300, 360), strict=True)]
    right = [peaking(r, m) for r, m in zip(several([0.8] * 2, "hf-peft"), (100, 120), strict=True)]
    runs(a=left, b=right)
    assert measures.memory_ratio("made", "a", "b").value == Fraction(300, 120)
    assert measures.memory_ratio("made", "a", "b").most == Fraction(360, 100)
    assert measures.memory_less("made", "b", "a").value == 1 - Fraction(120, 300)
    assert measures.memory_more("made", "a", "b").value == 180 * MIB


def timed(name: str, seconds: list[float], processes: int = 1) -> list[Record]:
    """Return a Record of each of so many processes, all with these times of steps, of which two are warm-up."""
    training = {"step_seconds": seconds, "timing_warmup": 2}
    records = [changed(recorded_run.record(name, cell(seed, name)), training=training) for seed in range(processes)]
    phases = [Phase(name="train", seconds=sum(seconds))]
    return [record.model_copy(update={"phases": phases}) for record in records]


def test_a_ratio_of_step_times_has_the_order_statistics_of_both(runs: Recorded) -> None:
    """Of ten samples the second and the ninth cover the median at 97.9 %, the third and the eighth at 89.1 % only."""
    steps = [9.0, 9.0, *range(1, 11)]  # two steps of warm-up
    runs(a=timed("fused", steps, 3), b=timed("hf-peft", [2.0] * 12, 3))
    found = times.step_time_ratio("made", "a", "b")
    assert (found.value, found.most) == (1, Fraction(9, 2))
    more = times.step_time_more("made", "a", "b")
    assert (more.value, more.most) == (0, Fraction(7, 2))


def test_a_step_and_what_it_trains_on_in_a_second_are_as_uncertain_as_processes_differ(runs: Recorded) -> None:
    """Steps of 2 and of 4 s with 100 and with 400 tokens: rates of 50 and 100, whatever the warm-up did."""
    steps, tokens = [9.0, 9.0] + [2.0, 4.0] * 6, [1, 1] + [100, 400] * 6
    one = changed(
        recorded_run.record("fused", cell()), training={"step_seconds": steps, "tokens": tokens, "timing_warmup": 2}
    )
    runs(a=[one])
    for found, median, least, most in (
        (times.step_time("made", "a"), 3, 2, 4),
        (times.throughput("made", "a"), 75, 50, 100),
    ):
        factor = math.exp(1.959964 * 0.05)
        assert [float(found.value), float(found.most or 0)] == pytest.approx([least / factor, most * factor])
        assert "one process, so" in found.how
        assert judged(found, str(median), "number", rule="about").verdict is ClaimVerdict.INCONCLUSIVE


def test_tokens_a_second_are_written_as_such() -> None:
    assert parse("32.5 tokens/s", "rate").number == Fraction(65, 2)
    assert judged(MeasureResult(Fraction(3251, 100), "counted"), "32.5 tokens/s", "rate").ours == "32.51 tokens/s"
    for other in ("32.5 s", "32.5"):
        with pytest.raises(ValueError, match="the measure is in rate; write it as one of: tokens/s"):
            parse(other, "rate")


@pytest.mark.parametrize(("processes", "verdict"), [(1, ClaimVerdict.INCONCLUSIVE), (3, ClaimVerdict.REPRODUCED)])
def test_one_process_each_is_too_few_to_decide_by_some_per_cent(
    runs: Recorded, processes: int, verdict: ClaimVerdict
) -> None:
    runs(a=timed("fused", [2.0] * 12, processes), b=timed("hf-peft", [2.0] * 12, processes))
    found = times.step_time_ratio("made", "a", "b")
    assert judged(found, "1x", rule="about").verdict is verdict
    assert ("widened by an assumed deviation of 5 %" in found.how) == (processes == 1)


def test_of_few_processes_a_ratio_is_as_wide_as_these_are_taken_to_differ(runs: Recorded) -> None:
    """1.96 standard errors, of 5 % for one process and of 5 % over the root of two for two, in logs."""
    half = 1.959964 * math.sqrt(0.05**2 + 0.05**2 / 2)
    runs(a=timed("fused", [6.0] * 12), b=timed("hf-peft", [2.0] * 12, 2))
    for found, off in (
        (times.step_time_ratio("made", "a", "b"), 0),
        (times.step_time_more("made", "a", "b"), 1),
        (times.phase_ratio("made", "train", "a", "b"), 0),
    ):
        assert found.most is not None
        ends = [float(found.value) + off, float(found.most) + off]
        assert ends == pytest.approx([3 * math.exp(-half), 3 * math.exp(half)])


def test_times_of_a_machine_that_others_used_decide_nothing(runs: Recorded) -> None:
    beside = recorded_run.record("fused", cell()).model_copy(
        update={"notes": ["up to 2 Cells ran at once: its times share it"]}
    )
    starved = changed(recorded_run.record("hf-peft", cell(name="hf-peft")), training={"cpu_seconds": 0.1})
    runs(beside=[beside], starved=[starved])
    for entry, why in (("beside", "other Cells ran at the same time"), ("starved", "s of CPU time per second")):
        with pytest.raises(NotRunError, match=rf"other work affected its times \(.*{why}.*\); run .* with --jobs 1"):
            times.step_time_ratio("made", entry, entry)
        with pytest.raises(NotRunError, match="other work affected its times"):
            times.throughput("made", entry)
        with pytest.raises(NotRunError, match="other work affected its times"):
            times.latency_ratio("made", entry, "merged", "base", "forward")
        with pytest.raises(NotRunError, match="other work affected its times"):
            times.phase_ratio("made", "train", entry, entry)
        assert measures.memory_ratio("made", entry, entry).value == 1


def test_too_few_steps_have_no_interval_and_decide_nothing(runs: Recorded) -> None:
    few = {"step_seconds": [1.0] * 8, "timing_warmup": 3}
    runs(a=[changed(recorded_run.record("fused", cell()), training=few)])
    with pytest.raises(NotRunError, match=r"5 timed steps of .* too few for an interval at 95 %"):
        times.step_time_ratio("made", "a", "a")
    runs(
        "stopped",
        a=[changed(recorded_run.record("fused", cell()), training={"step_seconds": [0.0] * 12, "tokens": [5] * 12})],
    )
    with pytest.raises(NotRunError, match="took 0 s by the clock"):
        times.throughput("made", "a")


def test_latencies_are_compared_within_one_process(runs: Recorded) -> None:
    def passes(variant: Any, seconds: list[float]) -> Latency:
        return Latency(variant=variant, kind="forward", batch=1, tokens=32, seconds=seconds)

    latency = [passes("base", [2.0] * 12), passes("merged", [2.0] * 6 + [3.0] * 6)]
    runs(a=[changed(recorded_run.record("fused", cell()), latency=latency)])
    found = times.latency_ratio("made", "a", "merged", "base", "forward")
    assert (found.value, found.most) == (1, Fraction(3, 2))
    with pytest.raises(NotRunError, match="not timed unmerged"):
        times.latency_ratio("made", "a", "unmerged", "base", "forward")


def test_a_merge_that_computes_something_else_has_no_latency(runs: Recorded) -> None:
    good = recorded_run.record("fused", cell())
    red = [c.model_copy(update={"outcome": Outcome.FAIL}) if "/merge/" in c.check else c for c in good.checks]
    runs(a=[good.model_copy(update={"checks": red})])
    with pytest.raises(NotRunError, match="no speed without parity"):
        times.latency_ratio("made", "a", "merged", "base", "forward")
    assert times.latency_ratio("made", "a", "unmerged", "base", "forward").value > 1


def of_shape(model: str, name: str = "fused") -> Record:
    return recorded_run.record(name, cell(name=name, model=f"shape:{model}"))


def test_depths_extrapolate_by_lines_and_their_disagreement_is_told(runs: Recorded) -> None:
    peaks = {"llama-7b/1-block": 1000, "llama-7b/2-blocks": 1400, "llama-7b/3-blocks": 1790}
    one, two, three = (peaking(of_shape(model), peak) for model, peak in peaks.items())
    runs(one=[one], two=[two], three=[three])
    assert measures.extrapolated_memory("made", ["one", "two"]).value == (1000 + 31 * 400) * MIB
    found = measures.extrapolated_memory("made", ["three", "one", "two"])  # in any order
    assert (found.value, found.most) == ((1400 + 30 * 390) * MIB, (1000 + 31 * 400) * MIB)


def test_depths_of_other_models_or_configs_are_refused(runs: Recorded) -> None:
    other = recorded_run.record("lora-r1", cell(name="lora-r1", model="shape:llama-7b/2-blocks"))
    runs(one=[of_shape("llama-7b/1-block")], wide=[of_shape("llama-13b/2-blocks")], rank=[other])
    for second in ("wide", "rank"):
        with pytest.raises(ValueError, match="must differ only in the number of blocks"):
            measures.extrapolated_memory("made", ["one", second])


def test_bytes_that_grow_with_parameters_are_scaled_exactly(runs: Recorded) -> None:
    """Three bytes a parameter in the blocks and five outside, of a narrow Llama; then of a wider one, counted by formula."""

    def sizes(d: int, f: int) -> tuple[int, int]:
        return 4 * d * d + 3 * d * f + 2 * d, 2 * 32000 * d + d

    block, rest = sizes(512, 1376)
    nothing = Predicted(weights_B=0, adapter_B=0, gradients_B=0, optimizer_B=0, step_B=7)

    def counted(blocks: int, model: str) -> Record:
        whole = {"weights_B": 3 * blocks * block + 5 * rest - 7, "predicted": nothing}
        return changed(of_shape(model), memory=whole | {"adapter_B": 0, "gradients_B": 0, "optimizer_B": 0})

    short, long = (
        recorded_run.record(
            "fused", cell(model="shape:galore-130m", training=cell().training.model_copy(update={"max_tokens": t}))
        )
        for t in (40, 80)
    )
    one, two = counted(1, "galore-60m/1-block"), counted(2, "galore-60m/2-blocks")
    runs(one=[one], two=[two], short=[short], long=[long])
    wide, outside = sizes(768, 2048)
    few, many = (measures.scaled_memory("made", ["one", "two"], "made", whole) for whole in ("short", "long"))
    assert few.value == many.value == 3 * 12 * wide + 5 * outside
    assert few.most is not None
    assert many.most is not None
    logits = 16 * 40 * 32000 * 3 * 4  # themselves, their logarithms and the gradient of these, of a batch of 16
    assert few.most - few.value > logits
    assert many.most - many.value == 2 * (few.most - few.value)
    assert "16 x 40 tokens; without CUDA's context" in few.how


def test_a_rehearsal_of_another_recipe_is_refused(runs: Recorded) -> None:
    nothing = Predicted(weights_B=0, adapter_B=0, gradients_B=0, optimizer_B=0)
    one, two = (changed(of_shape(f"galore-60m/{n}-blocks"), memory={"predicted": nothing}) for n in (1, 2))
    other = recorded_run.record("fused", cell(model="shape:galore-130m", dtype="bfloat16", optimizer="adamw-8bit"))
    runs(one=[one], two=[two], other=[other])
    with pytest.raises(ValueError, match=r"is not a rehearsal of .*: different dtype, optimizer"):
        measures.scaled_memory("made", ["one", "two"], "made", "other")


@pytest.mark.parametrize(("rank", "each_B"), [(8, 4 + 8), (256, 4)])
def test_a_paged_optimizer_leaves_masters_and_small_tensors_states_on_the_gpu(
    runs: Recorded, rank: int, each_B: int
) -> None:
    """Of 12 bytes a number 4 are float32 masters and 8 are moments, which are paged of 256 x 512 numbers and not of 8 x 512.

    Beside them each tensor has a count of steps in 4 bytes.
    """
    nothing = Predicted(weights_B=0, adapter_B=0, gradients_B=0, optimizer_B=0, step_B=0)
    fields = {"dtype": "bfloat16", "optimizer": "paged-adamw"}
    one, two = (
        changed(
            recorded_run.record("fused", cell(model=f"shape:galore-60m/{n}-blocks", **fields)),
            memory={"predicted": nothing, "weights_B": 0, "adapter_B": 0, "gradients_B": 0, "optimizer_B": 12 * MIB},
        )
        for n in (1, 2)
    )
    config = {"rank": rank, "alpha": 16, "targets": ["q_proj"]}
    runs(
        one=[one],
        two=[two],
        whole=[recorded_run.record("fused", cell(model="shape:galore-60m", config=config, **fields))],
    )
    found = measures.scaled_memory("made", ["one", "two"], "made", "whole")
    assert found.value == 8 * 2 * (each_B * rank * 512 + 4)
    with pytest.raises(ValueError, match="pages its optimizer"):
        measures.scaled_memory_ratio("made", ["one", "two"], ["one", "two"], "galore-60m")


def test_what_cost_unequal_budgets_is_not_compared(runs: Recorded) -> None:
    longer = cell(training=cell().training.model_copy(update={"batch": 32}))
    runs(a=[recorded_run.record("fused", cell())], b=[recorded_run.record("fused", longer)])
    with pytest.raises(ValueError, match="not comparable: batch 16 against 32"):
        measures.memory_ratio("made", "a", "b")


def test_a_cell_that_ran_out_of_memory_is_no_verdict(runs: Recorded) -> None:
    runs(a=[recorded_run.failed(recorded_run.record("fused", cell()), Status.OOM)])
    with pytest.raises(NotRunError, match="ran out of memory on Example 4-core, run one"):
        measures.peak_memory("made", "a")


def test_without_records_the_command_is_told_and_the_machine() -> None:
    with pytest.raises(NotRunError) as caught:
        measures.peak_memory("headline-gpu", "qlora-65b")
    assert "`peft-harness run headline-gpu`, then `peft-harness claims --run latest`" in str(caught.value)
    assert "For one GPU of 80 GB" in str(caught.value)


def test_the_newest_complete_run_decides(runs: Recorded) -> None:
    runs("old", a=[peaking(recorded_run.record("fused", cell()), 100)])
    runs("new", a=[peaking(recorded_run.record("fused", cell()), 200)])
    runs("broken-off", a=[peaking(recorded_run.record("fused", cell()), 300)], footer=False)
    assert measures.peak_memory("made", "a").value == 200 * MIB


def test_an_entry_of_several_recipes_is_refused(runs: Recorded) -> None:
    runs(a=[recorded_run.record(name, cell(name=name)) for name in ("fused", "lora-r1")])
    with pytest.raises(ValueError, match="differ in more than their seed"):
        measures.peak_memory("made", "a")


OWN_SUITE = """\
suite: my-own
matrix:
  - id: small
    model: tiny-llama
    task: toy-sentiment
    method: lora
    implementation: fused
    dtype: float32
    config: {rank: 4}
    training: {steps: 2, batch: 2, max_tokens: 16, lr: 1e-3}
    evaluation: {items: 20}
"""
OWN_CLAIM = """\
paper: mine
title: Mine
version: v1
claims:
  - id: one
    sentence: It takes {printed}.
    source: Table 1
    tier: gpu-synthetic
    printed: 200 MiB
    rounding: {about: 2%}
    measure: peak_memory
    with: {suite: SUITE, cell: CELL}
"""


def own_claim(folder: Path, suite: str, entry: str) -> str:
    """Write a claim file in a folder of its own, beside that of the suite; return its path."""
    (folder / "papers").mkdir(parents=True, exist_ok=True)
    (folder / "mine.yaml").write_text(OWN_SUITE)
    file = folder / "papers" / "claims.yaml"
    file.write_text(OWN_CLAIM.replace("SUITE", suite).replace("CELL", entry))
    return str(file)


@pytest.mark.slow
def test_a_claim_of_ones_own_is_judged_by_a_suite_of_ones_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = own_claim(tmp_path, "../mine.yaml", "small")
    assert main(["claims", "--file", file]) == Exit.NOTHING_COMPARED
    assert f"peft-harness run {tmp_path / 'mine.yaml'}" in " ".join(capsys.readouterr().out.split())
    (one,) = loader.load(tmp_path / "mine.yaml").plan.cells
    record = peaking(recorded_run.record("fused", one), 200)
    recorded_run.write_run(
        tmp_path / "run", run="own", suite="my-own", cells=[one], change=lambda *_: None, extra=[record]
    )
    assert main(["claims", "--file", file, "--run", str(tmp_path / "run"), "--json"]) == Exit.PASS
    (judged,) = json.loads(capsys.readouterr().out)["claims"]
    assert judged["verdict"] == "reproduced"


@pytest.mark.parametrize(
    ("suite", "entry", "said"),
    [
        ("../mine.yaml", "smal", "has no entry `smal`; did you mean `small`?"),
        ("../none.yaml", "small", "none.yaml; write the path of a suite, relative to the claim file"),
        ("claims-smal", "small", "unknown suite `claims-smal`; did you mean `claims-small`?"),
        ("claims-small", "small", "the suite claims-small has no entry `small`"),
    ],
)
def test_an_entry_that_is_not_there_is_a_mistake_of_the_claim_file(
    suite: str, entry: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["claims", "--file", own_claim(tmp_path, suite, entry)]) == Exit.USAGE
    err = " ".join(capsys.readouterr().err.split())
    assert said in err
    assert "claims.yaml:12: " in err


HIGH, LOW, TORN = [0.80, 0.81, 0.80, 0.81, 0.80], [0.70, 0.71, 0.70, 0.71, 0.70], [0.60, 0.95, 0.62, 0.93, 0.75]


@pytest.mark.parametrize(
    ("of", "than", "higher", "no_lower"),
    [
        (HIGH, LOW, ClaimVerdict.REPRODUCED, ClaimVerdict.REPRODUCED),
        (LOW, HIGH, ClaimVerdict.INCONCLUSIVE, ClaimVerdict.INCONCLUSIVE),
        (HIGH, TORN, ClaimVerdict.INCONCLUSIVE, ClaimVerdict.INCONCLUSIVE),
    ],
)
def test_scores_over_seeds_support_a_paper_or_leave_it_open(
    runs: Recorded, of: list[float], than: list[float], higher: ClaimVerdict, no_lower: ClaimVerdict
) -> None:
    runs(a=several(of), b=several(than, "lora-r1"))
    for measure, verdict in ((training_results.scores_higher, higher), (training_results.scores_no_lower, no_lower)):
        row = judged(measure("made", "a", "b"), "better", "property", tier="trained")
        assert row.verdict is verdict
        assert verdict is ClaimVerdict.REPRODUCED or "does not refute the paper" in row.why


def test_equal_scores_are_no_lower_and_not_higher(runs: Recorded) -> None:
    same = several(HIGH)
    twins = [r.model_copy(update={"cell": (c := cell(r.cell.seed, "hf-peft")), "cell_id": c.cell_id}) for r in same]
    runs(a=same, b=twins)
    assert training_results.scores_no_lower("made", "a", "b") == MeasureResult(
        True, training_results.scores_no_lower("made", "a", "b").how
    )
    assert training_results.scores_higher("made", "a", "b").value is False
    assert judged(training_results.scores_higher("made", "a", "b"), "better", "property").ours == "undecided"


def test_differences_of_scores_are_told_in_hundredths_of_a_point(runs: Recorded) -> None:
    """Of floats an equal mean may leave a difference of 1e-17."""
    shares = [0.1, 0.2, 0.3, 0.4, 0.5]
    runs(a=several(shares), b=several(shares[::-1], "lora-r1"))
    said = training_results.scores_higher("made", "a", "b").how
    assert re.search(r"accuracy 30\.0 % and 30\.0 %, difference \+0\.00 \[-\d+\.\d\d, \+\d+\.\d\d\] points", said)


def test_a_loss_that_falls_faster_in_every_seed_is_told(runs: Recorded) -> None:
    def falling(name: str, by: float) -> list[Record]:
        own = [recorded_run.record(name, cell(seed, name)) for seed in range(5)]
        return [recorded_run.with_losses(r, [1 - by * t - 0.001 * r.cell.seed for t in range(60)]) for r in own]

    runs(fast=falling("fused", 0.004), slow=falling("lora-r1", 0.002))
    found = training_results.loss_falls_faster("made", "fast", "slow")
    assert (found.value, found.most) == (True, None)
    assert "0.8800 and 0.9390" in found.how  # 1 - 29.5 x 0.004 - 0.002, 1 - 29.5 x 0.002 - 0.002
    assert training_results.loss_falls_faster("made", "slow", "fast").value is False


RATES = [1e-4, 3e-4, 1e-3, 5e-3, 1e-2]


def searched(best: Sequence[float], name: str = "fused", rates: Sequence[float] = RATES) -> list[list[Record]]:
    """Return, for each learning rate, a Record per seed. The last losses are a parabola with its vertex at `best[seed]`."""

    def trained(rate: float, seed: int) -> Record:
        own = cell(seed, name)
        own = own.model_copy(update={"training": own.training.model_copy(update={"lr": rate})})
        loss = math.log(rate / best[seed]) ** 2
        return recorded_run.with_losses(recorded_run.record(name, own), [9.0 - loss] * 40 + [1.0 + loss] * 20)

    return [[trained(rate, seed) for seed in range(len(best))] for rate in rates]


def rate_ratio(
    runs: Recorded, of: Sequence[Sequence[Record]], to: Sequence[Sequence[Record]]
) -> tuple[MeasureResult, list[str], list[str]]:
    sides = [{f"{side}{n}": records for n, records in enumerate(found)} for side, found in (("a", of), ("b", to))]
    runs(**sides[0], **sides[1])
    names = [list(side) for side in sides]
    return learning_rates.best_rate_ratio("made", *names), *names


def test_the_ratio_of_best_learning_rates_is_found_between_the_rates(runs: Recorded) -> None:
    found, *_ = rate_ratio(runs, searched([2.1e-3, 2.2e-3, 2.0e-3]), searched([2.1e-4, 2.2e-4, 2.0e-4], "lora-r1"))
    assert found.most is not None
    assert [format(one, ".6g") for one in (found.value, found.most)] == ["10", "10"]
    assert judged(found, "10x", tier="trained", rule="magnitude").verdict is ClaimVerdict.REPRODUCED
    assert "best rates 0.0021 and 0.00021" in found.how


def test_seeds_that_disagree_about_the_best_rate_leave_the_ratio_open(runs: Recorded) -> None:
    found, *_ = rate_ratio(runs, searched([7e-4, 2e-3, 6e-3]), searched([2e-4, 2e-4, 2e-4], "lora-r1"))
    assert found.most is not None
    assert found.value < 3 < 30 < found.most
    assert judged(found, "10x", tier="trained", rule="magnitude").verdict is ClaimVerdict.INCONCLUSIVE


@pytest.mark.parametrize(("best", "end"), [(1e-4, "lowest"), (2e-2, "highest")])
def test_a_best_rate_at_the_end_of_the_list_needs_another_rate(best: float, end: str, runs: Recorded) -> None:
    with pytest.raises(NotRunError, match=f"at the {end} learning rate, .* add a (low|high)er one to the suite"):
        rate_ratio(runs, searched([2e-3, best]), searched([2e-4, 2e-4], "lora-r1"))


def test_rates_that_are_no_search_are_refused(runs: Recorded) -> None:
    right = searched([2e-3, 2e-3]), searched([2e-4, 2e-4], "lora-r1")
    _, of, to = rate_ratio(runs, *right)
    with pytest.raises(ValueError, match="from the lowest to the highest"):
        learning_rates.best_rate_ratio("made", of[::-1], to)
    with pytest.raises(ValueError, match="differ in more than the learning rate"):
        learning_rates.best_rate_ratio("made", [of[0], to[2], of[4]], to)


def test_sides_with_other_seeds_are_refused(runs: Recorded) -> None:
    runs(a=several(HIGH), b=several(LOW[:3], "lora-r1"))
    with pytest.raises(ValueError, match=r"seeds \[0, 1, 2, 3, 4\] and b \[0, 1, 2\]"):
        training_results.scores_higher("made", "a", "b")


def test_what_a_refresh_adds_at_most_is_spread_over_its_gap(runs: Recorded) -> None:
    galore = recorded_run.record("fused", cell())
    own = galore.cell.model_copy(update={"config": {"update_gap": 50}})
    galore = galore.model_copy(update={"cell": own, "cell_id": own.cell_id})
    runs(a=[changed(galore, training={"step_seconds": [12.0, *[2.0] * 9], "timing_warmup": 3})])
    found = times.refresh_share("made", "a")
    assert (found.value, found.most) == (0, Fraction(10, 100))  # (12 - 2) / 50 / 2
    assert judged(found, "< 20%", "share").verdict is ClaimVerdict.REPRODUCED
    assert judged(found, "< 10%", "share").verdict is ClaimVerdict.INCONCLUSIVE


def test_arithmetic_does_not_go_on_with_one_end_of_an_interval(runs: Recorded) -> None:
    runs(a=[peaking(r, m) for r, m in zip(several([0.8] * 2), (300, 320), strict=True)])
    peak = {"measure": "peak_memory", "with": {"suite": "made", "cell": "a"}}
    said = worker.answer({"measure": "ratio", "with": {"of": peak, "to": 2}})
    assert said["failed"]
    assert "`peak_memory` returns a range" in said["missing"]


def _requests(claim: Claim) -> list[MeasureRequest]:
    """Return every request of a claim, nested ones too."""
    found, left = [], [claim.request, *(reading.request for reading in claim.otherwise)]
    while left:
        one = left.pop()
        found.append(one)
        left += [value for value in one.arguments.values() if isinstance(value, MeasureRequest)]
    return found


@pytest.mark.slow
def test_every_cell_that_a_claim_names_is_in_its_suite() -> None:
    asked = {
        (one.arguments[suite], entry)
        for claim in claim_file.load(claim_file.paths(claim_file.names()))
        for one in _requests(claim)
        if "suite" in one.arguments
        for suite, keys in (("suite", ("cell", "of", "to", "than", "cells")), ("whole_suite", ("whole",)))
        for key in keys
        if (value := one.arguments.get(key)) and value not in ("merged", "unmerged", "base")
        for entry in (value if isinstance(value, list) else [value])
    }
    suites = {"headline-gpu", "headline-rehearsal", "claims-small", "learning-rates", "learning-rates-of-ranks"}
    assert {suite for suite, _ in asked} == suites
    wrong = []
    for suite, entry in sorted(asked):
        try:
            record_sources._cells(suite, entry)
        except ValueError as error:
            wrong.append(str(error))
    assert not wrong


@pytest.mark.slow
def test_what_is_measured_says_how_near_it_must_come() -> None:
    """By digits 3.99x would come out as 3x, cut off; a limit such as `< 48 GB` needs no margin."""
    loose = [
        claim.id
        for claim in claim_file.load(claim_file.paths(claim_file.names()))
        if claim.tier != "exact" and claim.figure and not claim.figure.relation
        if claim.request.measure != "undecidable" and claim.rounding.rule not in ("about", "magnitude")
    ]
    assert not loose


@pytest.mark.slow
def test_steps_that_are_compared_to_a_few_per_cent_have_enough_processes() -> None:
    """Of fewer, an interval is as wide as processes are taken to differ, which is more than these claims allow."""
    few = [
        (claim.id, entry)
        for claim in claim_file.load(claim_file.paths(claim_file.names()))
        for one in _requests(claim)
        if one.measure in ("step_time_ratio", "step_time_more") and one.arguments["suite"] == "headline-gpu"
        for key in ("of", "to", "than")
        if (entry := one.arguments.get(key)) and len(record_sources._cells("headline-gpu", entry)) < FEWEST
    ]
    assert not few


FILE = """\
paper: made
title: A paper
version: v1
claims:
  - id: fewer
    sentence: It trains few.
    source: Table 1
    tier: trained
    printed: 368,640
    measure: trained_parameters
    with: {suite: claims-small, cell: vera}
"""


@pytest.mark.slow
def test_a_named_run_decides_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = record_sources._read("claims-small").plan
    cells = [one for one in plan.cells if plan.ids[one.cell_id] == "vera"]
    records = [_ok(one) for one in cells]
    recorded_run.write_run(tmp_path / "run", suite="claims-small", cells=cells, change=lambda *_: None, extra=records)
    (tmp_path / "made.yaml").write_text(FILE, encoding="utf-8")
    code = main(["claims", "--file", str(tmp_path / "made.yaml"), "--run", str(tmp_path / "run"), "--json"])
    (row,) = json.loads(capsys.readouterr().out)["claims"]
    assert (code, row["verdict"], row["ours"]) == (0, "reproduced", "368,640")


def _ok(own: Cell) -> Record:
    good = recorded_run.record("fused", cell(own.seed))
    return good.model_copy(update={"cell": own, "cell_id": own.cell_id})
