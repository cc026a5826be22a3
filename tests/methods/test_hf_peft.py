"""hf-peft behind the harness's seam: what it gives is peft's own, and it can be taken off again."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn

from harness.conformance.comparison.tolerance_policies import noise_floor
from harness.conformance.subject import DTYPES, configure
from harness.methods.implementations import hf_peft
from harness.methods.peft_config import UNREFERENCED
from harness.methods.registry import Implementation

METHODS = {
    one.target: one
    for one in hf_peft.implementations()
    if (one.kind, one.name) == ("method", "hf-peft") and one.target not in UNREFERENCED
}
CONFIGS: dict[str, dict[str, Any]] = {
    "adalora": {"rank": 4, "target_rank": 2, "total_steps": 20, "tinit": 2, "tfinal": 5, "delta_t": 3},
    "oft": {"block_size": 8},
}


class Model(nn.Module):
    def __init__(self, dtype: str = "float32") -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first = nn.Linear(64, 128, dtype=DTYPES[dtype])
            self.second = nn.Linear(128, 64, bias=False, dtype=DTYPES[dtype])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x)))  # type: ignore[no-any-return]


def attached(method: str, dtype: str = "float32", model: nn.Module | None = None, **values: Any) -> Any:
    config = configure(method, {"targets": ["first", "second"], **CONFIGS.get(method, {"rank": 4}), **values})
    model = Model(dtype) if model is None else model
    return METHODS[method](model, config, torch.Generator().manual_seed(3))


def test_one_entry_point_has_all_implementations() -> None:
    from harness.methods.registry import discover

    found = {(i.kind, i.target) for i in discover(["hf-peft"]).implementations}
    assert found == {(i.kind, i.target) for i in hf_peft.implementations()}
    assert {"lora", "dora", "adalora", "pissa", "vera", "loha", "lokr", "oft", "qlora", "lora_int8"} == METHODS.keys()
    assert ("operation", "multi_lora_linear") in found


@pytest.mark.parametrize("method", METHODS)
def test_the_tensors_are_the_parameters_that_peft_trains(method: str) -> None:
    adapted = attached(method)
    tensors = adapted.tensors()
    own = {id(p) for p in adapted.model.parameters() if p.requires_grad}
    assert {id(t) for t in tensors.values()} == own
    adapted.model(torch.randn(5, 64)).square().sum().backward()
    assert all(t.grad is not None for t in tensors.values())


@pytest.mark.parametrize("method", sorted(METHODS.keys() - {"qlora"}))
def test_on_16_bit_models_the_adapter_is_float32(method: str) -> None:
    adapted = attached(method, "bfloat16")
    assert {t.dtype for t in adapted.parameters()} == {torch.float32}
    assert adapted.model(torch.randn(5, 64, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("method", METHODS)
def test_attaching_draws_from_its_generator_alone(method: str) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one = attached(method)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    other = attached(method)
    for name, tensor in one.tensors().items():
        assert torch.equal(tensor, other.tensors()[name]), name


@pytest.mark.parametrize("method", METHODS)
def test_a_second_adapter_after_detach_equals_a_first(method: str) -> None:
    model = Model()
    layers = {name: model.get_submodule(name) for name in ("first", "second")}
    adapted = attached(method, model=model)
    adapted.detach()
    assert {name: model.get_submodule(name) for name in layers} == layers
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # peft warns of a second adapter
        again = attached(method, model=model)
    assert again.tensors().keys() == adapted.tensors().keys()


@pytest.mark.parametrize(
    ("method", "values", "says"),
    [
        ("dora", {"per": "input"}, "one magnitude per output feature"),
        ("dora", {"detach_norm": False}, "treats the norm as a constant"),
        ("adalora", {"regularization": "squared-sum"}, "the mean of norms, not squared-sum"),
        ("adalora", {"beta1": 1.0}, "refuses a beta of 0 or 1"),
        (
            "oft",
            {"block_size": 28},
            "first: peft divides 64 input features into blocks of 32, and the reference into blocks of 16",
        ),
    ],
)
def test_unsupported_configs_leave_the_model_unchanged(method: str, values: dict[str, Any], says: str) -> None:
    model = Model()
    with pytest.raises(NotImplementedError, match=says):
        attached(method, model=model, **values)
    assert type(model.first) is nn.Linear


def test_dora_of_a_convolution_with_groups_is_refused() -> None:
    layer = nn.Conv2d(4, 6, 3, groups=2)
    with pytest.raises(NotImplementedError, match="0: for a convolution with 2 groups"):
        attached("dora", model=nn.Sequential(layer), targets=["0"])
    assert layer.weight.requires_grad


def test_adalora_of_a_convolution_needs_a_peft_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.Conv2d(4, 6, 3)
    assert attached("adalora", model=nn.Sequential(layer), targets=["0"]).tensors()["0.A"].shape == (4, 4 * 9)
    monkeypatch.delattr("peft.tuners.adalora.layer.SVDConv2d")
    with pytest.raises(NotImplementedError, match="0: peft's AdaLoRA adapts a Conv2d since"):
        attached("adalora", model=nn.Sequential(nn.Conv2d(4, 6, 3)), targets=["0"])


def test_oft_takes_a_block_size_for_which_peft_has_the_blocks_of_the_reference() -> None:
    adapted = attached("oft", block_size=200)
    assert {name: tuple(t.shape) for name, t in adapted.tensors().items()} == {
        "first.Q": (1, 64 * 63 // 2),
        "second.Q": (1, 128 * 127 // 2),
    }


def test_pissa_of_peft_starts_embeddings_as_lora() -> None:
    table = nn.Embedding(12, 8)
    W = table.weight.detach().clone()
    adapted = attached("pissa", model=nn.Sequential(table), targets=["0"])
    assert not adapted.tensors()["0.A"].any()
    assert torch.equal(adapted.state()["0.residual"], W.T)
    with pytest.raises(ValueError, match="0 is a Conv2d, which this method does not support"):
        attached("pissa", model=nn.Sequential(nn.Conv2d(4, 8, 3)), targets=["0"])


def test_the_regularizer_of_adalora_equals_pefts() -> None:
    from types import SimpleNamespace

    adapted = attached("adalora", orthogonality=0.7)
    with torch.no_grad():
        for tensor in adapted.parameters():
            tensor.normal_()
    forward, x = adapted.model.forward, torch.randn(5, 64)
    adapted.model.forward = lambda x: SimpleNamespace(loss=forward(x).sum())
    with_term = adapted.tuner(x).loss
    adapted.model.forward = forward
    plain = adapted.model(x).sum()
    have = {"loss": (plain + adapted.regularizer()).detach()}
    want = {"loss": with_term.detach().double()}
    assert noise_floor(have, want, want, "float32").passed
    assert adapted.regularizer().requires_grad


def test_loaded_masks_of_adalora_are_applied() -> None:
    adapted = attached("adalora")
    with torch.no_grad():
        for tensor in adapted.parameters():
            tensor.normal_()
        adapted.state()["first.mask"][1] = False
    adapted.after_step(18)  # past total_steps - tfinal, where the last mask is put on after every step
    E = adapted.tensors()["first.E"]
    assert [bool(e) for e in E] == [True, False, True, True]
    assert adapted.tensors()["second.E"].all()


def test_state_of_qlora_has_the_references_names() -> None:
    adapted = attached("qlora", block=64)
    state = adapted.state()
    assert {name.rpartition(".")[2] for name in state} == {"codes", "absmax", "absmax2", "offset"}
    assert state["first.codes"].numel() * 2 == 64 * 128
    state["first.codes"].fill_(0x77)  # the code of zero, twice
    x = torch.randn(3, 64)
    assert torch.equal(adapted.model.first(x), adapted.model.first.base_layer.bias.expand(3, 128))
    assert {n.rpartition(".")[2] for n in attached("qlora", double_quant=False).state()} == {"codes", "absmax"}


def test_every_implementation_lists_its_requirements() -> None:
    assert all(isinstance(i, Implementation) and "peft" in i.requires for i in hf_peft.implementations())
