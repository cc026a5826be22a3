"""LoRA on Conv1D, embeddings and convolutions: against matrices written out by hand, and beside peft and loralib."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from harness.conformance.comparison.tolerance_policies import exact, noise_floor
from harness.conformance.subject import DTYPES, load, warm
from reference import lora
from reference.shared.layers import KINDS, kind_of, targets
from reference.shared.lora_layers import ungrouped
from support.lora_layers import ALPHA, CASES, GEOMETRIES, MADE, R, Scaled, attached, config, model, run, sample, warmed
from support.two_layer_model import assert_same, generator

geometries = pytest.mark.parametrize("geometry", GEOMETRIES)
parametrisations = pytest.mark.parametrize("conv", ["peft", "loralib"])


every = pytest.mark.parametrize("name", MADE)
every_dtype = pytest.mark.parametrize(("name", "dtype"), CASES)


def patches(base: nn.Conv2d, x: Tensor) -> Tensor:
    """Return (N, C K K, places): what each output place of `base` sees of x, read off pixel by pixel."""
    (kh, kw), (sh, sw), (dh, dw) = base.kernel_size, base.stride, base.dilation
    if base.padding == "same":
        left, top, right, bottom = 1, 1, 1, 1  # (K - 1) dilation = 2 on every axis of this file's geometry
    else:
        (top, left), (bottom, right) = base.padding, base.padding
    mode = "constant" if base.padding_mode == "zeros" else base.padding_mode
    x = nn.functional.pad(x, (left, right, top, bottom), mode=mode)
    rows = range(0, x.shape[2] - (kh - 1) * dh, sh)
    columns = range(0, x.shape[3] - (kw - 1) * dw, sw)
    seen = [x[:, :, i : i + kh * dh : dh, j : j + kw * dw : dw].reshape(len(x), -1) for i in rows for j in columns]
    return torch.stack(seen, dim=2)


def grouped_matrix(base: nn.Conv2d) -> Tensor:
    """Return the kernel of `base` as a matrix (E, C K K), zero on the channels of other groups."""
    E, c = base.weight.shape[:2]
    W = torch.zeros(E, base.in_channels, *base.kernel_size, dtype=torch.float64)
    for e in range(E):
        first = e // (E // base.groups) * c
        W[e, first : first + c] = base.weight[e].detach()
    return W.reshape(E, -1)


def test_kinds() -> None:
    class Normed(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return self._conv_forward(x, self.weight / self.weight.norm(), self.bias)

    class Shifted(nn.Embedding):
        def forward(self, ids: Tensor) -> Tensor:
            return super().forward(ids + 2)

    made = [nn.Linear(2, 2), Conv1D(3, 2), nn.Embedding(3, 2)]
    made += [nn.Conv1d(2, 2, 1), nn.Conv2d(2, 2, 1), nn.Conv3d(2, 2, 1), Scaled(3, 2)]
    assert [kind_of(m) for m in made] == [*(kind for kind in KINDS if kind != "experts"), "embedding"]
    others = [Normed(2, 2, 1), Shifted(3, 2), nn.ConvTranspose1d(2, 2, 1), nn.LayerNorm(2), nn.Sequential()]
    assert [kind_of(m) for m in others] == [""] * len(others)


def test_targets_are_linear_by_default() -> None:
    whole = nn.ModuleDict({name: model(name) for name in ("linear", "Conv1D", "embedding", "plain")})
    whole["conv"] = nn.Sequential(nn.Conv2d(2, 2, 1))
    assert list(targets(whole, ["linear.layer"])) == ["linear.layer"]
    for name, kind in {"Conv1D": "Conv1D", "embedding": "Embedding", "plain": "Conv2d"}.items():
        with pytest.raises(ValueError, match=f"^{name}.layer is a {kind}, which this method does not support$"):
            targets(whole, [f"{name}.layer"])
    with pytest.raises(ValueError, match=r"^Conv1D\.layer is a Conv1D, which"):  # one of four is not enough
        targets(whole, ["layer"])
    with pytest.raises(ValueError, match=r"^conv is a Sequential, which"):
        targets(whole, ["conv"])
    with pytest.raises(ValueError, match=r"^no linear layer is named 'x'; this model has: layer$"):
        targets(whole, ["x"])
    assert list(targets(whole, ["plain.layer", "layer"], KINDS)) == [
        "linear.layer", "Conv1D.layer", "embedding.layer", "plain.layer",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["embedding", "scaled"])
def test_an_embedding_is_a_linear_layer_on_one_hot_rows(name: str) -> None:
    adapted, ids = warmed(name), sample(name)
    layer, scale = adapted.layers["layer"], 3.0 if name == "scaled" else 1.0
    hot = nn.functional.one_hot(ids, 20).double()
    A, B = (t.detach().clone().requires_grad_(True) for t in (layer.A, layer.B))
    y = hot @ (layer.base.weight + ALPHA / R * (B @ A).T) * scale
    dy = torch.randn(y.shape, generator=generator(2), dtype=torch.float64)
    dA, dB = torch.autograd.grad(y, [A, B], dy)
    if name == "embedding":
        assert bool(dA[:, 3].any())  # the padding entry was drawn
        dA[:, 3] = 0
    assert_same(run(adapted, ids), {"y": y.detach(), "layer.A": dA, "layer.B": dB})


def test_an_embeddings_gradient_may_be_divided_by_the_count_of_an_entry() -> None:
    ids = torch.tensor([1, 7, 7, 7])
    gradients = []
    for by_frequency in (True, False):
        base = nn.Embedding(20, 10, scale_grad_by_freq=by_frequency, dtype=torch.float64)
        whole = nn.Sequential()
        whole.add_module("layer", base)
        adapted = lora.attach(whole, config(), generator())
        gradients.append(run(adapted, ids)["layer.A"])
    assert_same(
        {"1": gradients[0][:, 1], "7": gradients[0][:, 7]}, {"1": gradients[1][:, 1], "7": gradients[1][:, 7] / 3}
    )


def test_an_embedding_with_max_norm_is_rejected() -> None:
    whole = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Embedding(5, 4, max_norm=1.0)})
    before = dict(whole.named_modules())
    with pytest.raises(ValueError, match=r"^b: an embedding with max_norm rewrites its own weight"):
        lora.attach(whole, config(targets=["a", "b"]), generator())
    assert dict(whole.named_modules()) == before
    assert all(p.requires_grad for p in whole.parameters())


def test_an_embedding_starts_with_a_zero_and_b_standard_normal() -> None:
    whole = nn.Sequential(nn.Embedding(7, 900))
    A, B = lora.attach(whole, lora.Config(rank=64, targets=("0",)), generator()).tensors().values()
    assert not A.any()
    values = B.detach().double().flatten().sort().values
    expected = torch.special.ndtr(values)
    observed = torch.arange(1, len(values) + 1) / len(values)
    # Kolmogorov's statistic; 1.95 / sqrt(n) is passed by chance once in a thousand.
    assert float((expected - observed).abs().max()) < 1.95 / math.sqrt(len(values))


@geometries
def test_peft_s_convolution_is_two_small_matrices_per_patch(geometry: str) -> None:
    adapted, x = warmed(geometry), sample(geometry)
    layer = adapted.layers["layer"]
    base, A, B = layer.base, layer.A.detach(), layer.B.detach()
    assert A.shape == (R, 6, 3, 3)
    assert B.shape == (8, R // base.groups, 1, 1)
    wide = torch.zeros(8, R, dtype=torch.float64)  # B with the zeros that its groups leave out
    for e in range(8):
        first = e // (8 // base.groups) * (R // base.groups)
        wide[e, first : first + R // base.groups] = B[e, :, 0, 0]
    seen = patches(base, x)
    y = torch.einsum("ed,ndp->nep", grouped_matrix(base), seen)
    y += ALPHA / R * torch.einsum("er,rd,ndp->nep", wide, A.flatten(1), seen)
    y += 0 if base.bias is None else base.bias.detach()[:, None]
    assert_same({"y": adapted.model(x).flatten(2)}, {"y": y})
    assert_same({"delta": layer.delta().flatten(1)}, {"delta": ALPHA / R * wide @ A.flatten(1)})


@geometries
def test_loralib_s_convolution_is_a_reshaped_product(geometry: str) -> None:
    adapted, x = warmed(geometry, conv="loralib"), sample(geometry)
    base, A, B = adapted.layers["layer"].base, *(t.detach() for t in adapted.tensors().values())
    assert (A.shape, B.shape) == ((R * 3, 6 * 3), (8 // base.groups * 3, R * 3))
    kernel = copy.deepcopy(base)
    with torch.no_grad():
        kernel.weight += (ALPHA / R * (B @ A)).reshape(8, 6 // base.groups, 3, 3)
    y = torch.einsum("ed,ndp->nep", grouped_matrix(kernel), patches(base, x))
    y += 0 if base.bias is None else base.bias.detach()[:, None]
    assert_same({"y": adapted.model(x).flatten(2)}, {"y": y})


def test_the_two_convolutions_have_the_known_numbers_of_parameters() -> None:
    for conv, count in {"peft": 2816, "loralib": 6912}.items():
        whole = nn.Sequential(nn.Conv2d(64, 128, 3))
        adapted = lora.attach(whole, lora.Config(rank=4, targets=("0",), conv=conv), generator())
        assert sum(p.numel() for p in adapted.parameters()) == count


@parametrisations
def test_a_convolution_starts_uniform_within_one_over_root_in(conv: str) -> None:
    whole = nn.Sequential(nn.Conv2d(40, 8, 3))
    A, B = lora.attach(whole, lora.Config(rank=64, targets=("0",), conv=conv), generator()).tensors().values()
    assert not B.any()
    values = A.detach().double().flatten().sort().values * math.sqrt(40 * (9 if conv == "peft" else 3))
    assert float(values.abs().max()) <= 1 + torch.finfo(torch.float32).eps
    observed = torch.arange(1, len(values) + 1) / len(values)
    assert float(((values + 1) / 2 - observed).abs().max()) < 1.95 / math.sqrt(len(values))


def test_a_convolution_of_which_the_rank_is_no_multiple_of_the_groups_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^layer: rank 3 is no multiple of the convolution's 2 groups$"):
        attached("groups", rank=3)
    attached("groups", rank=3, conv="loralib")
    with pytest.raises(ValueError, match=r"^layer: conv=loralib is defined for square kernels, and this one is 3 x 1$"):
        lora.attach(nn.ModuleDict({"layer": nn.Conv2d(6, 8, (3, 1))}), config(conv="loralib"), generator())


@geometries
def test_ungrouped_computes_the_same(geometry: str) -> None:
    base, x = model(geometry).layer, sample(geometry)
    whole = ungrouped(base)
    assert whole.groups == 1
    assert_same({"y": whole(x)}, {"y": base(x)})


@pytest.mark.parametrize("name", ["Conv1D", "embedding", "scaled", "everything"])
@parametrisations
def test_autograd_agrees_with_finite_differences(name: str, conv: str) -> None:
    adapted = warmed(name, conv=conv)
    x = sample(name)[:1]
    x = x.requires_grad_(True) if x.is_floating_point() else x
    if name == "embedding":
        x = x.masked_fill(x == 3, 4)  # the padding entry has no gradient, by decree
    assert torch.autograd.gradcheck(lambda x, A, B: adapted.model(x), (x, *adapted.parameters()), fast_mode=True)


@every_dtype
def test_at_the_start_the_model_is_the_base_model(name: str, dtype: str) -> None:
    x, adapted = sample(name, dtype), attached(name, dtype)
    assert torch.equal(adapted.model(x), model(name, dtype).requires_grad_(False)(x))
    truth = attached(name).tensors()
    assert exact(adapted.tensors(), {n: t.to(DTYPES[dtype]) for n, t in truth.items()}).passed
    assert {id(p) for p in adapted.model.parameters() if p.requires_grad} == set(map(id, adapted.parameters()))


@every_dtype
@parametrisations
def test_merged_is_unmerged(name: str, conv: str, dtype: str) -> None:
    adapted, x = warmed(name, dtype, conv=conv), sample(name, dtype)
    twin = lora.attach(model(name, dtype).double(), config(conv=conv), generator())
    load(twin, adapted.tensors())
    want = {"y": twin.model(x.double() if x.is_floating_point() else x).detach()}
    before = adapted.model(x)
    adapted.merge()
    merged = adapted.model.layer
    assert type(merged) is type(adapted.layers["layer"].base)
    assert not any(p.requires_grad for p in merged.parameters())
    judged = noise_floor({"y": merged(x)}, want, {"y": before}, dtype)
    assert judged.passed, judged
    adapted.unmerge()
    assert torch.equal(adapted.model(x), before)
    adapted.detach()
    assert exact(adapted.model.state_dict(), model(name, dtype).state_dict()).passed


def test_merging_an_embedding_leaves_the_head_that_is_tied_to_it() -> None:
    whole = nn.Sequential()
    whole.add_module("layer", nn.Embedding(20, 10))
    whole.add_module("head", nn.Linear(10, 20, bias=False))
    whole.head.weight = whole.layer.weight
    adapted, ids = lora.attach(whole, config(), generator()), sample("embedding")
    warm(adapted.tensors(), generator(6))
    before, head = whole(ids), whole.head.weight.clone()
    adapted.merge()
    assert torch.equal(whole.head.weight, head)
    assert_same({"y": whole(ids)}, {"y": before.double()}, "float32")


@every
@parametrisations
def test_rslora_divides_by_the_root_of_the_rank(name: str, conv: str) -> None:
    plain, root = (warmed(name, conv=conv, rslora=r).layers["layer"].delta() for r in (False, True))
    assert torch.equal(root, plain * 2)  # rank 4


@pytest.mark.parametrize("name", ["Conv1D", "plain", "everything"])
@parametrisations
def test_dropout_affects_the_adapter_only(name: str, conv: str) -> None:
    adapted, x = warmed(name, dropout=0.5, conv=conv), sample(name)
    layer = adapted.layers["layer"]
    torch.manual_seed(7)
    y = adapted.model.train()(x)
    torch.manual_seed(7)
    dropped = nn.functional.dropout(x, 0.5)
    # In eval mode the layer is linear in what each branch sees.
    layer.eval()
    assert_same({"y": y}, {"y": layer.base(x) + layer(dropped) - layer.base(dropped)})
    assert not torch.equal(y, layer(x))


def test_an_embedding_drops_nothing() -> None:
    adapted, ids = warmed("embedding", dropout=0.9), sample("embedding")
    assert torch.equal(adapted.model.train()(ids), adapted.model.eval()(ids))
