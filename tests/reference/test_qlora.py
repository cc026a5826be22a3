"""QLoRA: eqs. 5 and 6 by hand, its packed state, and HF peft's LoRA on bitsandbytes' double-quantised layer."""

from __future__ import annotations

import math
from typing import Any

import bitsandbytes
import peft
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from torch import Tensor, nn

from harness.conformance.comparison.tolerance_policies import exact, noise_floor, unchanged
from harness.conformance.subject import DTYPES, configure, warm
from reference import lora, qlora
from reference.operations import double_quant, nf4
from support.two_layer_model import Two, assert_same, draw, generator

DOUBLE = pytest.mark.parametrize("double", [True, False], ids=["double", "single"])


def attached(dtype: str = "float64", seed: int = 5, **config: Any) -> Any:
    config = {"rank": 3, "alpha": 8, "targets": ["q_proj", "v_proj"], **config}
    return qlora.attach(Two(DTYPES[dtype]), configure("qlora", config), generator(seed))


def warmed(dtype: str = "float64", **config: Any) -> Any:
    adapted = attached(dtype, **config)
    warm(adapted.tensors(), generator(6))
    return adapted


def decoded_by_hand(layer: Any, block: int) -> Tensor:
    """Eq. 6, one weight at a time: nibble, level, second constant, first constant."""
    E, D = layer.base.out_features, layer.base.in_features
    levels, state = nf4.codebook(), layer.state()
    dynamic = double_quant.dynamic_map(signed=True)
    W = torch.empty(E * D)
    for i in range(E * D):
        byte = int(state["codes"][i // 2])
        code = byte >> 4 if i % 2 == 0 else byte & 15
        absmax = state["absmax"][i // block]
        if "offset" in state:
            absmax = dynamic[int(absmax)] * state["absmax2"][i // block // 256] + state["offset"]
        W[i] = levels[code] * absmax
    return W.view(E, D)


@DOUBLE
@pytest.mark.parametrize("block", [32, 64])
def test_forward_is_equations_5_and_6(double: bool, block: int) -> None:
    layer = warmed(double_quant=double, block=block).layers["q_proj"]
    x = draw(5, 12)
    W = decoded_by_hand(layer, block)
    assert torch.equal(layer.weight(), W)
    A, B = layer.A.detach(), layer.B.detach()
    want = torch.empty(5, 10, dtype=torch.float64)
    for t in range(5):
        for e in range(10):
            L1L2 = [sum(float(A[k, d]) * float(B[e, k]) for k in range(3)) for d in range(12)]
            row = (float(x[t, d]) * (float(W[e, d]) + 8 / 3 * L1L2[d]) for d in range(12))
            want[t, e] = float(layer.base.bias[e]) + sum(row)
    assert_same({"y": layer(x)}, {"y": want})


@DOUBLE
def test_gradients_are_those_of_the_decoded_weight(double: bool) -> None:
    layer = warmed(double_quant=double).layers["q_proj"]
    x, dy = draw(5, 12).requires_grad_(True), draw(5, 10, seed=2)
    layer(x).backward(dy)
    s, A, B, W = 8 / 3, layer.A.detach(), layer.B.detach(), layer.weight().double()
    want = {
        "x": dy @ (W + s * B @ A),
        "A": s * torch.einsum("te,ek,td->kd", dy, B, x.detach()),
        "B": s * torch.einsum("te,kd,td->ek", dy, A, x.detach()),
    }
    assert_same({"x": x.grad, "A": layer.A.grad, "B": layer.B.grad}, want)


def test_autograd_agrees_with_finite_differences() -> None:
    layer = warmed().layers["q_proj"]
    inputs = (draw(2, 2, 12).requires_grad_(True), layer.A, layer.B)
    assert torch.autograd.gradcheck(lambda x, A, B: layer(x), inputs)


@DOUBLE
def test_state_is_the_packed_weight(double: bool) -> None:
    adapted = attached(double_quant=double)
    state = adapted.state()
    for path, numel in (("q_proj", 120), ("v_proj", 70)):
        weight = getattr(Two(), path).weight
        codes, absmax = nf4.quantize(weight)
        want = {f"{path}.codes": nf4.pack(codes), f"{path}.absmax": absmax}
        if double:
            c2, c1, offset = double_quant.quantize(absmax)
            want |= {f"{path}.absmax": c2, f"{path}.absmax2": c1, f"{path}.offset": offset}
        assert {n for n in state if n.startswith(path)} == set(want)
        for name, tensor in want.items():
            assert torch.equal(state[name], tensor), name
            assert state[name].dtype == tensor.dtype, name
        bits = 8 * sum(t.numel() * t.element_size() for t in want.values())
        assert double_quant.bits_per_parameter(numel, double=double) == bits / numel


@DOUBLE
def test_forward_depends_on_nothing_but_bias_tensors_and_state(double: bool) -> None:
    mine, other = warmed(double_quant=double), attached(double_quant=double, seed=9)
    with torch.no_grad():
        for path in ("q_proj", "v_proj"):
            other.layers[path].base.weight.fill_(float("nan"))  # no product reads it
        for theirs, ours in ((other.tensors(), mine.tensors()), (other.state(), mine.state())):
            for name in theirs:
                theirs[name].zero_()
                theirs[name].copy_(ours[name])
    x = draw(5, 12)
    assert torch.equal(other.model(x), mine.model(x))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_decoded_weight_is_cast_to_the_inputs_dtype(dtype: str) -> None:
    layer = warmed(dtype).layers["q_proj"]
    x = draw(5, 12, dtype=DTYPES[dtype])
    assert layer.weight().dtype == torch.float32
    assert layer(x).dtype == DTYPES[dtype]
    with torch.no_grad():
        layer.B.zero_()
    want = nn.functional.linear(x, layer.weight().to(DTYPES[dtype]), layer.base.bias)
    assert torch.equal(layer(x), want)


def test_at_the_start_the_model_is_the_quantised_base() -> None:
    adapted, plain = attached(), Two()
    for path, layer in adapted.layers.items():
        assert torch.equal(getattr(plain, path).weight, layer.base.weight)
        getattr(plain, path).weight = nn.Parameter(layer.weight().double())
    x = draw(5, 12)
    assert torch.equal(adapted.model(x), plain(x))
    assert not torch.equal(adapted.model(x), Two()(x))


def test_the_adapter_starts_as_loras() -> None:
    want = lora.attach(Two(), lora.Config(rank=3, alpha=8), generator(5)).tensors()
    assert exact(attached().tensors(), want).passed


def test_only_the_adapter_trains() -> None:
    adapted = attached()
    trains = {id(p) for p in adapted.model.parameters() if p.requires_grad}
    assert trains == {id(p) for p in adapted.parameters()}
    assert sum(p.numel() for p in adapted.parameters()) == 3 * (12 + 10) + 3 * (10 + 7)


@pytest.mark.parametrize("dtype", DTYPES)
def test_merged_is_the_decoded_weight_and_the_update(dtype: str) -> None:
    layer, x = warmed(dtype).layers["q_proj"], draw(5, 12, dtype=DTYPES[dtype])
    with torch.no_grad():
        W = layer.weight().double() + layer.scaling * layer.B.double() @ layer.A.double()
        truth = nn.functional.linear(x.double(), W, layer.base.bias.double())
        merged = layer.merged()
        judged = noise_floor({"y": merged(x)}, {"y": truth}, {"y": layer(x)}, dtype)
    assert (type(merged), merged.weight.dtype) == (nn.Linear, DTYPES[dtype])
    assert judged.passed, judged


def test_merge_unmerge_and_detach() -> None:
    adapted, x = warmed(), draw(5, 12)
    before = adapted.model(x)
    adapted.merge()
    assert type(adapted.model.q_proj) is nn.Linear
    assert_same({"y": adapted.model(x)}, {"y": before})
    adapted.unmerge()
    assert torch.equal(adapted.model(x), before)
    adapted.detach()
    assert torch.equal(adapted.model(x), Two()(x))


def test_dropout_touches_the_adapter_only() -> None:
    layer = warmed(dropout=0.5).layers["q_proj"]
    x, base = draw(400, 12), None
    with torch.no_grad():
        base = nn.functional.linear(x, layer.weight().double(), layer.base.bias)
        torch.manual_seed(0)
        y = layer.train()(x)
        torch.manual_seed(0)
        assert_same({"y": y}, {"y": base + layer.scaling * layer.dropout(x) @ layer.A.T @ layer.B.T})
        assert_same({"y": layer.eval()(x)}, {"y": base + x @ layer.delta().T})


@pytest.mark.parametrize("wrong", [("k_proj",), ("q_proj", "nothing")])
def test_an_unknown_target_is_named(wrong: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=wrong[-1]):
        attached(targets=list(wrong))


@pytest.mark.parametrize("block", [64, 256])
@DOUBLE
def test_bitsandbytes_bytes_decode_to_its_weight(double: bool, block: int) -> None:
    model = nn.Sequential(nn.Linear(256, 96))
    config = qlora.Config(rank=3, targets=("0",), block=block, double_quant=double)
    layer = qlora.attach(model, config, generator()).layers["0"]
    packed, quantised = quantize_4bit(
        layer.base.weight.detach(), blocksize=block, quant_type="nf4", compress_statistics=double
    )
    theirs = {"codes": packed.flatten(), "absmax": quantised.absmax}
    if double:
        theirs |= {"absmax2": quantised.state2.absmax, "offset": quantised.offset}
    state = layer.state()
    assert set(state) == set(theirs)
    for name, tensor in theirs.items():
        assert state[name].shape == tensor.shape, name
        assert state[name].dtype == tensor.dtype, name
        state[name].copy_(tensor)
    assert torch.equal(layer.weight(), dequantize_4bit(packed, quantised))


def test_hf_peft_on_linear4bit_computes_the_same() -> None:
    dense = nn.Linear(128, 48)
    packed = bitsandbytes.nn.Linear4bit(128, 48, compute_dtype=torch.float32, quant_type="nf4", device="meta")
    packed.weight = bitsandbytes.nn.Params4bit(
        dense.weight.detach().clone(), requires_grad=False, quant_type="nf4", module=packed
    ).to("cpu")
    packed.bias = nn.Parameter(dense.bias.detach().clone(), requires_grad=False)
    packed.support_avx512bf16_for_cpu = False  # its eval mode would compute in bfloat16
    their_config = peft.LoraConfig(r=3, lora_alpha=8, target_modules=["0"])
    theirs = peft.get_peft_model(nn.Sequential(packed), their_config).base_model.model[0]
    ours = qlora.attach(nn.Sequential(dense), qlora.Config(rank=3, alpha=8, targets=("0",)), generator())
    layer = ours.layers["0"]
    warm(ours.tensors(), generator(2))
    state = theirs.base_layer.weight.quant_state
    bytes_of = {"absmax": state.absmax, "absmax2": state.state2.absmax, "offset": state.offset}
    with torch.no_grad():
        for name, tensor in ({"codes": theirs.base_layer.weight.data.flatten()} | bytes_of).items():
            layer.state()[name].copy_(tensor)
        theirs.lora_A["default"].weight.copy_(layer.A)
        theirs.lora_B["default"].weight.copy_(layer.B)
    x, dy = draw(9, 128, dtype=torch.float32), draw(9, 48, seed=2, dtype=torch.float32)

    def run(forward: Any, tensors: list[Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        leaf = x.to(dtype).requires_grad_(True)
        y = forward(leaf)
        return dict(zip("yxAB", [y, *torch.autograd.grad(y, [leaf, *tensors], dy.to(dtype))], strict=True))

    have = run(theirs, [theirs.lora_A["default"].weight, theirs.lora_B["default"].weight], torch.float32)
    rounded = run(layer, [layer.A, layer.B], torch.float32)
    layer.double()
    for name in ("absmax2", "offset"):
        assert torch.equal(layer.state()[name].float(), bytes_of[name])
    truth = run(layer, [layer.A, layer.B], torch.float64)
    judged = noise_floor(have, truth, rounded, "float32")
    assert judged.passed, judged


def test_a_packed_base_is_decoded_and_quantised_anew() -> None:
    dense = nn.Linear(128, 48)
    first = qlora.attach(nn.Sequential(dense), qlora.Config(targets=("0",), double_quant=False), generator())
    packed = bitsandbytes.nn.Linear4bit(
        128, 48, compute_dtype=torch.float32, compress_statistics=False, quant_type="nf4", device="meta"
    )
    packed.weight = bitsandbytes.nn.Params4bit(
        dense.weight.detach().clone(), requires_grad=False, compress_statistics=False, quant_type="nf4", module=packed
    ).to("cpu")
    packed.bias = nn.Parameter(dense.bias.detach().clone(), requires_grad=False)
    packed.support_avx512bf16_for_cpu = False
    again = qlora.attach(nn.Sequential(packed), qlora.Config(targets=("0",), double_quant=False), generator())
    assert exact(again.state(), first.state()).passed  # with one level of constants, quantising twice changes nothing


def test_rank_and_alpha_give_the_scaling() -> None:
    for rank, alpha in ((1, 2.0), (4, 0.5), (16, 16.0)):
        assert attached(rank=rank, alpha=alpha).layers["v_proj"].scaling == alpha / rank
    bound = 1 / math.sqrt(12)
    assert float(attached(rank=64).layers["q_proj"].A.detach().abs().max()) <= bound


@DOUBLE
def test_codes_and_constants_stay_as_they_are_when_the_model_is_cast(double: bool) -> None:
    adapted = attached("float32", double_quant=double)
    before = {name: t.clone() for name, t in adapted.state().items()}
    for dtype in (torch.bfloat16, torch.float64):
        adapted.model.to(dtype)
        assert unchanged(adapted.state(), before).passed
    adapted.model.to("meta")
    assert {t.device.type for t in adapted.state().values()} == {"meta"}
