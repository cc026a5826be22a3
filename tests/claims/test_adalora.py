"""AdaLoRA's claims: what their measures compute, by hand on small shapes, and what the ledger says of printed figures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from fractions import Fraction
from itertools import combinations
from pathlib import Path

import pytest
import torch

import reference.adalora
from harness.claims import claim_file
from harness.claims.judge import ClaimVerdict, JudgedClaim, judge, plain
from harness.claims.measures import adalora, baselines
from harness.claims.worker import find
from reference.adalora import AdaLoraAdapted, AdaLoraLinear, Config

RTE = {"examples": 2500, "batch": 32, "epochs": 50, "t_i": 600, "t_f": 1800, "rank": 12, "target_rank": 8, "layers": 72}


@pytest.fixture
def shape(tmp_path: Path) -> str:
    path = tmp_path / "config.json"
    config = {
        "model_type": "llama", "vocab_size": 10, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1,
    }  # fmt: skip
    path.write_text(json.dumps(config))
    return str(path)


def verdicts(ids: Sequence[str]) -> dict[str, JudgedClaim]:
    claims = [claim for claim in claim_file.load(claim_file.paths(["adalora"])) if claim.id in ids]
    return {c.id: judge(c, [find(plain(a)) for a in (c.request, *(o.request for o in c.otherwise))]) for c in claims}


def test_what_is_kept_lies_between_the_cheapest_and_the_dearest_triplets(shape: str) -> None:
    found = adalora.kept_parameters(shape, ["q_proj", "k_proj", "up_proj"], rank=2, budget=3)
    each = [inputs + outputs + 1 for inputs, outputs in ((8, 8), (8, 4), (8, 16)) for _ in range(2)]
    sums = [sum(several) for several in combinations(each, 3)]
    assert (found.value, found.most) == (min(sums), max(sums))
    with pytest.raises(ValueError, match="a budget of 7 exceeds the 6 initial triplets; raise `rank`"):
        adalora.kept_parameters(shape, ["q_proj", "k_proj", "up_proj"], rank=2, budget=7)


def test_eq_12_as_printed_begins_too_high_and_ends_too_high() -> None:
    # Of T = 79 x 50 steps 1,550 are between the phases; the printed fraction is shifted by 1,800 of them.
    start, end = (adalora.budget_at(at, "printed", **RTE).value for at in ("t_i", "T - t_f - 1"))  # type: ignore[arg-type]
    assert start == 576 + 288 * Fraction(1550 + 1800, 1550) ** 3
    assert end == 576 + 288 * Fraction(1 + 1800, 1550) ** 3
    assert adalora.budget_at("t_i", "reference", **RTE).value == 864
    assert adalora.budget_at("T - t_f - 1", "reference", **RTE).value == 576


def test_a_schedule_without_a_step_to_prune_in_is_refused() -> None:
    with pytest.raises(ValueError, match="leave no step of 2,370 for pruning; check `epochs` and `batch`"):
        adalora.budget_only_falls(**RTE | {"epochs": 30})


def test_a_budget_that_falls_late_or_early_or_rises_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    assert adalora.budget_only_falls(**RTE).value
    true = reference.adalora.budget

    def late(step: int, config: Config, layers: int) -> int:
        return true(max(0, step - config.tfinal), config, layers)

    def rising(step: int, config: Config, layers: int) -> int:
        return true(step, config, layers) + 50 * (step == 1000)

    def early(step: int, config: Config, layers: int) -> int:
        return true(step + 100, config, layers)

    for wrong in (late, rising, early):
        monkeypatch.setattr(reference.adalora, "budget", wrong)
        assert not adalora.budget_only_falls(**RTE).value


def test_only_the_sum_of_squares_is_eq_4() -> None:
    assert adalora.regularizer_is_eq_4("squared-sum").value
    assert not adalora.regularizer_is_eq_4("mean-norm").value


def test_scores_are_of_the_weights_after_the_update(monkeypatch: pytest.MonkeyPatch) -> None:
    assert adalora.scored_weights_are("after").value
    assert not adalora.scored_weights_are("before").value
    monkeypatch.setattr(reference.adalora, "sensitivity", lambda w, grad: grad.abs())
    assert not adalora.scored_weights_are("after").value


def test_pruning_that_touches_vectors_or_lasts_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    assert adalora.pruned_triplets_recover().value
    true, after_step = AdaLoraLinear.prune, AdaLoraAdapted.after_step

    def vectors_too(layer: AdaLoraLinear) -> None:
        true(layer)
        layer.B.data *= 2

    def forever(adapted: AdaLoraAdapted, step: int) -> None:
        after_step(adapted, step)
        for layer in adapted.adalora.values():
            true(layer)

    with monkeypatch.context() as patched:
        patched.setattr(AdaLoraLinear, "prune", vectors_too)
        assert not adalora.pruned_triplets_recover().value
    monkeypatch.setattr(AdaLoraAdapted, "after_step", forever)
    assert not adalora.pruned_triplets_recover().value


def test_kthvalue_drops_what_ties_with_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    assert adalora.keeps_exactly("reference").value
    assert adalora.keeps_exactly("kthvalue").how.endswith(" 2 remain for a budget of 4")
    monkeypatch.setattr(
        reference.adalora, "largest_mask", lambda scores, count: scores >= torch.topk(scores, count).values[-1]
    )
    assert not adalora.keeps_exactly("reference").value


def test_a_rank_that_is_not_printed_shows_no_figure_right_but_may_show_it_wrong() -> None:
    step, last = Fraction(1000), Fraction(100)
    right = baselines.at_some_rank(step, Fraction(3000 + 50), last)
    assert (right.value, right.most) == (1000, 4000)  # of ranks 1 to 4, and the paper does not say which
    wrong = baselines.at_some_rank(step, Fraction(3000 + 51), last)
    assert (wrong.value, wrong.most, wrong.how) == (3000, None, "rank 3: 3 x 1,000")
    assert baselines.at_some_rank(step, Fraction(3501), last, fitted=True).value == 4000
    assert baselines.at_some_rank(step, Fraction(1), last, fitted=True).value == 1000


def test_a_rank_is_not_fitted_where_nearly_any_figure_has_one() -> None:
    assert baselines.at_some_rank(Fraction(500), Fraction(3000), Fraction(100), fitted=True).value == 3000
    with pytest.raises(ValueError, match="one more rank adds 499, less than 5 x 100: nearly any figure would fit"):
        baselines.at_some_rank(Fraction(499), Fraction(2994), Fraction(100), fitted=True)


@pytest.mark.slow
def test_a_percentage_without_its_rank_is_right_under_a_fitted_one_or_wrong() -> None:
    found = verdicts(["adalora-bart-b013", "adalora-bart-b026", "adalora-bart-b110"])
    nearest = "the nearest whole rank, since the paper prints none"
    assert found["adalora-bart-b026"].under == f"{nearest}; digits cut off, not rounded"
    assert found["adalora-bart-b013"].under == nearest
    assert found["adalora-bart-b110"].verdict is ClaimVerdict.NOT_REPRODUCED
    assert found["adalora-bart-b110"].how.startswith("rank 8: 8 x ")


@pytest.mark.slow
def test_what_the_ledger_says_of_printed_counts() -> None:
    ids = ["adalora-lora-r8", "adalora-127m", "adalora-lora-share-r4", "adalora-fig1-mlp", "adalora-fig1-three-layers"]
    found = verdicts([*ids, "adalora-n72-b144", "adalora-schedule-eq12-start-rte"])
    with_output = "with the attention's output too, as in Figures 1 and 3"
    assert found["adalora-lora-r8"].under == found["adalora-n72-b144"].under == with_output
    assert found["adalora-lora-r8"].how.endswith(f"= {12 * 8 * (4 * (768 + 768) + 2 * (768 + 3072)):,}")
    assert found["adalora-127m"].verdict is ClaimVerdict.INCONCLUSIVE
    assert found["adalora-lora-share-r4"].verdict is ClaimVerdict.REPRODUCED
    assert found["adalora-fig1-mlp"].verdict is ClaimVerdict.INCONCLUSIVE
    assert found["adalora-fig1-three-layers"].verdict is ClaimVerdict.NOT_REPRODUCED
    assert found["adalora-schedule-eq12-start-rte"].under.startswith("(t - t_i) / (T - t_i - t_f)")


def test_whole_minutes_decide_no_percentage_that_they_allow() -> None:
    found = verdicts([f"adalora-table15-pct-{row}" for row in ("mnli-008", "mnli-016", "sst2-008")])
    minutes = found["adalora-table15-pct-mnli-008"]
    least, most = Fraction("115.5") / Fraction("105.5") - 1, Fraction("116.5") / Fraction("104.5") - 1
    assert minutes.verdict is ClaimVerdict.INCONCLUSIVE
    assert minutes.why.endswith(f"which allow {float(least * 100):.6g}% to {float(most * 100):.6g}%")
    assert found["adalora-table15-pct-mnli-016"].verdict is ClaimVerdict.REPRODUCED
