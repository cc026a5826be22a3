"""A/B verdicts from pairs of process runs: what a user reads, what is refused, and what no import may cost."""

from __future__ import annotations

import math
from statistics import NormalDist, median
from typing import Any

import pytest
from scipy.stats import ttest_ind, wilcoxon

from harness.analysis.comparison.pair_ratio import log_ratio
from harness.analysis.statistics import canaries, pair_design, paired, trimmed
from harness.analysis.statistics.pair_design import Design
from harness.analysis.statistics.paired import PairFinding, PairVerdict
from harness.errors import HarnessError, UsageError
from harness.records.record import Record
from support import recorded_run

DESIGN = Design()
SD = 0.013


def spread(n: int, effect: float = 0.0, sd: float = SD) -> list[float]:
    """Return n log ratios at the quantiles of a normal, in an order that is none."""
    ordered = [math.log1p(effect) + NormalDist(0, sd).inv_cdf((k + 0.5) / n) for k in range(n)]
    return ordered[::2] + ordered[1::2]


@pytest.mark.parametrize("pairs", [2, 6, 10, 20])
def test_drift_cancels_in_the_order(pairs: int) -> None:
    for seed in range(20):
        sides = pair_design.order(pairs, seed)
        signs = [1 if side == "B" else -1 for side in sides]
        assert len(sides) == 2 * pairs
        assert {sides[i : i + 2] for i in range(0, len(sides), 2)} == {"AB", "BA"}
        assert sum(sign * when for when, sign in enumerate(signs)) == 0
        if pairs % 4 == 0:
            assert sum(sign * when**2 for when, sign in enumerate(signs)) == 0


def test_the_order_is_drawn_and_can_be_drawn_again() -> None:
    drawn = [pair_design.order(6, seed) for seed in range(40)]
    assert drawn == [pair_design.order(6, seed) for seed in range(40)]
    assert {sides[0] for sides in drawn} == {"A", "B"}
    assert {pair_design.order(2, seed) for seed in range(40)} == {"ABBA", "BAAB"}
    with pytest.raises(UsageError, match="5 pairs to order"):
        pair_design.order(5, 0)


def trained(seconds: list[float], tokens: list[int]) -> Record:
    """Return a Record with these step times and tokens per batch; the first step is warm-up."""
    record = recorded_run.record("fused", recorded_run.cells()["fused"])
    assert record.measurements is not None
    assert record.measurements.training is not None
    changes = {"step_seconds": seconds, "padded_tokens": tokens, "timing_warmup": 1}
    training = record.measurements.training.model_copy(update=changes)
    measured = record.measurements.model_copy(update={"training": training})
    return record.model_copy(update={"measurements": measured})


def test_a_pair_that_trained_on_the_same_batches_is_compared_step_by_step() -> None:
    lengths = [9, 10, 10, 40]
    old = trained([9.0, 1.0, 1.0, 4.0], lengths)
    # Disturbed short steps make the median step four times as long; that of the ratios is of a step that was not.
    new = trained([1.0, 8.0, 2.0, 4.0], lengths)
    assert log_ratio(old, new) == math.log(2)
    assert log_ratio(new, old) == -math.log(2)
    otherwise = trained([1.0, 5.0, 6.0, 8.0], lengths[::-1])
    assert log_ratio(old, otherwise) == math.log(6)  # other batches: median against median


def test_a_side_whose_clock_did_not_move_is_named() -> None:
    with pytest.raises(HarnessError, match="the new side: has no step time above 0 s"):
        log_ratio(trained([1.0, 1.0], [5, 5]), trained([1.0, 0.0], [5, 5]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"first": 5}, "5 pairs"), ({"first": 4}, "4 pairs"), ({"fresh": (10, 15)}, "15 pairs"),
        ({"fresh": ()}, "fresh pairs ()"), ({"fresh": (20, 10)}, "fresh pairs (20, 10)"),
        ({"levels": (0.01,)}, "1 levels for 2 looks"), ({"levels": (0.0, 0.01)}, "a level of 0"),
        ({"levels": (0.6, 0.6)}, "a level of 1.2"), ({"interval": 1.0}, "a level of 1"),
        ({"suspect": -0.1}, "a level of -0.1"),
        ({"slower_by": 0.03}, "margins 0.005, 0.03, 0.03"), ({"suspect_by": 0.02}, "margins 0.02"),
        ({"trim": 0.4}, "0.4 trimmed"),
    ],
)  # fmt: skip
def test_a_design_that_could_not_be_judged_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as refused:
        Design(**changes)
    assert message in refused.value.what
    assert refused.value.hint


def test_the_trimmed_t_is_yuens() -> None:
    """The standard error that scipy gives two samples, of which the other is so narrow and large that it adds nothing."""
    values = [*spread(19), 0.2]
    found = trimmed.trimmed(values, 0.25)
    other = [1e-12 * x for x in spread(2000)]
    theirs = ttest_ind(values, other, equal_var=False, trim=0.25)
    assert float(found.mean / found.error) == pytest.approx(theirs.statistic)
    assert found.df == 9
    assert float(found.mean) == pytest.approx(sum(sorted(values)[5:15]) / 10)
    for end in found.interval(0.95):  # it holds what the t test does not reject
        p = float(found.beyond(float(end)))
        assert 2 * min(p, 1 - p) == pytest.approx(0.05)


def test_hodges_lehmann_and_its_interval() -> None:
    values = [0.01, 0.03, -0.02, 0.015, 0.04, 0.02, 0.005, 0.6]
    middle, interval = trimmed.hodges_lehmann(values, 0.95)
    means = [(values[i] + values[j]) / 2 for i in range(8) for j in range(i, 8)]
    assert middle == pytest.approx(median(means))
    assert interval is not None
    # Just inside its ends the signed-rank test does not reject; just outside it does.
    for end, step in zip(interval, (-1, 1), strict=True):
        inside, outside = (wilcoxon([v - end - side * step * 1e-9 for v in values]).pvalue for side in (-1, 1))
        assert outside <= 1 - 0.95 < inside
    assert trimmed.hodges_lehmann(values[:5], 0.95)[1] is None


@pytest.mark.parametrize(
    ("effect", "word"),
    [
        (0.10, PairFinding.SLOWER),
        (-0.10, PairFinding.FASTER),
        (0.0, PairFinding.SAME),
        (0.004, PairFinding.SAME),
        (0.018, PairFinding.INCONCLUSIVE),
    ],
)
def test_the_fresh_pairs_alone_judge(effect: float, word: PairFinding) -> None:
    # 1.8 % cannot be separated from either margin, 1 % or 3 %, since the pairs of this Cell vary three times as much.
    sd = 3 * SD if word is PairFinding.INCONCLUSIVE else SD
    first = spread(6, 0.2)
    before = paired.decide(first, (), DESIGN)
    assert (before.word, before.stage, before.more) == (PairFinding.INCONCLUSIVE, "first", 10)
    found = paired.decide(first, spread(10, effect, sd) + spread(10, effect, sd), DESIGN)
    assert (found.word, found.stage) == (word, "fresh")
    assert found.sentence.startswith("the same" if word is PairFinding.SAME else word.value)
    for share in (effect, found.effect):
        assert found.interval[0] < share < found.interval[1]
    assert found.mde80 is not None
    assert f"{100 * found.mde80:.1f} %" in found.sentence
    assert found.more == 0


def test_a_cell_that_the_first_pairs_prove_gets_no_more() -> None:
    found = paired.decide(spread(6), spread(10, 0.2), DESIGN)
    assert (found.word, found.stage, found.n, found.more) == (PairFinding.SAME, "first", 6, 0)


def test_a_cell_that_looks_slower_gets_its_fresh_pairs_even_within_the_margin() -> None:
    for stage, n in (("first", 6), ("fresh", 10)):
        found = paired.judge(spread(n, 0.012, SD / 4), DESIGN, stage)  # type: ignore[arg-type]
        assert found.interval[1] < DESIGN.same_within
        assert (found.word, found.more) == (PairFinding.INCONCLUSIVE, 10)
    assert paired.judge(spread(20, 0.012, SD / 4), DESIGN, "fresh").word is PairFinding.SAME


def test_too_wide_is_no_proof_and_calls_for_fresh_pairs() -> None:
    found = paired.judge(spread(6, 0.0, 5 * SD), DESIGN, "first")
    assert (found.word, found.more) == (PairFinding.INCONCLUSIVE, 10)
    again = paired.judge(spread(10, 0.0, 5 * SD), DESIGN, "fresh")
    assert (again.word, again.more) == (PairFinding.INCONCLUSIVE, 10)
    assert "10 fresh pairs decide" in again.sentence
    last = paired.judge(spread(20, 0.0, 5 * SD), DESIGN, "fresh")
    assert (last.word, last.more) == (PairFinding.INCONCLUSIVE, 0)


def test_exchanging_the_sides_exchanges_slower_and_faster() -> None:
    there, back = (paired.judge(spread(10, effect), DESIGN, "fresh") for effect in (0.06, 1 / 1.06 - 1))
    assert (there.word, back.word) == (PairFinding.SLOWER, PairFinding.FASTER)
    assert there.p == pytest.approx(back.p)
    assert (1 + there.effect) * (1 + back.effect) == pytest.approx(1)


def test_a_disturbed_process_does_not_hide_a_slow_down() -> None:
    pairs = spread(10, 0.05)
    pairs[3] -= math.log(1.2)
    assert paired.judge(pairs, DESIGN, "fresh").word is PairFinding.SLOWER
    assert paired.judge(pairs, Design(trim=0.0), "fresh").word is PairFinding.INCONCLUSIVE


def test_a_speed_up_too_good_to_be_true_asks_for_the_work() -> None:
    found = paired.judge(spread(10, -0.6), DESIGN, "fresh")
    assert found.word is PairFinding.FASTER
    assert "same work" in found.sentence
    assert "same work" not in paired.judge(spread(10, -0.06), DESIGN, "fresh").sentence


@pytest.mark.parametrize("effect", [0.0, 0.05])
def test_no_spread_at_all_is_no_verdict(effect: float) -> None:
    # As from one measurement written down again: other seconds, the same ratio but for rounding.
    pairs = [math.log((1 + k) * (1 + effect) / 7) - math.log((1 + k) / 7) for k in range(10)]
    found = paired.judge(pairs, DESIGN, "fresh")
    assert (found.word, found.p, found.mde80) == (PairFinding.INCONCLUSIVE, 1.0, None)
    assert "without any spread" in found.sentence
    assert "time more steps" in found.sentence


@pytest.mark.parametrize(
    ("stage", "n", "planned"), [("first", 8, "6"), ("fresh", 12, "10 or 20"), ("fresh", 6, "10 or 20")]
)
def test_looking_when_none_is_planned_is_refused(stage: pair_design.Stage, n: int, planned: str) -> None:
    with pytest.raises(UsageError, match=f"no look at {n} pairs of the {stage} stage is planned") as refused:
        paired.judge(spread(n), DESIGN, stage)
    assert f"judge {planned} pairs" in refused.value.hint


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_ratio_that_is_no_number_is_refused(value: float) -> None:
    with pytest.raises(HarnessError, match="not finite"):
        paired.judge([*spread(9), value], DESIGN, "fresh")


def test_an_alarm_is_a_p_below_the_level_at_every_look() -> None:
    for n in DESIGN.fresh:
        for effect in (0.0, 0.01, 0.02, 0.025, 0.03, 0.035, 0.04, 0.06):
            found = paired.judge(spread(n, effect), DESIGN, "fresh")
            assert (found.word is PairFinding.SLOWER) == (found.p <= DESIGN.level)


def _with(p: float, stage: pair_design.Stage = "fresh") -> PairVerdict:
    return PairVerdict(PairFinding.INCONCLUSIVE, stage, 0.0, (0.0, 0.0), None, p, 10, None, 0, "")


def test_p_values_are_adjusted_for_all_cells() -> None:
    found = paired.family({"a": _with(0.001), "b": _with(0.01), "c": _with(0.3), "d": _with(0.0001, "first")})
    # Both directions, 4 Cells: p 0.002, 0.02, 0.6, and 1 for the one without fresh pairs.
    assert found == {
        "a": pytest.approx(0.002 * 4), "b": pytest.approx(0.02 * 4 / 2), "c": pytest.approx(0.6 * 4 / 3), "d": 1.0,
    }  # fmt: skip
    assert paired.family({}) == {}


def test_canaries_publish_their_rate_and_close_the_gate() -> None:
    well = canaries.Canaries(2, 40)
    assert not well.closed
    assert well.sentence.startswith("2 of 40 A/A canaries alarmed: 5.0 % [")
    ill = canaries.Canaries(12, 40)
    assert ill.closed
    assert "the gate is closed" in ill.sentence
    assert canaries.Canaries(1, 1000, 1e-5).closed
    assert not canaries.Canaries(0, 2000, 1e-5).closed
    assert "no A/A canaries" in canaries.Canaries(0, 0).sentence
    assert "too few" in canaries.Canaries(1, 1).sentence
    assert "too few" not in well.sentence
    assert not canaries.Canaries(1, 1).closed
    assert canaries.Canaries(1_000, 5_000).closed  # the binomial coefficients of these counts exceed a float
    # At 3 times nominal itself the gate is closed by chance in at most 5 % of the nights, and one alarm less leaves it open.
    least = next(k for k in range(41) if canaries.Canaries(k, 40).closed)
    tail = sum(math.comb(40, k) * 0.15**k * 0.85 ** (40 - k) for k in range(least - 1, 41))
    assert tail - math.comb(40, least - 1) * 0.15 ** (least - 1) * 0.85 ** (41 - least) <= 0.05 < tail
    for counts in ((3, 2, 0.05), (-1, 2, 0.05), (0, 2, 0.0)):
        with pytest.raises(UsageError, match="canaries"):
            canaries.Canaries(*counts)


def test_canaries_are_counted_from_pairs_in_either_direction() -> None:
    pairs = [spread(6), spread(6, 0.05), spread(6, -0.05), [0.0] * 6]
    assert canaries.canaries(pairs, DESIGN.trim) == canaries.Canaries(2, 4)
