"""Accuracy over several training runs: interval, test, ranking, and their presentation."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, variance

import pytest

from harness.analysis import ranking, run_verdict
from harness.analysis.run_facts import analyse
from harness.analysis.statistics import intervals, over_seeds, seed_spread
from harness.analysis.verdict_kind import VerdictKind
from harness.records.manifest import Comparison, Tuning
from harness.records.record import Accuracy, Cell, Evaluation, Item, Record, Status
from harness.records.store import Run
from harness.report import html, terminal
from support import recorded_run
from support.report_page import Page

SEEDS = (0, 1, 2)


def accuracy(right: list[int]) -> Accuracy:
    items = [Item(id=f"i{k}", correct=c) for k, c in enumerate(right)]
    return Accuracy(
        metric="acc", scored_by="harness", value=fmean(right), low=0.0, high=1.0, interval="none", items=items
    )


def test_items_and_seeds_add_up() -> None:
    left = [accuracy([1, 1, 0, 1]), accuracy([1, 0, 0, 1])]
    right = [accuracy([0, 1, 0, 0]), accuracy([0, 0, 0, 1])]
    found = over_seeds.difference(left, right)
    assert found is not None
    differences = [1.0, 0.0, 0.0, 0.5]
    parts = [variance(differences) / 4, variance([0.75, 0.5]) / 2, variance([0.25, 0.25]) / 2]
    assert found.value == fmean(differences)
    assert found.error**2 == pytest.approx(sum(parts))
    assert found.df == pytest.approx(sum(parts) ** 2 / (parts[0] ** 2 / 3 + parts[1] ** 2))
    low, high = found.interval
    assert found.value - low == pytest.approx(high - found.value)
    assert (found.p < 1 - intervals.LEVEL) == (low > 0 or high < 0)


def test_other_items_and_equal_runs() -> None:
    same = [accuracy([1, 0, 1]), accuracy([1, 0, 1])]
    assert over_seeds.difference(same, [accuracy([1, 0]), accuracy([1, 0])]) is None
    nothing = over_seeds.difference(same, same)
    assert nothing is not None
    assert (nothing.value, nothing.error, nothing.p) == (0.0, 0.0, 1.0)


def _arm(rng: random.Random, hard: list[float], skill: float, spread: float) -> list[Accuracy]:
    """Return a run per seed: each has a skill of its own around the method's."""
    runs = []
    for _ in SEEDS:
        own = skill + rng.gauss(0, spread)
        runs.append(accuracy([int(rng.random() < min(1.0, max(0.0, own + h))) for h in hard]))
    return runs


@pytest.mark.nightly
def test_favourable_seeds_are_not_taken_for_a_better_method() -> None:
    """Two equal methods whose runs differ by 2 points: a test over items alone would call one better far too often."""
    rng, n, trials = random.Random(0), 300, 300
    by_both = by_items = 0
    for _ in range(trials):
        hard = [rng.uniform(-0.2, 0.2) for _ in range(n)]
        left, right = (_arm(rng, hard, 0.7, 0.04) for _ in range(2))
        found = over_seeds.difference(left, right)
        assert found is not None
        by_both += found.p <= 1 - intervals.LEVEL
        only = [run.answers for run in (left[0], right[0])]
        table = [sum(only[s][i] > only[1 - s][i] for i in only[0]) for s in (0, 1)]
        by_items += intervals.mcnemar(*table) <= 1 - intervals.LEVEL
    assert intervals.wilson(by_both, trials)[0] <= 1 - intervals.LEVEL
    assert intervals.wilson(by_items, trials)[0] > 1 - intervals.LEVEL


@pytest.mark.nightly
def test_a_detectable_difference_is_found_and_a_third_of_it_mostly_not() -> None:
    rng, n, trials = random.Random(1), 300, 150
    hard = [rng.uniform(-0.2, 0.2) for _ in range(n)]
    first = over_seeds.difference(_arm(rng, hard, 0.6, 0.01), _arm(rng, hard, 0.6, 0.01))
    assert first is not None

    def found(gap: float) -> float:
        pairs = (
            over_seeds.difference(_arm(rng, hard, 0.6 + gap, 0.01), _arm(rng, hard, 0.6, 0.01)) for _ in range(trials)
        )
        return fmean(pair is not None and pair.p <= 1 - intervals.LEVEL for pair in pairs)

    assert found(first.detectable) > 1 / 2 > found(first.detectable / 3)


def _exact(value: float) -> Accuracy:
    """Return an accuracy without uncertainty from its items, so that only the seeds vary. Its unit is not a share."""
    items = [Item.model_construct(id=name, correct=value) for name in ("a", "b")]
    return Accuracy.model_construct(metric="acc", scored_by="harness", value=value, items=items)


def _group(rng: random.Random, skills: Sequence[float], seeds: int, width: float) -> list[list[Accuracy]]:
    """Draw recipes with these skills, each with a spread over seeds of its own: 2 times a lognormal of this width."""
    spreads = [2 * math.exp(rng.gauss(0, width)) for _ in skills]
    return [[_exact(rng.gauss(s, spread)) for _ in range(seeds)] for s, spread in zip(skills, spreads, strict=True)]


def _separated(group: list[list[Accuracy]], *, moderated: bool = True) -> set[int]:
    """Return the recipes that a ranking separates from the best."""
    prior = seed_spread.prior(group) if moderated else None
    first, *others = sorted(range(len(group)), key=lambda n: -fmean(run.value for run in group[n]))
    found = {n: over_seeds.difference(group[first], group[n], (prior, prior)) for n in others}
    pairs = len(group) * (len(group) - 1) // 2
    adjusted = intervals.holm({str(n): one.p for n, one in found.items() if one}, pairs)
    return {int(n) for n, p in adjusted.items() if p <= 1 - intervals.LEVEL}


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("recipes", "seeds", "width"),
    [
        (seed_spread.FEWEST, seed_spread.FEWEST_SEEDS, 0.7),
        (seed_spread.FEWEST, 3, 1.2),
        (8, 3, 0.0),
        (8, 5, 0.7),
        (12, 3, 1.2),
    ],
)
def test_moderated_spreads_make_no_false_order(recipes: int, seeds: int, width: float) -> None:
    rng, trials = random.Random(f"{recipes} {seeds} {width}"), 1_200
    false = sum(bool(_separated(_group(rng, [0.0] * recipes, seeds, width))) for _ in range(trials))
    assert intervals.wilson(false, trials)[0] <= 1 - intervals.LEVEL


@pytest.mark.slow
def test_moderated_spreads_find_more() -> None:
    rng, trials = random.Random(3), 300
    groups = [_group(rng, [0.0] * 7 + [-10.0], 3, 0.7) for _ in range(trials)]
    moderated, alone = (sum(7 in _separated(group, moderated=m) for group in groups) for m in (True, False))
    assert intervals.wilson(moderated, trials)[0] > 1.5 * intervals.wilson(alone, trials)[1]


def test_spreads_that_do_not_differ_are_one_and_few_recipes_tell_nothing() -> None:
    group = _group(random.Random(4), [0.0] * seed_spread.FEWEST, 3, 0.7)
    assert seed_spread.prior(group) is not None
    assert seed_spread.prior(group[1:]) is None
    assert seed_spread.prior([runs[:2] for runs in group]) is None
    assert seed_spread.prior([*group[1:], group[0][:2]]) is None
    steady = [[accuracy([1] * (70 + k % 3) + [0] * (30 - k % 3)) for k in (n, n + 1, n + 2)] for n in range(6)]
    prior = seed_spread.prior(steady)
    assert prior is not None
    pooled = fmean(variance([run.value for run in runs]) for runs in steady)
    assert (prior.df, prior.moderated(0.0, 2)) == (math.inf, (pooled, 12.0))
    assert prior.moderated(1.0, 2) == (1.0, 12.0)  # a variance above the moderated one is not shrunk


def test_equal_seeds_are_not_taken_for_no_spread_at_all() -> None:
    equal = [accuracy([1, 0, 1, 0])] * 3
    other = [[accuracy([1, 0, 1, 0]), accuracy([1, 1, 1, 0]), accuracy([0, 0, 1, 0])] for _ in range(5)]
    prior = seed_spread.prior([equal, *other])
    alone, moderated = over_seeds.mean(equal), over_seeds.mean(equal, prior)
    assert alone is not None
    assert moderated is not None
    assert alone.error < moderated.error


# ---- ranking


def _cells(*names: str, seeds: tuple[int, ...] = SEEDS) -> list[tuple[str, Cell]]:
    every = recorded_run.cells()
    return [(name, every[name].model_copy(update={"seed": seed})) for name in names for seed in seeds]


def _run(folder: Path, cells: list[tuple[str, Cell]], crashed: tuple[str, ...] = (), **manifest: object) -> Run:
    """Write a run of several seeds; crashed: cell_ids with a failed Record."""
    records: list[Record] = []
    for name, cell in cells:
        good = recorded_run.record(name, cell)
        share = good.measurements.accuracy.value if good.measurements and good.measurements.accuracy else 0.0
        good = recorded_run.with_accuracy(good, share + 0.004 * (cell.seed % 3 - 1))
        records.append(recorded_run.failed(good, Status.OOM) if cell.cell_id in crashed else good)
    return recorded_run.write_run(
        folder, only=["head"], cells=[cell for _, cell in cells], change=lambda *_: None, extra=records,
        **manifest,
    )  # fmt: skip


def test_seeds_of_a_recipe_are_one_place_in_the_ranking(tmp_path: Path) -> None:
    (group,) = ranking.groups(_run(tmp_path / "r", _cells("full", "reference", "head")))
    assert [(e.record.cell.method, len(e.records), e.standing) for e in group.ranked] == [
        ("full", 3, "best"),
        ("lora", 3, "tied"),
        ("frozen", 3, "below"),
    ]
    assert group.seeds == SEEDS
    assert group.basis == "seeds"
    best, lora, _ = group.ranked
    assert best.score.value == pytest.approx(fmean(a.value for a in ranking.accuracies(best.records)))
    assert lora.difference == pytest.approx(lora.score.value - best.score.value)
    assert group.detectable is not None


def test_a_recipe_that_lacks_a_seed_is_not_ranked_with_the_others(tmp_path: Path) -> None:
    cells = _cells("full", "reference")
    found = ranking.groups(_run(tmp_path / "r", cells, crashed=(cells[-1][1].cell_id,)))
    assert [[(e.record.cell.method, len(e.records)) for e in g.ranked] for g in found] == [[("full", 3)], [("lora", 2)]]
    page = Page(html.render([analyse(_run(tmp_path / "again", cells, crashed=(cells[-1][1].cell_id,)))])).text
    assert "No other recipe has the same budget and the same seeds" in page


def test_better_over_seeds_is_judged_by_the_interval_of_the_difference(tmp_path: Path) -> None:
    cells = _cells("full", "reference", "head")
    ids = {name: [c.cell_id for n, c in cells if n == name] for name, _ in cells}

    def better(left: str, right: str) -> Comparison:
        return Comparison(kind="better", left=ids[left], right=ids[right], says=f"{left} beats {right}")

    run = _run(
        tmp_path / "r", cells, comparisons=[better("full", "head"), better("head", "full"), better("full", "reference")]
    )
    words = [j.verdict.word for j in run_verdict.judge(run).judgements]
    assert words == [VerdictKind.PASS, VerdictKind.FAIL, VerdictKind.INCONCLUSIVE]
    assert "over 3 seeds" in run_verdict.judge(run).judgements[0].verdict.reason
    fewer = Comparison(kind="better", left=ids["full"][:2], right=ids["head"], says="two seeds against three")
    (judged,) = run_verdict.judge(_run(tmp_path / "f", cells, comparisons=[fewer])).judgements
    assert judged.verdict.word is VerdictKind.NOT_RUN
    assert "seeds are not the same" in judged.verdict.reason


def test_terminal_and_page_show_means_with_their_test(tmp_path: Path) -> None:
    run = _run(tmp_path / "r", _cells("full", "reference", "head"))
    lines = "\n".join(terminal.summary(analyse(run)))
    assert "over seeds" in lines
    page = Page(html.render([analyse(run)])).text
    assert "mean over the seeds; interval: 95 % for new items and new seeds" in page
    assert "Each accuracy is the mean of 3 training runs (seeds 0, 1, 2)." in page
    assert "exact McNemar, Holm-adjusted" not in page


# ---- searches for learning rates


def _searched(folder: Path, *, of: tuple[str, ...]) -> Run:
    """Write a run of two recipes, where those `of` have had three learning rates tried."""
    cells = _cells("full", "reference", seeds=(0,))
    tuning = []
    for name, cell in list(cells):
        if name in of:
            evaluation = Evaluation(items=200, skip=1000)
            tries = [
                cell.model_copy(
                    update={
                        "seed": 100,
                        "evaluation": evaluation,
                        "training": cell.training.model_copy(update={"lr": cell.training.lr * factor}),
                    }
                )
                for factor in (0.25, 1, 4)
            ]
            cells += [(name, one) for one in tries]
            tuning.append(Tuning(entry=name, cells=[cell.cell_id], sweep=[c.cell_id for c in tries]))
    return _run(folder, cells, tuning=tuning)


def test_what_a_search_tried_is_shown_and_not_ranked(tmp_path: Path) -> None:
    run = _searched(tmp_path / "r", of=("full", "reference"))
    (group,) = ranking.groups(run)
    assert [e.record.cell.seed for e in group.entries] == [0, 0]
    assert group.tries == 3
    page = Page(html.render([analyse(run)])).text
    assert "Learning rates that were tried" in page
    assert "3 learning rates tried for each" in page
    assert "a try of the search for a learning rate is not ranked" in page


def test_unequal_searches_are_not_ranked_together(tmp_path: Path) -> None:
    found = ranking.groups(_searched(tmp_path / "r", of=("full",)))
    assert [(g.tries, len(g.ranked)) for g in found] == [(3, 1), (0, 1)]


def test_a_search_that_did_not_run_is_not_counted(tmp_path: Path) -> None:
    tried = _searched(tmp_path / "all", of=("full", "reference"))
    sweep = {i for tuning in tried.manifest.tuning for i in tuning.sweep}
    alone = _run(
        tmp_path / "alone",
        [(name, cell) for name, cell in _cells("full", "reference", seeds=(0,)) if cell.cell_id not in sweep],
        tuning=tried.manifest.tuning,
    )
    assert [g.tries for g in ranking.groups(alone)] == [0]
    assert "learning rates tried for each" not in Page(html.render([analyse(alone)])).text


def test_the_tries_alone_show_their_band(tmp_path: Path) -> None:
    whole = _searched(tmp_path / "all", of=("full",))
    sweep = [c for c in whole.manifest.cells if c.cell_id in whole.manifest.tuning[0].sweep]
    run = _run(tmp_path / "alone", [("full", cell) for cell in sweep], tuning=whole.manifest.tuning)
    assert "none is in this run; the best tried: " in Page(html.render([analyse(run)])).text


def test_runs_without_a_mistake_are_not_certain_of_the_next_item() -> None:
    perfect = [accuracy([1] * 50)] * 3
    spread = over_seeds.mean(perfect)
    assert spread is not None
    assert spread.error == 0.0
    records = [
        recorded_run.record("full", cell).model_copy(
            update={
                "measurements": recorded_run.record("full", cell).measurements.model_copy(
                    update={"accuracy": perfect[0]}
                )  # type: ignore[union-attr]
            }
        )
        for _, cell in _cells("full")
    ]
    assert ranking.score(records).low == intervals.wilson(50, 50)[0]


def test_runs_on_other_items_have_no_interval() -> None:
    assert over_seeds.mean([accuracy([1, 0]), accuracy([1, 0, 1])]) is None
