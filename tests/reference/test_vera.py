"""VeRA's reference against the paper's formula written out by hand, and against HF peft."""

from __future__ import annotations

import hashlib
import math
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from harness.conformance.comparison.tolerance_policies import exact, noise_floor
from harness.conformance.subject import DTYPES, configure, warm
from harness.methods.implementations.bitsandbytes.weights import nf4
from reference import vera
from reference.shared.layers import dense_copy
from support import two_layer_model
from support.two_layer_model import draw, generator

every_dtype = pytest.mark.parametrize("dtype", DTYPES)


class Two(two_layer_model.Two):
    """With v_proj 10 -> 17 neither layer is the largest in both dimensions."""

    LAST = 17


def attached(dtype: str = "float64", model: nn.Module | None = None, **config: Any) -> Any:
    given = configure("vera", {"rank": 3, **config})
    return vera.attach(Two(DTYPES[dtype]) if model is None else model, given, generator(5))


def warmed(dtype: str = "float64", **config: Any) -> Any:
    adapted = attached(dtype, **config)
    warm(adapted.tensors(), generator(6))
    return adapted


def by_formula(layer: vera.VeraLinear) -> Tensor:
    """W0 + Lambda_b B Lambda_d A of eq. 2, one number at a time."""
    W, A, B, b, d = (t.detach().tolist() for t in (layer.base.weight, layer.A, layer.B, layer.b, layer.d))
    made = [
        [W[e][i] + sum(b[e] * B[e][k] * d[k] * A[k][i] for k in range(len(d))) for i in range(len(W[0]))]
        for e in range(len(W))
    ]
    return torch.tensor(made, dtype=torch.float64)


def assert_same(have: dict[str, Any], want: dict[str, Any], dtype: str = "float64") -> None:
    """Judge by the policy; `want` is in float64, and what rounding it to `dtype` loses is the noise."""
    judged = noise_floor(have, want, {n: t.to(DTYPES[dtype]) for n, t in want.items()}, dtype)
    assert judged.passed, judged


@pytest.mark.parametrize("rank", [1, 3, 40])
@pytest.mark.parametrize("path", ["q_proj", "v_proj"])
def test_forward_is_the_papers_formula(rank: int, path: str) -> None:
    layer = warmed(rank=rank).layers[path]
    x = draw(5, layer.base.in_features)
    bias = 0 if layer.base.bias is None else layer.base.bias.detach()
    want = torch.einsum("td,ed->te", x, by_formula(layer)) + bias
    assert_same({"y": layer(x).detach()}, {"y": want})


def test_a_small_example_is_exact() -> None:
    model = nn.Sequential(nn.Linear(2, 2, dtype=torch.float64))
    layer = attached(model=model, rank=2, targets=("0",)).layers["0"]
    values = {
        layer.base.weight: [[1.0, 0.0], [0.0, 1.0]],
        layer.base.bias: [5.0, -5.0],
        layer.A: [[1.0, 2.0], [3.0, 4.0]],
        layer.B: [[1.0, 0.0], [1.0, 1.0]],
        layer.b: [10.0, 100.0],
        layer.d: [2.0, -1.0],
    }
    with torch.no_grad():
        for tensor, value in values.items():
            tensor.copy_(torch.tensor(value))
    # Lambda_d A = [[2, 4], [-3, -4]]; B of it = [[2, 4], [-1, 0]]; Lambda_b of that = [[20, 40], [-100, 0]]
    assert layer.merged().weight.tolist() == [[21.0, 40.0], [-100.0, 1.0]]
    assert layer(torch.tensor([[1.0, 1.0]], dtype=torch.float64)).tolist() == [[66.0, -104.0]]


def test_gradients_are_those_of_the_formula() -> None:
    layer = warmed().layers["q_proj"]
    x, dy = draw(5, 12).requires_grad_(True), draw(5, 10, seed=2)
    layer(x).backward(dy)
    W, A, B, b, d = (t.detach() for t in (layer.base.weight, layer.A, layer.B, layer.b, layer.d))
    want = {
        "x": torch.einsum("te,ed->td", dy, by_formula(layer)),
        "b": torch.einsum("te,ek,k,kd,td->e", dy, B, d, A, x.detach()),
        "d": torch.einsum("te,e,ek,kd,td->k", dy, b, B, A, x.detach()),
    }
    assert_same({"x": x.grad, "b": layer.b.grad, "d": layer.d.grad}, want)
    assert W.grad is None
    assert not layer.A.requires_grad
    assert not layer.B.requires_grad


def test_autograd_agrees_with_finite_differences() -> None:
    layer = warmed().layers["q_proj"]
    inputs = (draw(2, 2, 12).requires_grad_(True), layer.b, layer.d)
    assert torch.autograd.gradcheck(lambda x, b, d: layer(x), inputs)
    assert torch.autograd.gradgradcheck(lambda x, b, d: layer(x), inputs)


@every_dtype
def test_at_the_start_the_model_is_the_base_model(dtype: str) -> None:
    x = draw(5, 12, dtype=DTYPES[dtype])
    want = Two(DTYPES[dtype]).requires_grad_(False)(x)
    adapted = attached(dtype)
    assert torch.equal(adapted.model(x), want)
    adapted.model(x).square().sum().backward()
    for name, tensor in adapted.tensors().items():
        assert bool(tensor.grad.any()) == name.endswith(".b"), name


@every_dtype
def test_the_start_of_b_and_d(dtype: str) -> None:
    for d_initial in (0.1, 0.5):
        for layer in attached(dtype, d_initial=d_initial).layers.values():
            assert not layer.b.any()
            assert layer.b.shape == (layer.base.out_features,)
            assert torch.equal(layer.d.detach(), torch.full((3,), d_initial, dtype=DTYPES[dtype]))


@every_dtype
def test_all_layers_use_slices_of_one_pair(dtype: str) -> None:
    adapted = attached(dtype, projection_key=4)
    A, B = vera.projections(4, 3, 12, 17)  # the largest of each: q_proj's in, v_proj's out
    for path, (D, E) in {"q_proj": (12, 10), "v_proj": (10, 17)}.items():
        want = {f"{path}.A": A[:, :D].to(DTYPES[dtype]), f"{path}.B": B[:E].to(DTYPES[dtype])}
        assert exact({n: t for n, t in adapted.state().items() if n.startswith(path)}, want).passed
    q, v = adapted.layers.values()
    assert q.A.data_ptr() == v.A.data_ptr()  # one pair in memory
    assert q.B.data_ptr() == v.B.data_ptr()


def test_only_the_key_decides_the_projections() -> None:
    before = generator(5)
    given = configure("vera", {"rank": 3})
    first = vera.attach(Two(), given, before).state()
    assert torch.equal(before.get_state(), generator(5).get_state())
    torch.manual_seed(99)
    assert exact(vera.attach(Two(), given, generator(6)).state(), first).passed
    other = attached(projection_key=1).state()
    assert not any(torch.equal(other[n], first[n]) for n in first)


def test_the_projections_are_kaiming_uniform() -> None:
    A, B = vera.projections(0, 256, 400, 300)
    for matrix, fan_in in ((A, 400), (B, 256)):
        assert matrix.dtype == torch.float32
        scaled = matrix.double() * math.sqrt(fan_in / 6)
        values = scaled.flatten().sort().values
        assert float(values.abs().max()) <= 1 + torch.finfo(torch.float32).eps
        # Kolmogorov's statistic against the uniform; 1.95 / sqrt(n) is passed by chance once in a thousand.
        observed = torch.arange(1, len(values) + 1) / len(values)
        assert float(((values + 1) / 2 - observed).abs().max()) < 1.95 / math.sqrt(len(values))


REBUILD = """
import hashlib, torch
from reference.vera import projections
{before}
for t in projections(*{sizes}):
    print(hashlib.sha256(t.float().numpy().tobytes()).hexdigest(), t.dtype)
"""


@pytest.mark.nightly
def test_another_process_rebuilds_the_same_projections() -> None:
    sizes = (2**32 - 1, 5, 129, 67)
    expected = [f"{hashlib.sha256(t.numpy().tobytes()).hexdigest()} {t.dtype}" for t in vera.projections(*sizes)]
    for before in (
        "torch.manual_seed(1); torch.set_num_threads(2)",
        "torch.set_default_dtype(torch.bfloat16); torch.set_default_device('meta')",
    ):
        code = REBUILD.format(before=before, sizes=sizes)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.splitlines() == expected


def test_a_checkpoint_needs_only_b_and_d() -> None:
    trained = warmed(projection_key=7)
    saved = {n: t for n, t in trained.model.state_dict().items() if ".base." not in n}
    assert set(saved) == {"q_proj.b", "q_proj.d", "v_proj.b", "v_proj.d"}
    again = attached(projection_key=7)
    again.model.load_state_dict(saved, strict=False)
    x = draw(5, 12)
    assert torch.equal(again.model(x), trained.model(x))


def test_only_the_vectors_train() -> None:
    adapted = attached()
    trains = [p for p in adapted.model.parameters() if p.requires_grad]
    assert {id(p) for p in trains} == {id(p) for p in adapted.parameters()}
    assert sum(p.numel() for p in trains) == (10 + 3) + (17 + 3)


def test_dropout_touches_the_adapter_alone() -> None:
    layer = warmed(dropout=0.5).layers["q_proj"].train()
    x = draw(5, 12)
    torch.manual_seed(11)
    have = layer(x)
    torch.manual_seed(11)
    dropped = nn.functional.dropout(x, 0.5)
    update = by_formula(layer) - layer.base.weight.detach()
    for y, seen in ((have, dropped), (layer.eval()(x), x)):
        assert_same({"y": y.detach()}, {"y": (layer.base(x) + seen @ update.T).detach()})


@every_dtype
def test_merged_is_unmerged(dtype: str) -> None:
    adapted = warmed(dtype)
    for path, layer in adapted.layers.items():
        x = draw(9, layer.base.in_features, dtype=DTYPES[dtype])
        given = (t.detach().double() for t in (layer.A, layer.B, layer.b, layer.d))
        want = vera.VeraLinear(dense_copy(layer.base).double(), *given, 0.0)(x.double()).detach()
        before = layer(x).detach()
        adapted.merge()
        merged = adapted.model.get_submodule(path)
        assert type(merged) is nn.Linear
        judged = noise_floor({"y": merged(x).detach()}, {"y": want}, {"y": before}, dtype)
        assert judged.passed, judged
        adapted.unmerge()
        assert torch.equal(adapted.model.get_submodule(path)(x), before)


def test_merging_and_detaching_leave_every_bit_of_the_base() -> None:
    adapted = warmed("bfloat16")
    before = {n: t.clone() for n, t in (adapted.model.state_dict() | adapted.state()).items()}
    adapted.merge()
    adapted.unmerge()
    assert exact(adapted.model.state_dict() | adapted.state(), before).passed
    adapted.detach()
    assert exact(adapted.model.state_dict(), Two(torch.bfloat16).state_dict()).passed


@pytest.mark.parametrize("shape", [(12,), (0, 12), (2, 3, 4, 12)])
def test_any_leading_shape(shape: tuple[int, ...]) -> None:
    layer = warmed().layers["q_proj"]
    x = draw(*shape)
    want = x.reshape(-1, 12) @ by_formula(layer).T + layer.base.bias
    assert_same({"y": layer(x).detach()}, {"y": want.detach().view(*shape[:-1], 10)})


def test_an_unknown_target_is_named() -> None:
    with pytest.raises(ValueError, match="no linear or Conv1D layer is named 'k_proj'"):
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
    A, B, b, d = (t.detach() for t in (layer.A, layer.B, layer.b, layer.d))
    on_dense = vera.VeraLinear(dense_copy(layer.base), A, B, b, d, 0.0)
    truth = vera.VeraLinear(dense_copy(layer.base).double(), *(t.double() for t in (A, B, b, d)), 0.0)
    want = {"y": truth(x.double()).detach()}
    for y in (layer(x), layer.merged()(x)):
        judged = noise_floor({"y": y.detach()}, want, {"y": on_dense(x)}, "float32")
        assert judged.passed, judged


def peft_of(model: nn.Module, **config: Any) -> Any:
    peft = pytest.importorskip("peft")
    given = peft.VeraConfig(target_modules=["q_proj", "v_proj"], **config)
    return peft.get_peft_model(model, given).base_model


@pytest.mark.parametrize("key", [0, 1, 12345])
@pytest.mark.parametrize("sizes", [(12, 10, 3), (1000, 63, 1), (129, 515, 17), (769, 770, 256)])
def test_pefts_projections_are_the_same_numbers(key: int, sizes: tuple[int, int, int]) -> None:
    D, E, R = sizes
    model = nn.Sequential()
    model.add_module("q_proj", nn.Linear(D, E))
    model.add_module("v_proj", nn.Linear(E, D))
    theirs = peft_of(model, r=R, projection_prng_key=key)
    want = {"A": theirs.vera_A["default"], "B": theirs.vera_B["default"]}
    A, B = vera.projections(key, R, max(D, E), max(D, E))
    assert exact({"A": A, "B": B}, want).passed


def test_peft_computes_the_same() -> None:
    mine = attached("float32")
    theirs = peft_of(Two(torch.float32), r=3).model
    outputs, gradients = {}, {}
    warm(mine.tensors(), generator(6))
    truth = attached()
    for path, layer in truth.layers.items():  # the float64 twin of the rounded weights
        layer.base.load_state_dict({n: t.double() for n, t in mine.layers[path].base.state_dict().items()})
        other = theirs.get_submodule(path)
        with torch.no_grad():
            for name, ours in layer.tensors().items():
                ours.copy_(mine.layers[path].tensors()[name])
                getattr(other, f"vera_lambda_{name}")["default"].copy_(ours)
    x, dy = draw(5, 12, dtype=torch.float32), draw(5, 17, seed=2, dtype=torch.float32)
    for model_name, model in (("theirs", theirs), ("mine", mine.model), ("truth", truth.model)):
        wide = torch.float64 if model_name == "truth" else torch.float32
        outputs[model_name] = model(x.to(wide))
        outputs[model_name].backward(dy.to(wide))
        gradients[model_name] = {
            f"{path}.{name}": (
                getattr(theirs.get_submodule(path), f"vera_lambda_{name}")["default"].grad
                if model_name == "theirs"
                else model.get_submodule(path).tensors()[name].grad
            )
            for path in mine.layers
            for name in "bd"
        }
    seen = {model_name: {"y": outputs[model_name].detach()} | gradients[model_name] for model_name in outputs}
    judged = noise_floor(seen["theirs"], seen["truth"], seen["mine"], "float32")
    assert judged.passed, judged
