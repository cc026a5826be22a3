"""LoHa's reference against the paper's formula written out by hand, and against HF peft."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from harness.conformance.comparison.tolerance_policies import exact, noise_floor
from harness.conformance.subject import DTYPES, configure, warm
from harness.methods.implementations.bitsandbytes.weights import nf4
from reference import loha
from reference.shared.layers import dense_copy
from reference.shared.row_dropout import RowDropout
from support.two_layer_model import Two, assert_same, draw, generator

every_dtype = pytest.mark.parametrize("dtype", DTYPES)


def attached(dtype: str = "float64", model: nn.Module | None = None, **config: Any) -> Any:
    given = configure("loha", {"rank": 3, "alpha": 40.0, **config})
    return loha.attach(Two(DTYPES[dtype]) if model is None else model, given, generator(5))


def warmed(dtype: str = "float64", **config: Any) -> Any:
    adapted = attached(dtype, **config)
    warm(adapted.tensors(), generator(6))
    return adapted


def update_by_formula(layer: loha.LohaLinear, scaling: float) -> Tensor:
    """gamma (B1 A1) * (B2 A2) of eq. 3, one number at a time."""
    A1, B1, A2, B2 = (t.detach().tolist() for t in (layer.A1, layer.B1, layer.A2, layer.B2))
    rank = range(len(A1))
    made = [
        [
            scaling * sum(B1[e][k] * A1[k][d] for k in rank) * sum(B2[e][k] * A2[k][d] for k in rank)
            for d in range(len(A1[0]))
        ]
        for e in range(len(B1))
    ]
    return torch.tensor(made, dtype=torch.float64)


@pytest.mark.parametrize(("rank", "alpha"), [(1, 8.0), (3, 40.0), (16, 2.0)])
@pytest.mark.parametrize("path", ["q_proj", "v_proj"])
def test_forward_is_the_papers_formula(rank: int, alpha: float, path: str) -> None:
    layer = warmed(rank=rank, alpha=alpha).layers[path]
    x = draw(5, layer.base.in_features)
    want = layer.base(x) + x @ update_by_formula(layer, alpha / rank).T
    assert_same({"y": layer(x).detach()}, {"y": want.detach()})


def test_a_small_example_is_exact() -> None:
    model = nn.Sequential(nn.Linear(2, 2, dtype=torch.float64))
    layer = attached(model=model, rank=1, alpha=2.0, targets=("0",)).layers["0"]
    values = {
        layer.base.weight: [[1.0, 0.0], [0.0, 1.0]],
        layer.base.bias: [5.0, -5.0],
        layer.A1: [[1.0, 2.0]],
        layer.B1: [[1.0], [3.0]],
        layer.A2: [[5.0, -1.0]],
        layer.B2: [[1.0], [2.0]],
    }
    with torch.no_grad():
        for tensor, value in values.items():
            tensor.copy_(torch.tensor(value))
    # B1 A1 = [[1, 2], [3, 6]]; B2 A2 = [[5, -1], [10, -2]]; element by element [[5, -2], [30, -12]], twice.
    assert layer.merged().weight.tolist() == [[11.0, -4.0], [60.0, -23.0]]
    assert layer(torch.tensor([[1.0, 1.0]], dtype=torch.float64)).tolist() == [[12.0, 32.0]]


def test_the_update_has_the_square_of_the_rank() -> None:
    model = nn.Sequential(nn.Linear(30, 30, dtype=torch.float64))
    adapted = attached(model=model, rank=4, targets=("0",))
    warm(adapted.tensors(), generator(6))
    assert torch.linalg.matrix_rank(adapted.layers["0"].delta()) == 16


def test_gradients_are_those_of_the_formula() -> None:
    layer = warmed().layers["q_proj"]
    x, dy = draw(5, 12).requires_grad_(True), draw(5, 10, seed=2)
    layer(x).backward(dy)
    A1, B1, A2, B2 = (t.detach() for t in (layer.A1, layer.B1, layer.A2, layer.B2))
    G = 40 / 3 * torch.einsum("te,td->ed", dy, x.detach())
    want = {
        "x": dy @ (layer.base.weight.detach() + update_by_formula(layer, 40 / 3)),
        "A1": torch.einsum("ek,ed->kd", B1, G * (B2 @ A2)),
        "B1": torch.einsum("kd,ed->ek", A1, G * (B2 @ A2)),
        "A2": torch.einsum("ek,ed->kd", B2, G * (B1 @ A1)),
        "B2": torch.einsum("kd,ed->ek", A2, G * (B1 @ A1)),
    }
    assert_same({"x": x.grad, **{name: t.grad for name, t in layer.tensors().items()}}, want)
    assert layer.base.weight.grad is None


def test_autograd_agrees_with_finite_differences() -> None:
    layer = warmed().layers["q_proj"]
    inputs = (draw(2, 12).requires_grad_(True), *layer.tensors().values())
    assert torch.autograd.gradcheck(lambda x, *_: layer(x), inputs)


@every_dtype
def test_at_the_start_the_model_is_the_base_model(dtype: str) -> None:
    x = draw(5, 12, dtype=DTYPES[dtype])
    want = Two(DTYPES[dtype]).requires_grad_(False)(x)
    adapted = attached(dtype)
    assert torch.equal(adapted.model(x), want)
    adapted.model(x).square().sum().backward()
    for name, tensor in adapted.tensors().items():  # only A2 learns in the first step
        assert bool(tensor.grad.any()) == name.endswith(".A2"), name


def test_the_start_is_that_of_peft() -> None:
    peft = pytest.importorskip("peft")
    model = nn.Sequential(nn.Linear(400, 300))
    mine = attached("float32", model=model, rank=64, targets=("0",)).layers["0"]
    config = peft.LoHaConfig(r=64, target_modules=["0"])
    theirs = peft.get_peft_model(nn.Sequential(nn.Linear(400, 300)), config).base_model.model[0]
    for name, other in {"A1": theirs.hada_w1_b, "B1": theirs.hada_w1_a, "B2": theirs.hada_w2_a}.items():
        bound = mine.tensors()[name].shape[1] ** -0.5
        for drawn in (mine.tensors()[name], other["default"]):
            values = ((drawn.detach().double() / bound + 1) / 2).flatten().sort().values
            observed = torch.arange(1, len(values) + 1) / len(values)
            # Kolmogorov's statistic against the uniform; 1.95 / sqrt(n) is passed by chance once in a thousand.
            assert float((values - observed).abs().max()) < 1.95 * len(values) ** -0.5, name
    assert not mine.A2.any()
    assert not theirs.hada_w2_b["default"].any()


def test_it_trains_twice_the_numbers_of_lora() -> None:
    adapted = attached(rank=3)
    trains = [p for p in adapted.model.parameters() if p.requires_grad]
    assert {id(p) for p in trains} == {id(p) for p in adapted.parameters()}
    assert sum(p.numel() for p in trains) == 2 * 3 * (12 + 10) + 2 * 3 * (10 + 7)


def test_rank_dropout_drops_rows_and_divides_by_the_share_that_remains() -> None:
    layer = warmed(rank_dropout=0.4).layers["q_proj"].train()
    x = draw(5, 12)
    torch.manual_seed(11)
    have = layer(x)
    torch.manual_seed(11)
    kept = torch.rand(10) >= 0.4
    assert 0 < int(kept.sum()) < 10
    update = update_by_formula(layer, 40 / 3) * (kept.double() * 10 / kept.sum())[:, None]
    assert_same({"y": have.detach()}, {"y": (layer.base(x) + x @ update.T).detach()})
    whole = layer.base(x) + x @ update_by_formula(layer, 40 / 3).T
    assert_same({"y": layer.eval()(x).detach()}, {"y": whole.detach()})


def test_rank_dropout_of_every_row_leaves_the_base() -> None:
    dropout = RowDropout(0.99).train()
    torch.manual_seed(0)
    delta = draw(1, 6)
    seen = {float(dropout(delta).norm() / delta.norm()) for _ in range(500)}
    assert seen == {0.0, 1.0}


@every_dtype
@pytest.mark.parametrize("rank_dropout", [0.0, 0.5])
def test_merged_is_unmerged(dtype: str, rank_dropout: float) -> None:
    adapted = warmed(dtype, rank_dropout=rank_dropout)
    for path, layer in adapted.layers.items():
        x = draw(9, layer.base.in_features, dtype=DTYPES[dtype])
        given = (t.detach().double() for t in (layer.A1, layer.B1, layer.A2, layer.B2))
        want = loha.LohaLinear(dense_copy(layer.base).double(), *given, 40 / 3, 0.0)(x.double()).detach()
        before = layer.eval()(x).detach()
        layer.train()
        adapted.merge()  # in training mode, which must drop nothing
        merged = adapted.model.get_submodule(path)
        assert type(merged) is nn.Linear
        judged = noise_floor({"y": merged(x).detach()}, {"y": want}, {"y": before}, dtype)
        assert judged.passed, judged
        adapted.unmerge()
        assert torch.equal(adapted.model.get_submodule(path).eval()(x), before)


def test_merging_and_detaching_leave_every_bit_of_the_base() -> None:
    adapted = warmed("bfloat16")
    before = {n: t.clone() for n, t in adapted.model.state_dict().items()}
    adapted.merge()
    adapted.unmerge()
    assert exact(adapted.model.state_dict(), before).passed
    adapted.detach()
    assert exact(adapted.model.state_dict(), Two(torch.bfloat16).state_dict()).passed


def test_an_unknown_target_is_named() -> None:
    with pytest.raises(ValueError, match="no linear layer is named 'k_proj'"):
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
    given = [t.detach() for t in (layer.A1, layer.B1, layer.A2, layer.B2)]
    on_dense = loha.LohaLinear(dense_copy(layer.base), *given, 40 / 3, 0.0)
    truth = loha.LohaLinear(dense_copy(layer.base).double(), *(t.double() for t in given), 40 / 3, 0.0)
    want = {"y": truth(x.double()).detach()}
    for y in (layer(x), layer.merged()(x)):
        judged = noise_floor({"y": y.detach()}, want, {"y": on_dense(x)}, "float32")
        assert judged.passed, judged
