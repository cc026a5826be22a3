"""GaLore's claims: what their measures count and find, by another route, and with a fault planted in the reference."""

from __future__ import annotations

import json
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from harness.claims import claim_file
from harness.claims.judge import ClaimVerdict, judge, plain
from harness.claims.measures import arithmetic, galore
from harness.claims.worker import find
from harness.conformance.subject import configure
from harness.errors import SuiteError
from reference import galore as reference

SHAPE = {
    "vocab_size": 50, "hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 3,
}  # fmt: skip
TARGETS = ["q_proj", "v_proj", "down_proj"]


@pytest.fixture
def shape(tmp_path: Path) -> str:
    """A llama with q 12 x 12, v 6 x 12 and down 12 x 20."""
    (tmp_path / "config.json").write_text(json.dumps(SHAPE | {"model_type": "llama"}))
    return f"{tmp_path}/config.json"


def test_a_refresh_decomposes_each_matrix_once_every_gap_steps(shape: str) -> None:
    def svd(m: int, n: int) -> int:
        return 6 * m * n * n + 20 * n * n * n

    found = galore.refresh_operations(shape, "galore", {"rank": 2, "targets": TARGETS})
    assert found.value == 3 * (svd(12, 12) + svd(12, 6) + svd(20, 12))
    share = galore.refresh_share_by_operations(Fraction(found.value), Fraction(found.value, 4), 200)
    assert share.value == Fraction(4, 200)
    assert "takes 5 times as long" in share.how


def held(optimizer: torch.optim.Optimizer, names: tuple[str, ...]) -> int:
    """Count the numbers in an optimizer's states of these names."""
    return sum(kept[name].numel() for kept in optimizer.state.values() for name in names if name in kept)


def stepped(config: dict[str, Any]) -> Any:
    """Return the optimizer of a real model after a step of GaLore."""
    model = LlamaForCausalLM(LlamaConfig(**SHAPE))
    adapted = reference.attach(model, configure("galore", config), torch.Generator())
    optimizer = adapted.optimizer(1e-3, 0.0)
    tokens = torch.arange(10)[None]
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    return optimizer


@pytest.mark.parametrize("more", [{}, {"side": "paper"}, {"side": "full"}, {"train_rest": False}, {"rank": 40}])
def test_the_bytes_are_those_that_a_step_of_a_real_model_leaves(shape: str, more: dict[str, Any]) -> None:
    config = {"rank": 2, "targets": TARGETS} | more
    optimizer = stepped(config)
    moments, projectors = held(optimizer, ("M", "V")), held(optimizer, ("P", "Q"))
    assert projectors
    assert galore.optimizer_bytes(shape, "galore", config).value == 2 * (moments + projectors)
    assert galore.optimizer_bytes(shape, "galore", config, moments=Fraction(1), projectors=Fraction(4)).value == (
        moments + 4 * projectors
    )


def test_adams_bytes_of_all_that_trains_and_of_what_trains_besides(shape: str) -> None:
    model = LlamaForCausalLM(LlamaConfig(**SHAPE))
    every = sum(p.numel() for p in model.parameters())
    assert galore.optimizer_bytes(shape, "full", moments=Fraction(4)).value == 8 * every

    factors = 3 * 2 * ((12 + 12) + (12 + 6) + (20 + 12))
    lora = {"rank": 2, "targets": TARGETS}
    assert galore.optimizer_bytes(shape, "lora", lora).value == 2 * 2 * factors
    outside = 2 * 50 * 12 + (2 * 3 + 1) * 12
    also = ["embed_tokens", "lm_head", "norm"]
    assert galore.optimizer_bytes(shape, "lora", lora, also=also).value == 2 * 2 * (factors + outside)


def test_parameters_of_some_blocks_only_are_counted_as_such(tmp_path: Path) -> None:
    (tmp_path / "deep.json").write_text(json.dumps(SHAPE | {"model_type": "llama", "num_hidden_layers": 7}))
    deep = f"{tmp_path}/deep.json"
    lora = {"rank": 2, "targets": TARGETS}
    least = galore.optimizer_bytes(deep, "lora", lora).value
    found = galore.optimizer_bytes(deep, "lora", lora, also=[r"layers\.[0-4]\.mlp\.up_proj"]).value
    assert found - least == 2 * 2 * 5 * 20 * 12


def test_the_arithmetic_of_savings() -> None:
    forty, ten = Fraction(40), Fraction(10)
    assert arithmetic.bytes_saved(of=ten, than=forty).value == 30
    assert galore.left_after_saving(saved=forty, share=Fraction(4, 5)).value == 10  # of 50
    assert arithmetic.most_share_less(of=[ten, forty], than=[forty, forty]).value == Fraction(3, 4)
    assert galore.matrix_states(12, 20, 3).value == galore.matrix_states(20, 12, 3).value == 12 * 3 + 2 * 20 * 3
    assert [galore.heads_divide(12, heads).value for heads in (4, 5)] == [True, False]


def test_the_width_is_the_models_own(shape: str) -> None:
    assert galore.width(shape).value == 12


def _with(**changed: Callable[[Any], Any]) -> Callable[..., None]:
    """Return GaLore's step with knobs that are not those it was given."""
    true = reference.galore_step

    def step(W: Any, G: Any, state: Any, **knobs: Any) -> None:
        true(W, G, state, **knobs | {name: change(knobs) for name, change in changed.items()})

    return step


@pytest.mark.parametrize(
    ("measure", "arguments", "fault"),
    [
        (galore.states_by_formula, {"rows": 6, "columns": 9, "ranks": [1, 3]}, {"side": lambda k: "full"}),
        (galore.states_by_formula, {"rows": 9, "columns": 6, "ranks": [1, 3]}, {"rank": lambda k: k["rank"] + 1}),
        (galore.scale_ignores_rank, {"rows": 6, "columns": 9, "ranks": [1, 2], "scale": 0.25},
         {"scale": lambda k: k["scale"] if k["scale"] == 1 else k["scale"] / k["rank"]}),
        (galore.projects, {"rows": 6, "columns": 9, "on": "left"}, {"side": lambda k: "reverse_std"}),
        (galore.projects, {"rows": 6, "columns": 6, "on": "left", "side": "paper"}, {"side": lambda k: "std"}),
        (galore.moments_are, {"rows": 6, "columns": 9, "rank": 2, "shape": [2, 9]}, {"side": lambda k: "right"}),
        (galore.refreshes_every, {"gap": 3, "steps": 8}, {"update_gap": lambda k: 2}),
        (galore.refreshes_every, {"gap": 3, "steps": 8}, {"update_gap": lambda k: 6}),
    ],
)  # fmt: skip
def test_a_property_of_the_step_holds_and_is_lost_with_the_step(
    measure: Any, arguments: dict[str, Any], fault: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert measure(**arguments).value
    monkeypatch.setattr(reference, "galore_step", _with(**fault))
    assert not measure(**arguments).value


@pytest.mark.parametrize(("rows", "columns"), [(6, 9), (9, 6), (6, 6)])
@pytest.mark.parametrize("side", ["paper", "std", "full"])
def test_the_gradient_comes_back_at_full_rank_only(
    rows: int, columns: int, side: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert galore.full_rank_keeps_gradient(rows, columns, side).value
    true = reference.projector
    monkeypatch.setattr(reference, "projector", lambda G, rank, side: true(G, rank - 1, side))
    assert not galore.full_rank_keeps_gradient(rows, columns, side).value


def test_what_the_paper_says_of_itself_is_judged_from_the_file() -> None:
    claims = {claim.id: claim for claim in claim_file.load(claim_file.paths(["galore"]))}
    found = {}
    for name in ("galore-633pct-adam", "galore-633pct-adam8", "galore-tokens-60m", "galore-tokens-table2-60m",
                 "galore-table5-heads-1b", "galore-side-square"):  # fmt: skip
        claim = claims[name]
        answers = [find(plain(one)) for one in (claim.request, *(one.request for one in claim.otherwise))]
        found[name] = judge(claim, answers).verdict
    assert list(found.values()) == [
        ClaimVerdict.REPRODUCED, ClaimVerdict.NOT_REPRODUCED, ClaimVerdict.REPRODUCED, ClaimVerdict.NOT_REPRODUCED,
        ClaimVerdict.UNDER, ClaimVerdict.UNDER,
    ]  # fmt: skip


def test_a_side_that_there_is_not_is_refused_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "paper: mine\ntitle: Mine\nversion: v1\nclaims:\n"
        "  - {id: one, sentence: A sentence., source: Table 1, tier: exact, printed: left, "
        "measure: projects, with: {rows: 8, columns: 8, on: left, side: middle}}\n"
    )
    with pytest.raises(SuiteError, match=r"mine\.yaml:5: `side` of `projects`: Input should be 'std', .*got 'middle'"):
        claim_file.load([path])
