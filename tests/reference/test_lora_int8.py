"""LoRA over 8-bit weights: the format and the product by hand, merging, and bitsandbytes' Linear8bitLt."""

from __future__ import annotations

from typing import Any

import bitsandbytes
import pytest
import torch
from torch import Tensor

from harness.conformance.comparison.tolerance_policies import exact
from harness.conformance.subject import DTYPES, configure, warm
from reference import lora, lora_int8
from reference.operations import int8
from support.two_layer_model import Two, assert_same, draw, generator

THRESHOLDS = pytest.mark.parametrize("threshold", [0.0, 1.5])


def warmed(dtype: str = "float64", **config: Any) -> Any:
    chosen = {"rank": 3, "alpha": 8, "targets": ["q_proj", "v_proj"], **config}
    adapted = lora_int8.attach(Two(DTYPES[dtype]), configure("lora_int8", chosen), generator(5))
    warm(adapted.tensors(), generator(6))
    return adapted


def by_hand(x: Tensor, layer: Any, threshold: float) -> Tensor:
    """Multiply one number at a time: codes where neither the column nor the number is an outlier."""
    codes, absmax = layer.state()["codes"], layer.state()["absmax"]
    half = x.to(torch.float16)
    outliers = [[threshold > 0 and abs(float(v)) >= threshold for v in row] for row in half]
    columns = [any(row[d] for row in outliers) for d in range(x.shape[1])]
    y = torch.zeros(len(x), len(codes), dtype=torch.float64)
    for t in range(len(x)):
        inside = [0.0 if outliers[t][d] else float(half[t, d]) for d in range(x.shape[1])]
        largest = max(map(abs, inside))
        for e in range(len(codes)):
            for d, value in enumerate(inside):
                code = round(value * 127 / largest)  # Python rounds half to even too
                W = int(codes[e, d]) * float(absmax[e]) / 127
                y[t, e] += float(x[t, d]) * W if columns[d] else code * largest / 127 * W
    return y


def test_a_row_is_scaled_by_its_largest_number_and_rounded_half_to_even() -> None:
    W = torch.tensor([[127.0, 0.5, 1.5, -126.5], [0.0, 0.0, 0.0, 0.0], [-2.0, 1.0, 0.25, 2.0]])
    codes, absmax = int8.quantize(W)
    assert codes.tolist() == [[127, 0, 2, -126], [0, 0, 0, 0], [-127, 64, 16, 127]]
    assert codes.dtype == torch.int8
    assert absmax.tolist() == [127.0, 0.0, 2.0]
    assert int8.near_tie(W).tolist() == [[False, True, True, True], [False] * 4, [False, True, False, False]]
    assert torch.equal(int8.dequantize(codes, absmax)[0], torch.tensor([127.0, 0.0, 2.0, -126.0]))


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), 65520.0])
def test_a_row_with_a_number_that_float16_cannot_hold_has_no_finite_element(wrong: float) -> None:
    codes, absmax = int8.quantize(torch.tensor([[1.0, wrong], [1.0, 2.0]]))
    assert int8.dequantize(codes, absmax).isfinite().tolist() == [[False, False], [True, True]]


@THRESHOLDS
def test_eval_mode_multiplies_codes_and_training_the_decoded_weight(threshold: float) -> None:
    layer, x = warmed(threshold=threshold).layers["q_proj"], draw(5, 12)
    update = 8 / 3 * x @ layer.A.T @ layer.B.T + layer.base.bias
    assert_same({"y": layer.eval()(x)}, {"y": by_hand(x, layer, threshold) + update})
    W = layer.packed.decoded(torch.float64)
    assert_same({"y": layer.train()(x)}, {"y": x @ W.T + update})


@pytest.mark.parametrize("training", [True, False])
def test_gradients_are_those_of_the_decoded_weight(training: bool) -> None:
    layer = warmed().layers["q_proj"].train(training)
    x, dy = draw(5, 12).requires_grad_(True), draw(5, 10, seed=2)
    layer(x).backward(dy)
    s, A, B, W = 8 / 3, layer.A.detach(), layer.B.detach(), layer.packed.decoded(torch.float64)
    want = {"x": dy @ (W + s * B @ A), "A": s * (dy @ B).T @ x.detach(), "B": s * dy.T @ (x.detach() @ A.T)}
    assert_same({"x": x.grad, "A": layer.A.grad, "B": layer.B.grad}, want)


def test_the_adapter_starts_as_loras_and_the_state_is_the_weight() -> None:
    config = configure("lora_int8", {"rank": 3, "targets": ["q_proj", "v_proj"]})
    adapted = lora_int8.attach(Two(), config, generator(5))
    want = lora.attach(Two(), lora.Config(rank=3), generator(5)).tensors()
    assert exact(adapted.tensors(), want).passed
    for path in ("q_proj", "v_proj"):
        codes, absmax = int8.quantize(getattr(Two(), path).weight)
        state = {name: adapted.state()[f"{path}.{name}"] for name in ("codes", "absmax")}
        assert exact(state, {"codes": codes, "absmax": absmax}).passed


def test_merging_quantises_the_sum_and_adds_the_scaled_bias_and_unmerging_restores_the_layer() -> None:
    adapted, x = warmed(lora_bias=True), draw(5, 12)
    layer = adapted.layers["q_proj"]
    codes, absmax = int8.quantize(layer.packed.decoded(torch.float64) + 8 / 3 * layer.B.detach() @ layer.A.detach())
    before = adapted.model(x)
    adapted.merge()
    adapted.merge()
    merged = adapted.model.q_proj
    assert exact(merged.packed.tensors(), {"codes": codes, "absmax": absmax}).passed
    assert_same({"bias": merged.bias}, {"bias": layer.base.bias + 8 / 3 * layer.c.detach()})
    assert_same({"bias": adapted.model.v_proj.bias}, {"bias": 8 / 3 * adapted.layers["v_proj"].c.detach()})
    assert not any(p.requires_grad for p in adapted.model.parameters())
    adapted.unmerge()
    assert torch.equal(adapted.model(x), before)
    adapted.detach()
    assert exact(dict(adapted.model.named_parameters()), dict(Two().named_parameters())).passed


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@THRESHOLDS
def test_bitsandbytes_has_the_same_codes_and_the_same_product(dtype: str, training: bool, threshold: float) -> None:
    """In 16 bits, which hide the wrong constant of bitsandbytes' product."""
    W, x = draw(48, 40, dtype=DTYPES[dtype]), draw(17, 40, seed=2, dtype=DTYPES[dtype])
    theirs = bitsandbytes.nn.Linear8bitLt(40, 48, bias=False, has_fp16_weights=False, threshold=threshold)
    theirs.weight = bitsandbytes.nn.Int8Params(W, requires_grad=False, has_fp16_weights=False).to("cpu")
    codes, absmax = int8.quantize(W)
    y = theirs.train(training)(x)
    assert exact({"codes": theirs.state.CB, "absmax": theirs.state.SCB}, {"codes": codes, "absmax": absmax}).passed
    wide = x.double()
    want = wide @ int8.dequantize(codes, absmax, torch.float64).T
    assert_same({"y": y}, {"y": want if training else int8.product(wide, codes, absmax, threshold)}, dtype)
