"""QLoRA's claims: bits and bytes counted by hand on a small shape, levels and errors by another route than the measures'."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.claims import claim_file
from harness.claims.judge import ClaimVerdict
from harness.claims.measures import arithmetic, comparisons, four_bit, four_bit_bytes
from harness.errors import SuiteError
from reference.operations import double_quant, nf4
from reference.operations.nf4 import codebook
from support.claim_verdicts import verdicts

SHAPE = {
    "model_type": "llama", "vocab_size": 100, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1,
}  # fmt: skip
# Of each block: q and o 64 x 64, k and v 64 x 32, gate, up and down 64 x 96.
WEIGHTS = [64 * 64] * 4 + [64 * 32] * 4 + [64 * 96] * 6
# Embeddings and output, two norms of each block and the last one.
REST = 2 * 100 * 64 + 5 * 64
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CONFIG = {"rank": 3, "targets": TARGETS}
ADAPTERS = 3 * 2 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 96))


@pytest.fixture
def shape(tmp_path: Path) -> str:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(SHAPE))
    return str(path)


def claim(claims: str, path: Path) -> list[Any]:
    path.write_text(f"paper: mine\ntitle: Mine\nversion: v1\nclaims:\n{claims}")
    return claim_file.load([path])


def constants(block: int, second: int | None) -> int:
    """Count the bits of all constants, weight by weight."""
    found = 0
    for numel in WEIGHTS:
        blocks = len(range(0, numel, block))
        found += 32 * blocks if second is None else 8 * blocks + 32 * len(range(0, blocks, second)) + 32
    return found


@pytest.mark.parametrize(("block", "second"), [(64, None), (64, 256), (32, 16), (128, None)])
def test_the_bits_of_constants_are_those_counted_by_hand(shape: str, block: int, second: int | None) -> None:
    found = four_bit_bytes.constant_bits(shape, double=second is not None, block=block, second_block=second or 256)
    assert found.value * sum(WEIGHTS) == constants(block, second)


def test_what_double_quantisation_saves_is_the_difference_in_bytes(shape: str) -> None:
    found = four_bit_bytes.double_quantisation_saves(shape, block=64, second_block=4)
    assert found.value * 8 == constants(64, None) - constants(64, 4)


@pytest.mark.parametrize(("double", "block"), [(True, 64), (False, 64), (True, 32)])
def test_the_bytes_of_a_model_are_those_of_its_tensors(shape: str, double: bool, block: int) -> None:
    config = CONFIG | {"double_quant": double, "block": block}
    found = four_bit_bytes.four_bit_bytes(shape, config=config, rest=2, adapters=12)
    packed = 0  # real ones: what the quantiser returns for a weight of this size
    for numel in WEIGHTS:
        codes, absmax = nf4.quantize(torch.randn(numel, generator=torch.Generator().manual_seed(numel)), block)
        kept = [nf4.pack(codes), *(double_quant.quantize(absmax) if double else [absmax])]
        packed += sum(tensor.nbytes for tensor in kept)
    assert found.value == packed + 2 * REST + 12 * ADAPTERS
    assert f"{packed:,} B" in found.how


def test_a_method_without_four_bits_is_refused(shape: str) -> None:
    with pytest.raises(ValueError, match="lora has no 4-bit weights; `method` must be qlora"):
        four_bit_bytes.four_bit_bytes(shape, "lora", {})


def test_a_layer_that_is_left_out_is_named(shape: str) -> None:
    every = four_bit_bytes.every_linear_layer_but_the_output(shape, config=CONFIG)
    assert every.value is True
    few = four_bit_bytes.every_linear_layer_but_the_output(shape, config={"rank": 3, "targets": TARGETS[1:]})
    assert few.value is False
    assert "not the output: model.layers.0.self_attn.q_proj, model.layers.1.self_attn.q_proj" in few.how


def test_levels_on_each_side_of_zero() -> None:
    sides = ("negative", "positive", "both")
    assert [four_bit.levels("nf4", side).value for side in sides] == [8, 9, 16]
    assert [four_bit.levels("nf4", side, zero=False).value for side in sides] == [7, 8, 15]
    assert [four_bit.levels("int4-both-ends", side).value for side in sides] == [9, 8, 16]
    assert [four_bit.levels("int4", side).value for side in sides] == [8, 8, 15]
    assert [four_bit.levels("e2m1", side).value for side in sides] == [8, 8, 15]  # two codes are zero


def test_floats_of_four_bits_are_those_of_the_formats() -> None:
    for name, magnitudes in (("e2m1", [0, 0.5, 1, 1.5, 2, 3, 4, 6]), ("e3m0", [0, 1, 2, 4, 8, 16, 32, 64])):
        values = (four_bit._levels(name).unique() * magnitudes[-1]).tolist()  # type: ignore[arg-type]
        assert values == pytest.approx(sorted({sign * m for m in magnitudes for sign in (1, -1)}))


def test_one_digit_of_one_level_decides() -> None:
    levels = codebook().tolist()
    assert four_bit.nf4_has(levels).value is True
    other = [*levels[:5], float(torch.nextafter(codebook()[5], torch.tensor(1.0))), *levels[6:]]
    assert four_bit.nf4_has(other).value is False
    assert four_bit.nf4_has(levels[:-1]).value is False


def test_equation_4_has_no_first_level_and_other_finite_ones() -> None:
    levels = codebook().tolist()
    printed = four_bit.equation_4_gives(levels)
    assert (printed.value, "q_0 = -inf" in printed.how) == (False, True)
    # By hand, k = 1: q_1 = (Q(1/3) + Q(2/3)) / 2 = 0 is the only finite one of two, so it cannot be scaled.
    assert four_bit.equation_4_gives([-1.0, 1.0], ends="left out").value is False
    # k = 2: q_1 .. q_3 of Q(1/5) .. Q(4/5) = -0.841621, -0.253347, 0.253347, 0.841621 are -0.547484, 0, 0.547484.
    assert four_bit.equation_4_gives([-1.0, 0.0, 1.0, 1.0], ends="left out").how == "3 levels instead of 4: -1, 0, 1"


def test_the_error_of_a_type_is_that_of_the_nearest_level() -> None:
    weights = four_bit._normal()[: 64 * 200].double().view(-1, 64)
    absmax = weights.abs().amax(1, keepdim=True)
    for name in ("nf4", "int4", "e3m0"):
        table = four_bit._levels(name).double()  # type: ignore[arg-type]
        error = (weights / absmax - table[:, None, None]).abs().amin(0) * absmax
        spread = float(error.square().std()) / error.numel() ** 0.5
        found = four_bit.squared_error(name)  # type: ignore[arg-type]  # of more weights of the same kind
        assert abs(float(found.value) - float(error.square().mean())) < 5 * spread


def test_smaller_blocks_and_a_mean_taken_off_lose_less_and_constants_in_eight_bits_more() -> None:
    errors = [four_bit.squared_error("nf4", block).value for block in (32, 64, 256)]
    assert errors == sorted(errors)
    assert four_bit.squared_error("nf4", double=True).value > four_bit.squared_error("nf4").value
    assert four_bit.constants_error(centred=True).value < four_bit.constants_error(centred=False).value


def test_bins_are_as_full_as_they_are() -> None:
    found = four_bit.equally_full_bins("nf4", block=64)
    assert found.value is False
    codes, _ = nf4.quantize(four_bit._normal(), 64)
    assert f"{float((codes == 15).double().mean()):.2%} have the level 1," in found.how


def test_the_type_of_the_constants_is_no_float_but_a_float_would_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    assert four_bit.constants_are("e4m3").value is False
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    monkeypatch.setattr(
        "reference.operations.dynamic_map.dynamic_map", lambda signed: (every[every.isfinite()] / 448).unique()
    )
    assert four_bit.constants_are("e4m3").value is True
    assert four_bit.constants_are("e5m2").value is False


def test_blocks_that_begin_anew_in_each_row_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    assert four_bit.blocks_run_over_rows(3, 65).value is True
    whole = nf4.quantize

    def by_rows(W: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
        parts = [whole(row, block) for row in W]
        return torch.cat([codes for codes, _ in parts]), torch.cat([absmax for _, absmax in parts])

    monkeypatch.setattr(nf4, "quantize", by_rows)
    found = four_bit.blocks_run_over_rows(3, 65)
    assert (found.value, found.how) == (False, "6 constants; 4 runs of 64 in the flattened matrix, 6 row by row")


def test_comparisons_by_hand() -> None:
    assert arithmetic.mean([1, 2, 6]).value == 3
    assert comparisons.wins([3, 2, 5], [1, 2, 7]).value == 1
    assert comparisons.wins([3, 2], [1, 2]).how == "2 <= 2; 1 of 2 are larger"
    assert comparisons.increasing([1, 2, 3]).value is True
    assert comparisons.increasing([1, 1]).value is False
    with pytest.raises(ValueError, match="`of` has 1 numbers and `over` has 2; write lists of equal length"):
        comparisons.wins([1], [1, 2])


def test_arguments_that_a_measure_does_not_take_are_named(tmp_path: Path) -> None:
    text = (
        "  - {id: one, sentence: S, source: T, tier: exact, printed: '1', measure: squared_error, with: {type: nf5}}\n"
        "  - {id: two, sentence: S, source: T, tier: exact, printed: p, measure: increasing, with: {of: 3}}\n"
        "  - {id: three, sentence: S, source: T, tier: exact, printed: '3 GB', measure: four_bit_bytes,"
        " with: {model: llama-7b, rest: 3}}\n"
    )
    with pytest.raises(SuiteError) as raised:
        claim(text, tmp_path / "mine.yaml")
    said = [problem.what for problem in raised.value.problems]
    assert said[0].startswith("`type` of `squared_error`")
    assert "'nf5'" in said[0]
    assert "`of` of `increasing`" in said[1]
    assert "`rest` of `four_bit_bytes`: Input should be 0, 2 or 4" in said[2]


def test_the_papers_claims_that_need_no_model_get_their_verdicts() -> None:
    """What a reader is told, the findings above all; the rest of the file needs large shapes and is read only."""
    starts = ("qlora-nf4", "qlora-dq-fp8", "qlora-table", "qlora-blocks", "qlora-guanaco-7b-table")
    found = {name: row.verdict for name, row in verdicts("qlora", starts).items()}
    assert {name for name, verdict in found.items() if verdict is ClaimVerdict.NOT_REPRODUCED} == {
        "qlora-nf4-equal-bins", "qlora-dq-fp8", "qlora-guanaco-7b-table-1", "qlora-table-4-mean-nfloat4",
        "qlora-table-4-behind-bf16", "qlora-table-6-lead-7b-alpaca", "qlora-table-6-lead-13b-hh-rlhf",
    }  # fmt: skip
    assert {name for name, verdict in found.items() if verdict is ClaimVerdict.UNDER} == {"qlora-nf4-eq4"}
    assert set(found.values()) == {ClaimVerdict.REPRODUCED, ClaimVerdict.UNDER, ClaimVerdict.NOT_REPRODUCED}
