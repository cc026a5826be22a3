"""DoRA's reference against the paper's formulas written out by hand, and against HF peft."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from harness.conformance.comparison.tolerance_policies import exact, noise_floor
from harness.conformance.subject import DTYPES, configure, warm
from harness.methods.implementations.bitsandbytes.weights import nf4
from reference import dora, lora
from reference.shared.layers import dense_copy, dense_weight
from support.two_layer_model import Two, draw, generator

both_axes = pytest.mark.parametrize("per", ["output", "input"])
every_dtype = pytest.mark.parametrize("dtype", DTYPES)


def attached(dtype: str = "float64", model: nn.Module | None = None, **config: Any) -> Any:
    given = configure("dora", {"rank": 3, "alpha": 8, **config})
    return dora.attach(Two(DTYPES[dtype]) if model is None else model, given, generator(5))


def warmed(dtype: str = "float64", **config: Any) -> Any:
    adapted = attached(dtype, **config)
    warm(adapted.tensors(), generator(6))
    return adapted


def one(W: list[list[float]], A: list[list[float]], B: list[list[float]], **config: Any) -> dora.DoraLinear:
    """Return a layer of float64 with these matrices, alpha = r."""
    base = nn.Linear(len(W[0]), len(W), dtype=torch.float64)
    base.weight = nn.Parameter(torch.tensor(W, dtype=torch.float64))
    given = {"rank": len(A), "alpha": len(A), "targets": ["0"], **config}
    layer = attached(model=nn.Sequential(base), **given).layers["0"]
    with torch.no_grad():
        layer.A.copy_(torch.tensor(A))
        layer.B.copy_(torch.tensor(B))
    return layer  # type: ignore[no-any-return]


def by_formula(layer: dora.DoraLinear, s: float) -> Tensor:
    """W' of eq. 5, one number at a time."""
    W, A, B, m = (t.detach().tolist() for t in (layer.base.weight, layer.A, layer.B, layer.m))
    E, D = len(W), len(W[0])
    V = [[W[e][d] + s * sum(B[e][k] * A[k][d] for k in range(len(A))) for d in range(D)] for e in range(E)]
    rows = [math.sqrt(sum(v * v for v in row)) for row in V]
    columns = [math.sqrt(sum(V[e][d] ** 2 for e in range(E))) for d in range(D)]
    per_output = layer.per == "output"
    made = [
        [m[e if per_output else d] * V[e][d] / (rows[e] if per_output else columns[d]) for d in range(D)]
        for e in range(E)
    ]
    return torch.tensor(made, dtype=torch.float64)


def assert_same(have: dict[str, Any], want: dict[str, Any], dtype: str = "float64") -> None:
    """Judge by the policy; `want` is in float64, and what rounding it to `dtype` loses is the noise."""
    judged = noise_floor(have, want, {n: t.to(DTYPES[dtype]) for n, t in want.items()}, dtype)
    assert judged.passed, judged


@both_axes
@pytest.mark.parametrize(("rank", "alpha"), [(1, 2.0), (3, 8.0), (16, 16.0)])
def test_forward_is_the_papers_formula(per: str, rank: int, alpha: float) -> None:
    layer = warmed(per=per, rank=rank, alpha=alpha).layers["q_proj"]
    x = draw(5, 12)
    want = torch.einsum("td,ed->te", x, by_formula(layer, alpha / rank)) + layer.base.bias
    assert_same({"y": layer(x).detach()}, {"y": want.detach()})


def test_a_small_example_is_exact() -> None:
    # V' = [[3, 4], [5, 12]], of norms 5 and 13; per input, sqrt(34) and sqrt(160).
    layer = one([[3.0, 4.0], [5.0, 4.0]], A=[[0.0, 2.0]], B=[[0.0], [4.0]])
    assert layer.m.tolist() == [5.0, math.sqrt(41)]
    with torch.no_grad():
        layer.m.copy_(torch.tensor([10.0, 26.0]))
        layer.base.bias.copy_(torch.tensor([1.0, -1.0]))
    assert layer.merged().weight.tolist() == [[6.0, 8.0], [10.0, 24.0]]
    assert layer(torch.tensor([[1.0, 2.0]], dtype=torch.float64)).tolist() == [[23.0, 57.0]]


def test_per_input_the_columns_are_normed() -> None:
    layer = one([[3.0, 5.0], [4.0, 4.0]], A=[[0.0, 2.0]], B=[[0.0], [4.0]], per="input")
    assert layer.m.tolist() == [5.0, math.sqrt(41)]
    with torch.no_grad():
        layer.m.copy_(torch.tensor([10.0, 26.0]))
    assert layer.merged().weight.tolist() == [[6.0, 10.0], [8.0, 24.0]]


@both_axes
@every_dtype
def test_at_the_start_the_model_is_the_base_model(per: str, dtype: str) -> None:
    x = draw(5, 12, dtype=DTYPES[dtype])
    want = Two(DTYPES[dtype]).requires_grad_(False)(x)
    adapted = attached(dtype, per=per)
    assert torch.equal(adapted.model(x), want)
    adapted.merge()
    for path in adapted.layers:
        assert torch.equal(adapted.model.get_submodule(path).weight, Two(DTYPES[dtype]).get_submodule(path).weight)


def test_a_starts_as_loras() -> None:
    have = attached().tensors()
    want = lora.attach(Two(), lora.Config(rank=3, alpha=8.0), generator(5)).tensors()
    assert exact({n: have[n] for n in want}, want).passed


@both_axes
def test_detached_gradients_are_those_of_equation_11(per: str) -> None:
    layer = warmed(per=per).layers["q_proj"]
    x, dy = draw(5, 12).requires_grad_(True), draw(5, 10, seed=2)
    layer(x).backward(dy)
    s, W, A, B, m = 8 / 3, *(t.detach() for t in (layer.base.weight, layer.A, layer.B, layer.m))
    V = W + s * torch.einsum("ek,kd->ed", B, A)
    across = 1 if per == "output" else 0
    C = V.square().sum(across, keepdim=True).sqrt()
    scaled = m.unsqueeze(across) / C
    dW = torch.einsum("te,td->ed", dy, x.detach())
    want = {
        "x": torch.einsum("te,ed->td", dy, scaled * V),
        "A": s * torch.einsum("ek,ed->kd", B, scaled * dW),  # eq. 11: m / C times the gradient of W'
        "B": s * torch.einsum("ed,kd->ek", scaled * dW, A),
        "m": (dW * V / C).sum(across),  # eq. 7
    }
    assert_same({"x": x.grad, "A": layer.A.grad, "B": layer.B.grad, "m": layer.m.grad}, want)
    assert layer.base.weight.grad is None


def test_the_whole_gradient_is_that_of_equation_6() -> None:
    detached, whole = warmed().layers["q_proj"], warmed(detach_norm=False).layers["q_proj"]
    x, dy = draw(5, 12), draw(5, 10, seed=2)
    for layer in (detached, whole):
        layer(x).backward(dy)
    assert torch.equal(detached.m.grad, whole.m.grad)
    W, A, B, m = (t.detach() for t in (whole.base.weight, whole.A, whole.B, whole.m))
    V = W + 8 / 3 * torch.einsum("ek,kd->ed", B, A)
    C = V.square().sum(1, keepdim=True).sqrt()
    G = m[:, None] / C * torch.einsum("te,td->ed", dy, x)
    G = G - (G * V).sum(1, keepdim=True) * V / C**2  # (I - V' V'^T / ||V'||^2)
    assert_same(
        {"A": whole.A.grad, "B": whole.B.grad},
        {"A": 8 / 3 * torch.einsum("ek,ed->kd", B, G), "B": 8 / 3 * torch.einsum("ed,kd->ek", G, A)},
    )
    assert not torch.equal(detached.B.grad, whole.B.grad)


@both_axes
def test_autograd_agrees_with_finite_differences(per: str) -> None:
    x = draw(2, 2, 12).requires_grad_(True)
    layer = warmed(per=per, detach_norm=False).layers["q_proj"]
    assert torch.autograd.gradcheck(lambda x, A, B, m: layer(x), (x, layer.A, layer.B, layer.m))
    layer = warmed(per=per).layers["q_proj"]
    assert torch.autograd.gradcheck(lambda x, m: layer(x), (x, layer.m))  # the norm depends on neither


@both_axes
@every_dtype
@pytest.mark.parametrize("detach", [True, False])
def test_rows_of_zeros(per: str, dtype: str, detach: bool) -> None:
    model = Two(DTYPES[dtype])
    with torch.no_grad():
        (model.q_proj.weight if per == "output" else model.q_proj.weight.T)[4] = 0
    layer = attached(dtype, model, per=per, detach_norm=detach).layers["q_proj"]
    x = draw(5, 12, dtype=DTYPES[dtype]).requires_grad_(True)
    start = layer(x)
    assert torch.equal(start, layer.base(x))
    start.square().sum().backward()
    assert all(bool(t.grad.isfinite().all()) for t in (x, layer.A, layer.B, layer.m))
    assert layer.m[4] == 0
    assert layer.m.grad[4] == 0
    assert bool(layer.B.grad[3].any())  # the others learn
    if per == "output":
        assert not layer.B.grad[4].any()
    with torch.no_grad():
        layer.m.fill_(1)
    layer.B.grad = None
    layer(x).square().sum().backward()
    assert layer.m.grad[4] == 0
    if per == "output":
        assert not layer.B.grad[4].any()  # a row without a direction: the smallest subgradient
    zeroed = layer.merged().weight
    assert not (zeroed if per == "output" else zeroed.T)[4].any()  # whatever m is
    with torch.no_grad():
        layer.B.fill_(1)
    assert layer(x).isfinite().all()
    revived = layer.merged().weight.double()
    assert bool((revived if per == "output" else revived.T)[4].any())  # it has a direction now


@both_axes
def test_rows_of_the_merged_weight_have_the_norm_m(per: str) -> None:
    adapted = warmed(per=per)
    for layer in adapted.layers.values():
        merged = layer.merged().weight
        assert_same({"norm": dora.norms(merged, per)}, {"norm": layer.m.detach().abs()})
        assert layer.m.shape == ((layer.base.out_features if per == "output" else layer.base.in_features),)


def test_a_multiple_of_m_is_that_multiple_of_the_weight() -> None:
    layer = warmed().layers["q_proj"]
    before = layer.merged().weight.clone()
    with torch.no_grad():
        layer.m.mul_(-4)
    assert torch.equal(layer.merged().weight, -4 * before)
    with torch.no_grad():  # and the length of V' is of no account, only its direction
        layer.base.weight.mul_(8)
        layer.B.mul_(8)
    assert torch.equal(layer.merged().weight, -4 * before)


@both_axes
def test_dropout_does_not_affect_the_base(per: str) -> None:
    layer = warmed(dropout=0.5, per=per).layers["q_proj"].train()
    x = draw(5, 12)
    torch.manual_seed(11)
    have = layer(x)
    torch.manual_seed(11)
    dropped = nn.functional.dropout(x, 0.5)
    assert not torch.equal(dropped, x)
    W = layer.base.weight.detach()
    added = torch.einsum("td,ed->te", dropped, by_formula(layer, 8 / 3) - W)  # (g - 1) W0 + g s B A = W' - W0
    assert_same({"y": have.detach()}, {"y": (layer.base(x) + added).detach()})
    assert_same({"y": layer.eval()(x).detach()}, {"y": (layer.base(x) + x @ (by_formula(layer, 8 / 3) - W).T).detach()})


@both_axes
@every_dtype
def test_merged_is_unmerged(per: str, dtype: str) -> None:
    adapted = warmed(dtype, per=per)
    for path, layer in adapted.layers.items():
        x = draw(9, layer.base.in_features, dtype=DTYPES[dtype])
        twin = dora.DoraLinear(
            dense_copy(layer.base).double(), layer.A.double(), layer.B.double(), dora.Config(3, 8.0, per=per)
        )
        with torch.no_grad():
            twin.m.copy_(layer.m)
        want, before = twin(x.double()).detach(), layer(x).detach()
        adapted.merge()
        merged = adapted.model.get_submodule(path)
        assert type(merged) is nn.Linear
        judged = noise_floor({"y": merged(x)}, {"y": want}, {"y": before}, dtype)
        assert judged.passed, judged
        adapted.unmerge()
        assert torch.equal(adapted.model.get_submodule(path)(x), before)


def test_merging_and_detaching_leave_every_bit_of_the_base() -> None:
    adapted = warmed("bfloat16")
    before = {n: t.clone() for n, t in adapted.model.state_dict().items()}
    adapted.merge()
    adapted.unmerge()
    assert exact(adapted.model.state_dict(), before).passed
    adapted.detach()
    assert exact(adapted.model.state_dict(), Two(torch.bfloat16).state_dict()).passed


@pytest.mark.parametrize("shape", [(12,), (0, 12), (2, 3, 4, 12)])
@both_axes
def test_any_leading_shape(shape: tuple[int, ...], per: str) -> None:
    layer = warmed(per=per).layers["q_proj"]
    x = draw(*shape)
    want = x.reshape(-1, 12) @ by_formula(layer, 8 / 3).T + layer.base.bias
    assert_same({"y": layer(x).detach()}, {"y": want.detach().view(*shape[:-1], 10)})


def test_only_the_adapter_trains() -> None:
    adapted = attached()
    trains = [p for p in adapted.model.parameters() if p.requires_grad]
    assert {id(p) for p in trains} == {id(p) for p in adapted.parameters()}
    assert sum(p.numel() for p in trains) == 3 * (12 + 10) + 10 + 3 * (10 + 7) + 7
    assert adapted.state() == {}


def test_an_unknown_target_is_named() -> None:
    with pytest.raises(ValueError, match=r"no linear, .*, Conv2d or Conv3d layer is named 'k_proj'"):
        attached(targets=("q_proj", "k_proj"))


def test_a_base_of_four_bits() -> None:
    pytest.importorskip("bitsandbytes")
    model = nn.Sequential(nn.Linear(64, 10))
    nf4(model, ["0"], torch.float32)
    x = draw(5, 64, dtype=torch.float32)
    start = model[0](x).detach()
    layer = attached(model=model, targets=("0",)).layers["0"]
    assert torch.equal(layer(x), start)
    warm(layer.tensors(), generator(6))
    plain = nn.Linear(64, 10, dtype=torch.float64)
    plain.weight, plain.bias = (
        nn.Parameter(dense_weight(layer.base).double()),
        nn.Parameter(layer.base.bias.detach().double()),
    )
    twin = attached(model=nn.Sequential(plain), targets=("0",)).layers["0"]
    with torch.no_grad():
        for name, tensor in twin.tensors().items():
            tensor.copy_(layer.tensors()[name])
    want = twin(x.double()).detach()
    noise = dora.DoraLinear(dense_copy(layer.base), layer.A, layer.B, dora.Config(3, 8.0))
    noise.m = layer.m
    judged = noise_floor({"y": layer(x)}, {"y": want}, {"y": noise(x)}, "float32")
    assert judged.passed, judged


def peft_of(model: nn.Module, dropout: float = 0.0) -> Any:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=3, lora_alpha=8, target_modules=["q_proj", "v_proj"], use_dora=True, lora_dropout=dropout
    )
    return peft.get_peft_model(model, config, autocast_adapter_dtype=False).base_model.model


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_peft_computes_the_same(dropout: float) -> None:
    mine, theirs = attached(dropout=dropout), peft_of(Two(), dropout)
    for path in mine.layers:
        assert torch.equal(theirs.get_submodule(path).lora_magnitude_vector["default"].weight, mine.layers[path].m)
    warm(mine.tensors(), generator(6))
    x, dy = draw(5, 12), draw(5, 7, seed=2)
    seen = []
    for path, layer in mine.layers.items():
        other = theirs.get_submodule(path)
        pairs = {"A": other.lora_A["default"].weight, "B": other.lora_B["default"].weight}
        pairs["m"] = other.lora_magnitude_vector["default"].weight
        with torch.no_grad():
            for name, tensor in layer.tensors().items():
                pairs[name].copy_(tensor)
        seen += [(f"{path}.{name}", pairs[name], tensor) for name, tensor in layer.tensors().items()]
    outputs = []
    for model in (theirs, mine.model):
        torch.manual_seed(11)
        outputs.append(model.train()(x))
        outputs[-1].backward(dy)
    assert_same({"y": outputs[0].detach()}, {"y": outputs[1].detach()})
    assert_same({n: t.grad for n, t, _ in seen}, {n: t.grad for n, _, t in seen})
