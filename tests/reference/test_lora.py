"""LoRA, in the reference and in our fused kernel, against the paper's formula written out by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from harness.conformance.comparison.tolerance_policies import exact, noise_floor
from harness.conformance.subject import DTYPES, configure, load, warm
from harness.kernels.torch.lora_linear import lora_linear_over
from harness.methods.implementations.bitsandbytes.weights import nf4
from harness.methods.implementations.fused.methods.lora import attach as fused_lora
from reference import lora
from reference.shared.layers import dense_copy
from support.two_layer_model import Two, assert_same, draw, generator

ATTACH: dict[str, Callable[..., Any]] = {"reference": lora.attach, "fused": fused_lora}
implementations = pytest.mark.parametrize("attach", ATTACH.values(), ids=ATTACH)


def attached(attach: Callable[..., Any], dtype: str = "float64", **config: Any) -> Any:
    return attach(Two(DTYPES[dtype]), configure("lora", {"rank": 3, "alpha": 8, **config}), generator(5))


def warmed(attach: Callable[..., Any], dtype: str = "float64", **config: Any) -> Any:
    adapted = attached(attach, dtype, **config)
    warm(adapted.tensors(), generator(6))
    return adapted


def by_formula(W: Tensor, b: Tensor, A: Tensor, B: Tensor, x: Tensor, alpha: float, r: int) -> Tensor:
    """h = W0 x + b + (alpha / r) B A x, one number at a time."""
    W, b, A, B = (t.detach() for t in (W, b, A, B))
    h = torch.empty(len(x), len(W), dtype=torch.float64)
    for t in range(len(x)):
        for e in range(len(W)):
            total = float(b[e])
            for d in range(W.shape[1]):
                update = sum(float(B[e, k]) * float(A[k, d]) for k in range(r))
                total += (float(W[e, d]) + alpha / r * update) * float(x[t, d])
            h[t, e] = total
    return h


@implementations
@pytest.mark.parametrize(("rank", "alpha"), [(1, 2.0), (3, 8.0), (4, 0.5), (16, 16.0)])
def test_forward_is_the_papers_formula(attach: Callable[..., Any], rank: int, alpha: float) -> None:
    layer = warmed(attach, rank=rank, alpha=alpha).layers["q_proj"]
    x = draw(5, 12)
    want = by_formula(layer.base.weight, layer.base.bias, layer.A, layer.B, x, alpha, rank)
    assert_same({"y": layer(x)}, {"y": want})


@implementations
@pytest.mark.parametrize("rank", [1, 4, 9])
def test_rslora_divides_by_the_root_of_the_rank(attach: Callable[..., Any], rank: int) -> None:
    layer = warmed(attach, rank=rank, alpha=6.0, rslora=True).layers["q_proj"]
    x, root = draw(5, 12), {1: 1, 4: 2, 9: 3}[rank]
    update = torch.einsum("td,kd,ek->te", x, layer.A.detach(), layer.B.detach())
    want = x @ layer.base.weight.T + layer.base.bias + 6.0 / root * update
    assert_same({"y": layer(x)}, {"y": want})


@implementations
def test_gradients_are_those_of_the_formula(attach: Callable[..., Any]) -> None:
    layer = warmed(attach).layers["q_proj"]
    x, dy = draw(5, 12).requires_grad_(True), draw(5, 10, seed=2)
    layer(x).backward(dy)
    s, A, B, W = 8 / 3, layer.A.detach(), layer.B.detach(), layer.base.weight.detach()
    want = {
        "x": torch.einsum("te,ed->td", dy, W) + s * torch.einsum("te,ek,kd->td", dy, B, A),
        "A": s * torch.einsum("te,ek,td->kd", dy, B, x.detach()),
        "B": s * torch.einsum("te,kd,td->ek", dy, A, x.detach()),
    }
    assert_same({"x": x.grad, "A": layer.A.grad, "B": layer.B.grad}, want)
    assert layer.base.weight.grad is None


@implementations
def test_autograd_agrees_with_finite_differences(attach: Callable[..., Any]) -> None:
    layer = warmed(attach).layers["q_proj"]
    inputs = (draw(2, 2, 12).requires_grad_(True), layer.A, layer.B)
    assert torch.autograd.gradcheck(lambda x, A, B: layer(x), inputs)
    assert torch.autograd.gradgradcheck(lambda x, A, B: layer(x), inputs)


def test_the_kernel_passes_gradients_through_a_base_that_trains() -> None:
    base, A, B = nn.Linear(8, 5, dtype=torch.float64), draw(3, 8).requires_grad_(True), draw(5, 3).requires_grad_(True)
    inputs = (draw(4, 8, seed=4).requires_grad_(True), A, B, base.weight, base.bias)
    assert torch.autograd.gradcheck(lambda x, A, B, W, b: lora_linear_over(base, x, A, B, 0.5), inputs)
    assert torch.autograd.gradgradcheck(lambda x, A, B, W, b: lora_linear_over(base, x, A, B, 0.5), inputs)


@implementations
def test_backward_may_run_twice(attach: Callable[..., Any]) -> None:
    layer = warmed(attach).layers["q_proj"]
    loss = layer(draw(5, 12)).square().sum()
    first = torch.autograd.grad(loss, [layer.A, layer.B], retain_graph=True)
    second = torch.autograd.grad(loss, [layer.A, layer.B])
    assert all(map(torch.equal, first, second))


@implementations
@pytest.mark.parametrize("shape", [(12,), (0, 12), (1, 12), (2, 3, 4, 12)])
def test_any_leading_shape(attach: Callable[..., Any], shape: tuple[int, ...]) -> None:
    layer = warmed(attach).layers["q_proj"]
    x = draw(*shape)
    flat = x.reshape(-1, 12)
    want = by_formula(layer.base.weight, layer.base.bias, layer.A, layer.B, flat, 8, 3).view(*shape[:-1], 10)
    assert_same({"y": layer(x)}, {"y": want})


@implementations
def test_a_transposed_input_is_read_correctly(attach: Callable[..., Any]) -> None:
    layer = warmed(attach).layers["q_proj"]
    x = draw(12, 4, 3).permute(2, 1, 0)
    assert not x.is_contiguous()
    assert_same({"y": layer(x)}, {"y": layer(x.contiguous())})


@implementations
@pytest.mark.parametrize("dtype", DTYPES)
def test_at_the_start_the_model_is_the_base_model(attach: Callable[..., Any], dtype: str) -> None:
    x = draw(5, 12, dtype=DTYPES[dtype])
    want = Two(DTYPES[dtype]).requires_grad_(False)(x)
    assert torch.equal(attached(attach, dtype).model(x), want)


@implementations
def test_at_the_start_only_b_has_a_gradient(attach: Callable[..., Any]) -> None:
    adapted = attached(attach)
    adapted.model(draw(5, 12)).square().sum().backward()
    for name, tensor in adapted.tensors().items():
        assert bool(tensor.grad.any()) == name.endswith(".B"), name


@implementations
def test_only_the_adapter_trains(attach: Callable[..., Any]) -> None:
    adapted = attached(attach)
    trains = [p for p in adapted.model.parameters() if p.requires_grad]
    assert {id(p) for p in trains} == {id(p) for p in adapted.parameters()}
    assert sum(p.numel() for p in trains) == 3 * (12 + 10) + 3 * (10 + 7)


def test_a_starts_uniform_within_one_over_root_in() -> None:
    model = nn.Sequential(nn.Linear(400, 8), nn.Linear(400, 8))
    adapted = lora.attach(model, lora.Config(rank=256, targets=("0", "1")), generator())
    first, second = (adapted.tensors()[f"{i}.A"].detach().double() * math.sqrt(400) for i in (0, 1))
    assert not torch.equal(first, second)
    for A in (first, second):
        values = A.flatten().sort().values
        assert float(values.abs().max()) <= 1 + torch.finfo(torch.float32).eps
        # Kolmogorov's statistic against the uniform; 1.95 / sqrt(n) is passed by chance once in a thousand.
        expected = (values + 1) / 2
        observed = torch.arange(1, len(values) + 1) / len(values)
        assert float((expected - observed).abs().max()) < 1.95 / math.sqrt(len(values))


def test_every_dtype_starts_from_the_same_numbers() -> None:
    truth = attached(lora.attach).tensors()
    for dtype in DTYPES:
        rounded = {n: t.to(DTYPES[dtype]) for n, t in truth.items()}
        assert exact(attached(lora.attach, dtype).tensors(), rounded).passed


@implementations
@pytest.mark.parametrize("wrong", [("k_proj",), ("q_proj", "nothing"), ("proj",)])
def test_an_unknown_target_is_named(attach: Callable[..., Any], wrong: tuple[str, ...]) -> None:
    name = wrong[-1]
    kinds = "linear, Conv1D, embedding, nn.Conv1d, Conv2d, Conv3d or experts"
    with pytest.raises(ValueError, match=f"no {kinds} layer is named '{name}'; this model has: q_proj, v_proj"):
        attached(attach, targets=wrong)


@implementations
@pytest.mark.parametrize("dtype", DTYPES)
def test_merged_is_unmerged(attach: Callable[..., Any], dtype: str) -> None:
    adapted, truth = warmed(attach, dtype), warmed(lora.attach)
    load(truth, adapted.tensors())
    for path, layer in truth.layers.items():  # the float64 twin on the rounded weights
        layer.base.load_state_dict({n: t.double() for n, t in adapted.layers[path].base.state_dict().items()})
    for path in list(adapted.layers):
        x = draw(9, adapted.layers[path].base.in_features, dtype=DTYPES[dtype])
        before = adapted.layers[path](x).detach()
        adapted.merge()
        assert type(adapted.model.get_submodule(path)) is nn.Linear
        merged = adapted.model.get_submodule(path)(x)
        adapted.unmerge()
        after = adapted.model.get_submodule(path)(x).detach()
        want = truth.layers[path](x.double()).detach()
        judged = noise_floor({"y": merged}, {"y": want}, {"y": before}, dtype)
        assert judged.passed, judged
        assert torch.equal(after, before)


@implementations
def test_unmerging_restores_every_bit(attach: Callable[..., Any]) -> None:
    adapted = warmed(attach, "bfloat16")
    before = {n: t.clone() for n, t in adapted.model.state_dict().items()}
    adapted.merge()
    adapted.merge()  # a second time changes nothing
    once = dense_copy(adapted.layers["q_proj"].base).weight + adapted.layers["q_proj"].delta()
    assert torch.equal(adapted.model.q_proj.weight, once)
    adapted.unmerge()
    assert exact(adapted.model.state_dict(), before).passed


@implementations
def test_detach_restores_the_base_model(attach: Callable[..., Any]) -> None:
    adapted, x = warmed(attach), draw(5, 12)
    adapted.detach()
    assert exact(adapted.model.state_dict(), Two().state_dict()).passed
    assert torch.equal(adapted.model(x), Two().requires_grad_(False)(x))


@implementations
def test_dropout_touches_the_adapter_alone(attach: Callable[..., Any]) -> None:
    layer = attached(attach, dropout=0.5).layers["q_proj"]
    x = torch.ones(1, 12, dtype=torch.float64)
    layer.train()
    assert torch.equal(layer(x), layer.base(x))  # B is zero
    with torch.no_grad():
        layer.A.zero_()[:, :3] = torch.eye(3)
        layer.B.zero_()[:3] = torch.eye(3)
    seen: set[float] = set()
    for seed in range(20):
        torch.manual_seed(seed)
        with torch.no_grad():
            layer.base.weight.zero_()
            layer.base.bias.zero_()
        seen |= set(layer(x)[0, :3].tolist())
    scaling = 8 / 3
    assert seen == {0.0, scaling * 2.0}  # dropped, or doubled to make up for the dropped half
    layer.eval()
    assert layer(x)[0, :3].tolist() == [scaling] * 3


class Keeps(nn.Module):
    """A base whose output somebody else holds: its own input, a view of it, or a buffer."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.register_buffer("kept", draw(5, 12, seed=7))

    def forward(self, x: Tensor) -> Tensor:
        return {"input": x, "view": x.view(5, 12), "buffer": self.kept}[self.kind]


@pytest.mark.parametrize("kind", ["input", "view", "buffer"])
@pytest.mark.parametrize("grad", [False, True])
def test_the_kernel_does_not_write_to_tensors_of_the_base(kind: str, grad: bool) -> None:
    base, A, B, x = Keeps(kind), draw(3, 12), draw(12, 3), draw(5, 12).requires_grad_(grad)
    held = {"x": x.detach().clone(), "kept": base.kept.clone()}
    out = lora_linear_over(base, x, A, B, 2.0)
    assert exact({"x": x.detach(), "kept": base.kept}, held).passed
    assert_same({"y": out}, {"y": base(x) + 2.0 * torch.einsum("td,kd,ek->te", x, A, B)})


def test_the_kernel_does_not_write_to_captured_outputs() -> None:
    base, captured = nn.Linear(12, 12, dtype=torch.float64), []
    base.register_forward_hook(lambda module, args, output: captured.append(output))
    x = draw(5, 12)
    out = lora_linear_over(base, x, draw(3, 12), draw(12, 3), 2.0)
    assert torch.equal(captured[0], base.forward(x))
    assert not torch.equal(captured[0], out)


def test_the_kernel_on_a_base_of_four_bits() -> None:
    # bitsandbytes returns a view of a custom Function's output there, which may not be written into.
    model = nn.Sequential(nn.Linear(64, 10))
    nf4(model, ["0"], torch.float32)
    A, B = draw(3, 64, dtype=torch.float32).requires_grad_(True), draw(10, 3, dtype=torch.float32).requires_grad_(True)
    x = draw(2, 5, 64, dtype=torch.float32).requires_grad_(True)
    lora_linear_over(model[0], x, A, B, 2.0).sum().backward()
    got = {"x": x.grad, "A": A.grad, "B": B.grad}
    x.grad = A.grad = B.grad = None
    (model[0](x) + 2.0 * (x @ A.T @ B.T)).sum().backward()
    assert_same(got, {"x": x.grad.double(), "A": A.grad.double(), "B": B.grad.double()}, "float32")


def test_a_later_in_place_write_is_detected() -> None:
    layer = warmed(fused_lora).layers["q_proj"]
    x = draw(5, 12)
    out = layer(x)
    x.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.slow
def test_the_kernel_under_checkpoint_compile_and_autocast() -> None:
    layer = warmed(fused_lora).layers["q_proj"]
    x = draw(2, 5, 12).requires_grad_(True)

    def run(function: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        y = function(x)
        x_grad, A, B = torch.autograd.grad(y.square().sum(), [x, layer.A, layer.B])
        return {"y": y, "x": x_grad, "A": A, "B": B}

    plain = run(layer)
    assert exact(run(lambda t: checkpoint(layer, t, use_reentrant=False)), plain).passed
    assert_same(run(torch.compile(layer, backend="aot_eager", fullgraph=True)), plain)
    pair = [warmed(each, "float32").layers["q_proj"] for each in (fused_lora, lora.attach)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = [each(x.float()) for each in pair]
    assert outputs[0].dtype == torch.bfloat16
    assert_same({"y": outputs[0]}, {"y": outputs[1].double()}, "bfloat16")


def test_mixed_dtypes_are_an_error() -> None:
    base = nn.Linear(12, 10, dtype=torch.float32)
    with pytest.raises(RuntimeError, match="dtype"):
        lora_linear_over(base, draw(5, 12, dtype=torch.float32), draw(3, 12), draw(10, 3), 1.0)


@implementations
def test_a_layer_takes_the_mode_of_the_layer_that_it_replaces(attach: Callable[..., Any]) -> None:
    model = Two(DTYPES["float32"]).eval()
    adapted = attach(model, configure("lora", {"rank": 3, "alpha": 8, "dropout": 0.5}), generator(5))
    assert not any(module.training for module in model.modules())
    model.train()
    adapted.merge()
    model.eval()
    adapted.unmerge()
    assert not any(module.training for module in model.modules())
    model.train()
    adapted.detach()
    assert all(module.training for module in model.modules())
