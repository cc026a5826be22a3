"""PiSSA's reference against matrices whose SVD is known, against the paper's letters, and against HF peft."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from harness.conformance.comparison.tolerance_policies import exact, noise_floor
from harness.methods.implementations.bitsandbytes.weights import nf4
from reference import lora, pissa
from reference.pissa import Config
from reference.shared.layers import dense_weight
from support.two_layer_model import Two, assert_same, draw, generator

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
every_dtype = pytest.mark.parametrize("dtype", DTYPES)
each_svd = pytest.mark.parametrize("niter", [0, 4])
each_shape = pytest.mark.parametrize(("out", "inp"), [(10, 12), (12, 10), (9, 9)])


def attached(dtype: str = "float64", **config: Any) -> Any:
    return pissa.attach(Two(DTYPES[dtype]), Config(**{"rank": 3, "alpha": 8.0, **config}), generator(5))


@torch.no_grad()
def warmed(dtype: str = "float64", **config: Any) -> Any:
    adapted = attached(dtype, **config)
    for seed, tensor in enumerate(adapted.tensors().values(), start=20):
        tensor.copy_(draw(*tensor.shape, seed=seed))
    return adapted


def known(out: int, inp: int, decay: float = 2.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (W, U, S, Vt): a matrix of these sizes whose singular values fall by `decay` each."""
    k = min(out, inp)
    U, V = torch.linalg.qr(draw(out, k, seed=7)).Q, torch.linalg.qr(draw(inp, k, seed=8)).Q
    S = 3 * decay ** -torch.arange(k, dtype=torch.float64)
    return (U * S) @ V.T, U, S, V.T


def assert_near(have: Tensor, want: Tensor, S: Tensor, rank: int) -> None:
    """Judge what comes of an SVD in float64: a vector moves by the error of W over the gap to its neighbours."""
    gap = float((S[:rank] - S[1 : rank + 1]).min())
    eps = torch.finfo(torch.float64).eps
    assert float((have - want).abs().max()) <= 8 * eps * max(want.shape) * float(S[0]) / gap * float(want.abs().max())


def unsigned(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Flip A (R, D) and B (E, R) to the reference's signs, one component at a time."""
    A, B = A.clone(), B.clone()
    for r in range(len(A)):
        if A[r][int(A[r].abs().argmax())] < 0:
            A[r], B[:, r] = -A[r], -B[:, r]
    return A, B


@each_svd
@each_shape
@pytest.mark.parametrize("alpha", [3.0, 12.0, 0.5])
def test_the_factors_equal_those_of_a_known_svd(out: int, inp: int, alpha: float, niter: int) -> None:
    W, U, S, Vt = known(out, inp, decay=8.0)
    s = alpha / 3
    A, B, residual = pissa.split(W, Config(rank=3, alpha=alpha, niter=8 * niter), torch.float64, generator())
    want_A, want_B = unsigned((S[:3] / s).sqrt()[:, None] * Vt[:3], U[:, :3] * (S[:3] / s).sqrt())
    assert_near(A, want_A, S, 3)
    assert_near(B, want_B, S, 3)
    assert_near(s * B @ A, (U[:, :3] * S[:3]) @ Vt[:3], S, 3)
    assert_near(W - residual, (U[:, :3] * S[:3]) @ Vt[:3], S, 3)


@each_shape
def test_each_component_is_split_evenly(out: int, inp: int) -> None:
    A, B, _ = pissa.split(known(out, inp)[0], Config(rank=3, alpha=12), torch.float64, generator())
    want = torch.diag(known(out, inp)[2][:3] / 4)
    assert_same({"A A^T": A @ A.T, "B^T B": B.T @ B}, {"A A^T": want, "B^T B": want})


def test_the_papers_factors_are_transposed() -> None:
    # Y = X W with W (in, out): A = U sqrt(S), B = sqrt(S) V^T of that W, not of the stored W^T.
    stored, _, S, _ = known(10, 12)
    U, found, Vt = torch.linalg.svd(stored.T, full_matrices=False)
    paper_A, paper_B = U[:, :3] * found[:3].sqrt(), found[:3].sqrt()[:, None] * Vt[:3]
    A, B, _ = pissa.split(stored, Config(rank=3, alpha=3), torch.float64, generator())
    want_A, want_B = unsigned(paper_A.T, paper_B.T)
    assert_near(A, want_A, S, 3)
    assert_near(B, want_B, S, 3)


@each_svd
@every_dtype
def test_at_the_start_residual_and_factors_make_up_the_weight(dtype: str, niter: int) -> None:
    adapted = attached(dtype, niter=niter)
    for path, layer in adapted.layers.items():
        W, residual = (t.detach().double() for t in (layer.base.weight, layer.residual))
        A, B, s = layer.A.detach().double(), layer.B.detach().double(), 8 / 3
        assert layer.residual.dtype == layer.A.dtype == layer.B.dtype == DTYPES[dtype], path
        # One rounding of the residual; before it a sum of 3 products and a difference, in float32 or float64.
        inside = (
            torch.finfo(torch.promote_types(DTYPES[dtype], torch.float32)).eps
            * (3 + 2)
            * (s * B.abs() @ A.abs() + W.abs())
        )
        tiny = torch.finfo(DTYPES[dtype]).tiny * torch.finfo(DTYPES[dtype]).eps  # where the residual is subnormal
        bound = torch.finfo(DTYPES[dtype]).eps / 2 * residual.abs() + inside + tiny
        assert bool(((residual + s * B @ A - W).abs() <= bound).all()), path
        assert float(residual.norm()) < float(W.norm())


@each_svd
@every_dtype
def test_at_the_start_the_model_is_the_base_model(dtype: str, niter: int) -> None:
    x = draw(5, 12, dtype=DTYPES[dtype])
    base = Two(DTYPES[dtype])
    layer = attached(dtype, niter=niter).layers["q_proj"]
    want = x.double() @ base.q_proj.weight.detach().double().T + base.q_proj.bias.detach().double()
    # The base's own rounding, and one more of each: three sums instead of one.
    rounded = {"y": want + 3 * (base.q_proj(x).detach().double() - want)}
    judged = noise_floor({"y": layer(x)}, {"y": want}, rounded, dtype)
    assert judged.passed, judged


def test_forward_and_gradients_are_those_of_equation_5() -> None:
    layer = warmed().layers["q_proj"]
    x, dy, s = draw(5, 12).requires_grad_(True), draw(5, 10, seed=2), 8 / 3
    A, B, W, X = layer.A.detach(), layer.B.detach(), layer.residual, x.detach()
    y = layer(x)
    y.backward(dy)
    want = {
        "y": torch.einsum("td,ed->te", X, W) + s * torch.einsum("td,kd,ek->te", X, A, B) + layer.base.bias.detach(),
        "x": torch.einsum("te,ed->td", dy, W) + s * torch.einsum("te,ek,kd->td", dy, B, A),
        "A": s * torch.einsum("te,ek,td->kd", dy, B, X),
        "B": s * torch.einsum("te,kd,td->ek", dy, A, X),
    }
    assert_same({"y": y.detach(), "x": x.grad, "A": layer.A.grad, "B": layer.B.grad}, want)
    assert torch.autograd.gradcheck(lambda x, A, B: layer(x), (draw(2, 2, 12).requires_grad_(True), layer.A, layer.B))


def test_the_output_uses_only_the_bias_of_the_base() -> None:
    layer, x = warmed().layers["q_proj"], draw(5, 12)
    before = layer(x)
    with torch.no_grad():
        layer.base.weight.fill_(torch.nan)
    assert torch.equal(layer(x), before)
    with torch.no_grad():
        layer.base.bias += 1
    assert not torch.equal(layer(x), before)


def test_both_factors_have_a_gradient_from_the_first_step_and_nothing_else_trains() -> None:
    adapted = attached()
    adapted.model(draw(5, 12)).square().sum().backward()
    assert all(bool(t.grad.any()) for t in adapted.tensors().values())
    trains = [p for p in adapted.model.parameters() if p.requires_grad]
    assert {id(p) for p in trains} == {id(p) for p in adapted.parameters()}
    assert sum(p.numel() for p in trains) == 3 * (12 + 10) + 3 * (10 + 7)
    assert set(adapted.tensors()) == {"q_proj.A", "q_proj.B", "v_proj.A", "v_proj.B"}
    assert {n: t.shape for n, t in adapted.state().items()} == {"q_proj.residual": (10, 12), "v_proj.residual": (7, 10)}
    assert not any(t.requires_grad for t in adapted.state().values())


@each_svd
def test_detaching_restores_the_unchanged_base(niter: int) -> None:
    adapted, x = attached(niter=niter), draw(5, 12)
    bases = {path: layer.base for path, layer in adapted.layers.items()}
    adapted.detach()
    assert all(adapted.model.get_submodule(path) is base for path, base in bases.items())
    assert exact(adapted.model.state_dict(), Two().state_dict()).passed
    assert torch.equal(adapted.model(x), Two().requires_grad_(False)(x))


@every_dtype
def test_merged_is_unmerged_and_unmerging_leaves_every_bit(dtype: str) -> None:
    adapted, x = warmed(dtype), draw(9, 12, dtype=DTYPES[dtype])
    held, layer = {n: t.clone() for n, t in adapted.model.state_dict().items()}, adapted.layers["q_proj"]
    dense = layer.residual.double() + 8 / 3 * layer.B.detach().double() @ layer.A.detach().double()
    want, rounded = {"y": x.double() @ dense.T + layer.base.bias.detach().double()}, {"y": layer(x).detach()}
    adapted.merge()
    assert type(adapted.model.q_proj) is nn.Linear
    judged = noise_floor({"y": adapted.model.q_proj(x)}, want, rounded, dtype)
    assert judged.passed, judged
    adapted.unmerge()
    assert exact(adapted.model.state_dict(), held).passed


@each_svd
def test_signs_do_not_depend_on_the_svd(niter: int) -> None:
    for layer in attached(niter=niter).layers.values():
        A, B = layer.A.detach(), layer.B.detach()
        assert all(float(row[int(row.abs().argmax())]) > 0 for row in A)
        for flip in (torch.tensor([-1.0, 1, 1]), torch.tensor([1.0, -1, -1])):
            U, Vt = pissa.signed(B * flip, A * flip[:, None])
            assert torch.equal(U, B)
            assert torch.equal(Vt, A)
    tie = torch.tensor([[1.0, -2.0, 2.0]])
    assert pissa.signed(torch.ones(1, 1), tie)[1].tolist() == [[-1.0, 2.0, -2.0]]  # the first of equals decides


@each_shape
@pytest.mark.parametrize("niter", [1, 2, 5])
def test_the_fast_svd_is_torchs_with_the_same_sketch(out: int, inp: int, niter: int) -> None:
    W, S = known(out, inp)[0], known(out, inp)[2]
    U, found, Vt = pissa.fast_svd(W, 3, niter, generator(9))
    torch.manual_seed(9)  # torch draws its sketch from global state
    U_torch, S_torch, V_torch = torch.svd_lowrank(W, 3, niter)
    assert_near(found, S_torch, S, 3)
    assert_near((U * found) @ Vt, (U_torch * S_torch) @ V_torch.T, S, 3)
    assert_same({"U": U.T @ U, "V": Vt @ Vt.T}, {"U": torch.eye(3).double(), "V": torch.eye(3).double()})


def test_the_fast_svd_nears_the_exact_one_as_it_iterates() -> None:
    W, _, S, _ = known(40, 30, decay=1.3)
    best = float(S[4:].norm())  # Eckart and Young: no matrix of rank 4 leaves less
    left = []
    for niter in (1, 2, 4, 8, 16):
        A, B, _ = pissa.split(W, Config(rank=4, alpha=4, niter=niter), torch.float64, generator(2))
        left.append(float((W - B @ A).norm()) - best)
    assert left == sorted(left, reverse=True)
    assert left[0] > 100 * left[-1] >= 0


def test_the_sketch_comes_from_the_generator_alone() -> None:
    def factor(seed: int, niter: int = 1) -> Tensor:
        return pissa.split(known(9, 9)[0], Config(rank=3, niter=niter), torch.float64, generator(seed))[0]

    torch.manual_seed(99)
    state = torch.get_rng_state()
    first = factor(1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(98)
    assert torch.equal(factor(1), first)
    assert not torch.equal(factor(2), first)
    assert torch.equal(factor(1, niter=0), factor(2, niter=0))
    untouched = generator(4)
    pissa.attach(Two(), Config(rank=3), untouched)
    assert torch.equal(untouched.get_state(), generator(4).get_state())  # the exact SVD draws nothing


@each_svd
def test_conversion_gives_a_lora_of_twice_the_rank_on_the_original_weight(niter: int) -> None:
    adapted = attached(niter=niter)
    start = {n: t.detach().clone() for n, t in adapted.tensors().items()}
    with torch.no_grad():
        for seed, tensor in enumerate(adapted.tensors().values(), start=40):
            tensor += draw(*tensor.shape, seed=seed)
    config = lora.Config(rank=6, alpha=16.0, targets=("q_proj", "v_proj"))
    other = lora.attach(Two(), config, generator())
    with torch.no_grad():
        for path in other.layers:
            names = (f"{path}.A", f"{path}.B")
            A, B = pissa.to_lora(*(start[n] for n in names), *(adapted.tensors()[n] for n in names))
            other.tensors()[f"{path}.A"].copy_(A)
            other.tensors()[f"{path}.B"].copy_(B)
    for path, layer in other.layers.items():
        x = draw(5, layer.base.in_features)
        assert_same({"y": layer(x).detach()}, {"y": adapted.layers[path](x).detach()})


@each_svd
def test_conversion_of_an_untrained_adapter_is_zero(niter: int) -> None:
    layer = attached(niter=niter).layers["q_proj"]
    A, B = pissa.to_lora(layer.A, layer.B, layer.A, layer.B)
    assert A.shape == (6, 12)
    assert B.shape == (10, 6)
    assert_same({"B A": (B[:, :3] @ A[:3]).detach()}, {"B A": -(B[:, 3:] @ A[3:]).detach()})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"rank": 8}, "rank 8: v_proj maps 10 to 7 features and has only 7 singular values"),
        ({"targets": ("k_proj",)}, "no linear, Conv1D or embedding layer is named 'k_proj'"),
    ],
)
def test_invalid_configs_leave_the_model_unchanged(config: dict[str, Any], message: str) -> None:
    model = Two()
    with pytest.raises(ValueError, match=message):
        pissa.attach(model, Config(**config), generator())
    assert type(model.q_proj) is nn.Linear
    assert all(p.requires_grad for p in model.parameters())
    pissa.attach(model, Config(rank=7), generator())  # all of v_proj: its residual is rounding


def test_the_principal_part_of_an_embedding_trains() -> None:
    table, ids = nn.Embedding(12, 10, padding_idx=3, dtype=torch.float64), torch.tensor([[0, 3, 11], [5, 5, 2]])
    table.weight.data = known(12, 10, decay=8.0)[0]
    W, y = table.weight.detach().clone(), table(ids).detach()
    config = Config(rank=3, alpha=8.0, targets=("0",))
    adapted = pissa.attach(nn.Sequential(table), config, generator())
    layer, (A, B), residual = adapted.layers["0"], adapted.tensors().values(), adapted.state()["0.residual"]
    for have, want in zip((A, B, residual), pissa.split(W.T, config, torch.float64, generator()), strict=True):
        assert_near(have.detach(), want, torch.linalg.svdvals(W), 3)
    assert_same({"y": layer(ids).detach()}, {"y": y})
    with torch.no_grad():
        A.mul_(-2).add_(0.5)
        want = (residual + 8 / 3 * B @ A).T[ids]
    assert_same({"y": layer(ids).detach()}, {"y": want})
    layer(ids).sum().backward()
    assert [int(i) for i in A.grad.abs().sum(0).nonzero()] == [0, 2, 5, 11]  # of the padding entry nothing trains
    adapted.merge()
    assert_same({"y": adapted.model(ids).detach()}, {"y": want})
    adapted.detach()
    assert adapted.model[0] is table
    assert torch.equal(table.weight, W)


def test_there_is_no_dropout() -> None:
    assert {f.name for f in fields(Config)} == {"rank", "alpha", "targets", "niter"}
    layer, x = attached().layers["q_proj"].train(), draw(5, 12)
    assert torch.equal(layer(x), layer.eval()(x))


def test_a_4_bit_base_is_split_by_its_decoded_weight() -> None:
    model = nn.Sequential(nn.Linear(64, 10))
    nf4(model, ["0"], torch.float32)
    W, x = dense_weight(model[0]).double(), draw(5, 64, dtype=torch.float32)
    bias = model[0].bias.detach().double()
    layer = pissa.attach(model, Config(rank=3, targets=("0",)), generator()).layers["0"]
    want = x.double() @ W.T + bias
    rounded = {"y": want + 3 * ((x @ W.float().T).double() + bias - want)}
    judged = noise_floor({"y": layer(x).detach()}, {"y": want}, rounded, "float32")
    assert judged.passed, judged


def peft_layer(dtype: str, kind: str) -> Any:
    config = LoraConfig(r=3, lora_alpha=8, init_lora_weights=kind, target_modules=["q_proj", "v_proj"])
    return get_peft_model(Two(DTYPES[dtype]), config).base_model.model.q_proj


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])  # it refuses float64
def test_peft_splits_the_same(dtype: str) -> None:
    theirs, mine = peft_layer(dtype, "pissa"), attached(dtype).layers["q_proj"]
    truth = pissa.split(mine.base.weight.detach().double(), Config(rank=3, alpha=8), torch.float64, generator())
    A, B = unsigned(theirs.lora_A["default"].weight.detach(), theirs.lora_B["default"].weight.detach())
    # peft keeps A and B in float32; ours come rounded to the layer's dtype, and the residual holds what they lost.
    found = {"A": A, "B": B, "residual": theirs.base_layer.weight.detach()}
    want = dict(zip(("A", "B", "residual"), truth, strict=True))
    rounded = {"A": mine.A, "B": mine.B, "residual": mine.residual}
    judged = noise_floor(found, want, rounded, dtype)
    assert judged.passed, judged
    x = draw(5, 12, dtype=DTYPES[dtype])
    y = x.double() @ Two(DTYPES[dtype]).q_proj.weight.detach().double().T + mine.base.bias.detach().double()
    judged = noise_floor({"y": theirs(x)}, {"y": y}, {"y": mine(x)}, dtype)
    assert judged.passed, judged


def test_peft_takes_the_same_fast_svd() -> None:
    # Its sketch is drawn in float32 from global state, so no two are equal: iterate until the sketch no longer matters.
    model, W = Two(torch.float32), known(10, 12, decay=8.0)[0]
    with torch.no_grad():
        model.q_proj.weight.copy_(W)
    names = ["q_proj", "v_proj"]
    kind = LoraConfig(r=3, lora_alpha=8, init_lora_weights="pissa_niter_16", target_modules=names)
    theirs = get_peft_model(model, kind).base_model.model.q_proj
    config = Config(rank=3, alpha=8, niter=16)
    truth = pissa.split(W.float().double(), Config(rank=3, alpha=8), torch.float64, generator())
    mine = pissa.split(W.float(), config, torch.float32, generator())
    A, B = unsigned(theirs.lora_A["default"].weight.detach(), theirs.lora_B["default"].weight.detach())
    names = ["A", "B", "residual"]
    found = dict(zip(names, (A, B, theirs.base_layer.weight.detach()), strict=True))
    noise = {n: t + (m.double() - t) * 4 for n, t, m in zip(names, truth, mine, strict=True)}
    judged = noise_floor(found, dict(zip(names, truth, strict=True)), noise, "float32")
    assert judged.passed, judged
