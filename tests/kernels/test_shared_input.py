"""LoRA layers of one input, computed by one call: the same numbers whatever is called, changed or freed in between."""

from __future__ import annotations

import copy
import gc
import sys
import threading
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from harness.conformance.comparison.moved_numbers import perturbed
from harness.conformance.comparison.tolerance_policies import noise_floor
from harness.conformance.subject import configure
from harness.conformance.tolerance_constants import PERTURBED_DRAWS
from harness.kernels.torch.nf4_linear import Nf4Linear
from harness.kernels.torch.support import shared_input
from harness.methods.registry import discover

NAMES = ("q", "k", "v")
D, R = 48, 3


class Attention(nn.Module):
    """Three layers of one input, of different widths."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, width in zip(NAMES, (48, 16, 24), strict=True):
            layer = nn.Linear(D, width, bias=name == "k")
            for tensor in layer.parameters():
                tensor.data.normal_(generator=generator).mul_(D**-0.5)
            setattr(self, name, layer)

    def forward(self, x: Tensor, names: tuple[str, ...] = NAMES) -> Tensor:
        return torch.cat([self.get_submodule(name)(x) for name in names], dim=-1)


def attached(
    method: str = "lora", name: str = "fused", dtype: torch.dtype = torch.float32, packed: bool = False
) -> Any:
    """Return an adapted Attention whose factors are random, the same in every dtype and for whoever attaches."""
    model = Attention()
    if packed:
        for path in NAMES:
            setattr(model, path, Nf4Linear(model.get_submodule(path), torch.float32))  # type: ignore[arg-type]
    model.to(dtype)
    (implementation,) = (one for one in discover([name]).implementations if (one.target, one.name) == (method, name))
    options = {"adalora": {"alpha": 2.0, "target_rank": 2}, "vera": {}}.get(method, {"alpha": 2.0})
    config = configure(method, {"rank": R, "targets": list(NAMES), **options})
    adapted = implementation(model, config, torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    for tensor in adapted.tensors().values():
        tensor.data.copy_(torch.randn(tensor.shape, generator=generator, dtype=torch.float64) / 4)
    return adapted


def given(dtype: torch.dtype = torch.float32, seed: int = 2) -> Tensor:
    x = torch.randn(2, 5, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.to(dtype).requires_grad_()


def gradients(adapted: Any, x: Tensor, act: Callable[[Any, Tensor], Tensor]) -> dict[str, Tensor]:
    """Return what `act` gives, and the gradients of x and of all that trains."""
    adapted.model.zero_grad()
    x.grad = None
    y = act(adapted.model, x)
    (y * torch.linspace(-1, 1, y.shape[-1], dtype=y.dtype)).sum().backward()
    trained = {name: tensor.grad.clone() for name, tensor in adapted.tensors().items()}
    assert x.grad is not None
    return {"y": y.detach(), "x": x.grad.clone(), **trained}


def are_those_of_the_reference(
    mine: Mapping[str, Tensor], method: str, x: Tensor, act: Callable[[Any, Tensor], Tensor]
) -> bool:
    truth, rounded = (
        gradients(attached(method, "reference", dtype), x.detach().to(dtype).requires_grad_(), act)
        for dtype in (torch.float64, torch.float32)
    )
    return noise_floor(mine, truth, rounded, "float32").passed


@pytest.fixture
def together(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many layers each call had that computed several."""
    seen: list[int] = []
    right = shared_input.lora_linears

    def counted(x: Tensor, layers: Any, *rest: Any) -> list[Tensor]:
        seen.append(len(layers))
        return right(x, layers, *rest)

    monkeypatch.setattr(shared_input, "lora_linears", counted)
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "dora", "pissa", "adalora"])
def test_one_call_computes_all_layers(method: str, together: list[int]) -> None:
    adapted = attached(method)
    for seed in range(3):
        x = given(seed=seed)
        assert are_those_of_the_reference(gradients(adapted, x, lambda m, x: m(x)), method, x, lambda m, x: m(x))
    assert together == [3, 3, 3]


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_packed_layers_are_computed_together(method: str, together: list[int]) -> None:
    """Over our own NF4 layers it is what the reference computes over the decoded weights."""
    adapted, runs = attached(method, packed=True), []
    for dtype in (torch.float64, torch.float32):
        dense = attached(method, "reference", dtype)
        with torch.no_grad():
            for name in NAMES:
                packed = adapted.model.get_submodule(name).base.packed_weight
                dense.model.get_submodule(name).base.weight.copy_(packed.decoded(torch.float32))
        runs.append(dense)
    for seed in range(2):
        mine, truth, rounded = (
            gradients(one, given(dtype, seed), lambda m, x: m(x))
            for one, dtype in zip([adapted, *runs], (torch.float32, torch.float64, torch.float32), strict=True)
        )
        assert noise_floor(mine, truth, rounded, "float32").passed
    assert together == [3, 3]


@pytest.mark.parametrize("names", [("v", "k", "q"), ("q", "v"), ("k",), ("q", "q", "k"), ("q", "k", "v", "q")])
def test_any_order_any_subset_and_repeated_calls(names: tuple[str, ...]) -> None:
    adapted = attached()
    for _ in range(2):
        gradients(adapted, given(), lambda m, x: m(x))
    for _ in range(3):
        x = given(seed=9)
        act = lambda m, x: torch.cat([m(x, names), m(x)], dim=-1)  # noqa: E731
        assert are_those_of_the_reference(gradients(adapted, x, act), "lora", x, act)


def test_unused_layers_stop_being_precomputed(together: list[int]) -> None:
    adapted = attached()
    for _ in range(3 * shared_input.MAX_UNUSED_OUTPUTS):  # as often asked as not
        adapted.model(given())
        adapted.model(given(), ("q", "k"))
    assert set(together) == {3}
    for _ in range(3 * shared_input.MAX_UNUSED_OUTPUTS):  # buys no patience
        adapted.model(given())
    for _ in range(shared_input.MAX_UNUSED_OUTPUTS + 1):
        adapted.model(given(), ("q", "k"))
    assert together[-2:] == [3, 2]


def test_only_known_names_under_one_parent_form_a_group() -> None:
    paths = ("0.q_proj", "0.o_proj", "1.v_proj", "1.k_proj", "1.q_proj", "v_proj")  # OPT and BART have q last
    layers = {path: shared_input.SharedInputLayer() for path in paths}
    shared_input.link(layers)
    families = [one.input_group for one in layers.values()]
    assert families[2] is families[3] is families[4]
    assert len({id(one) for one in families}) == 4


def test_separate_calls_have_separate_backward_passes() -> None:
    """The first one's backward pass frees what the others would need, had they been computed with it."""
    adapted = attached()
    for _ in range(3):
        x = given()
        for name in NAMES:
            found = gradients(_Only(adapted, name), x, lambda m, x: m(x))
            reference = _Only(attached(name="reference"), name)
            wide = _Only(attached(name="reference", dtype=torch.float64), name)
            truth = gradients(wide, given(torch.float64), lambda m, x: m(x))
            assert noise_floor(found, truth, gradients(reference, given(), lambda m, x: m(x)), "float32").passed


@pytest.mark.parametrize("method", ["lora", "dora", "adalora"])
def test_unused_outputs_get_no_gradient(method: str) -> None:
    """Neither zeros, which an optimizer would take for a step with weight decay."""
    adapted = attached(method)
    adapted.model(given(), ("q",)).sum().backward()
    grads = {name: tensor.grad is not None for name, tensor in adapted.tensors().items()}
    assert grads == {name: name.startswith("q.") for name in grads}


class _Only:
    """One layer of an adapted model."""

    def __init__(self, adapted: Any, name: str) -> None:
        self.model = adapted.model.get_submodule(name)
        self.tensors = self.model.tensors


def _writes_to_x(model: Any, x: Tensor) -> None:
    x.detach().mul_(2)  # through an alias, which counts


def _gives_x_other_memory(model: Any, x: Tensor) -> None:
    x.data = 2 * x.data


def _writes_to_b(model: Any, x: Tensor) -> None:
    with torch.no_grad():
        model.k.B.mul_(2)


def _writes_a_vector_to_the_factors(model: Any, x: Tensor) -> None:
    factors = [model.k.A, model.k.B]
    nn.utils.vector_to_parameters(2 * nn.utils.parameters_to_vector(factors), factors)


def _replaces_a_factor(model: Any, x: Tensor) -> None:
    """Often in the memory, and by the id, of the old one."""
    doubled = 2 * model.k.B.detach()
    del model.k.B
    model.k.B = nn.Parameter(doubled)


def _replaces_the_base_weight(model: Any, x: Tensor) -> None:
    model.k.base.weight = nn.Parameter(2 * model.k.base.weight, requires_grad=False)


def _writes_to_the_bias(model: Any, x: Tensor) -> None:
    with torch.no_grad():
        model.k.base.bias.add_(1)


def _switches_the_adapter_off(model: Any, x: Tensor) -> None:
    model.k.scaling = 0.0


def _takes_a_fused_step(model: Any, x: Tensor) -> None:
    """Such a step does not increment the `_version` of the tensors that it writes."""
    for factor in (model.k.A, model.k.B):
        factor.grad = torch.ones_like(factor)
    torch.optim.AdamW([model.k.A, model.k.B], lr=0.5, fused=True).step()


def _takes_a_step_of_bitsandbytes(model: Any, x: Tensor) -> None:
    """Such a step does not increment `_version` either, and is no step of an optimizer of torch."""
    factors = [model.k.A, model.k.B]
    for factor in factors:
        factor.grad = torch.ones_like(factor)
    optimizer = pytest.importorskip("bitsandbytes.optim").AdamW(factors, lr=0.5)
    versions = [factor._version for factor in factors]
    optimizer.step()
    assert [factor._version for factor in factors] == versions


CHANGES = [
    _takes_a_fused_step, _takes_a_step_of_bitsandbytes, _writes_to_x, _gives_x_other_memory, _writes_to_b,
    _writes_a_vector_to_the_factors, _replaces_a_factor, _replaces_the_base_weight, _writes_to_the_bias,
    _switches_the_adapter_off,
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("method", ["lora", "dora", "pissa", "adalora"])
def test_modifications_between_calls_are_detected(method: str, change: Callable[[Any, Tensor], None]) -> None:
    for _ in range(10 if change is _replaces_a_factor else 1):
        found = []
        for name, dtype in (("fused", torch.float32), ("reference", torch.float64), ("reference", torch.float32)):
            model, x = attached(method, name, dtype).model, given(dtype).detach()
            model.q(x)
            change(model, x)
            found.append({"k": model.k(x).detach()})
        assert noise_floor(*found, "float32").passed


def test_a_hook_on_the_base_is_called_whenever_it_is_set() -> None:
    model, x = attached().model, given()
    model.q(x)
    seen = []
    model.k.base.register_forward_hook(lambda *_: seen.append("hook"))
    model.k(x)
    assert seen == ["hook"]
    model.v.base.register_full_backward_pre_hook(lambda *_: seen.append("backward"))
    model.v(x).sum().backward()
    assert seen == ["hook", "backward"]


def test_autocast_enabled_between_calls_is_detected() -> None:
    found = []
    for name in ("fused", "reference"):
        model, x = attached(name=name).model, given()
        model.q(x)
        with torch.autocast("cpu", torch.bfloat16):
            found.append(model.k(x).dtype)
    assert found[0] == found[1]


def test_gradients_enabled_between_calls_are_recorded() -> None:
    adapted = attached()
    for _ in range(2):
        adapted.model(given())
    x = given()
    with torch.no_grad():
        adapted.model.q(x)
    assert adapted.model.k(x).requires_grad


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_from_the_first_step(reentrant: bool) -> None:
    adapted = attached()
    act = lambda m, x: checkpoint(m, x, use_reentrant=reentrant)  # noqa: E731
    for seed in range(3):
        x = given(seed=seed)
        assert are_those_of_the_reference(gradients(adapted, x, act), "lora", x, lambda m, x: m(x))


def test_checkpointing_of_layers_that_stop_being_precomputed() -> None:
    """A recomputation that kept other tensors than the first pass would be refused."""
    adapted = attached()
    for _ in range(shared_input.MAX_UNUSED_OUTPUTS + 3):
        gradients(adapted, given(), lambda m, x: checkpoint(_cross, m, x, use_reentrant=False))
    for _ in range(shared_input.MAX_UNUSED_OUTPUTS + 3):
        adapted.model(given(), ("q",))
    gradients(adapted, given(), lambda m, x: checkpoint(_cross, m, x, use_reentrant=False))


def _cross(model: Any, x: Tensor) -> Tensor:
    """Return the queries of one tensor and the keys and values of another, as cross-attention takes them."""
    return torch.cat([model(x, ("q",)), model(2 * x, ("k", "v"))], dim=-1)


def test_a_second_derivative() -> None:
    adapted, reference, wide = attached(), attached(name="reference"), attached(name="reference", dtype=torch.float64)

    def second(adapted: Any, x: Tensor) -> dict[str, Tensor]:
        tensors = [x, *adapted.tensors().values()]
        first = torch.autograd.grad(adapted.model(x).square().sum(), tensors, create_graph=True)
        found = torch.autograd.grad(sum(g.square().sum() for g in first), tensors)
        return dict(zip(["x", *adapted.tensors()], found, strict=True))

    for _ in range(3):
        truth, rounded = second(wide, given(torch.float64)), second(reference, given())
        assert noise_floor(second(adapted, given()), truth, rounded, "float32").passed


@pytest.mark.parametrize("method", ["lora", "dora", "pissa", "adalora", "vera", "qlora"])
def test_a_backward_pass_under_autocast_is_that_without(method: str) -> None:
    adapted, x = attached(method), given()
    without = gradients(adapted, x, lambda m, x: m(x))
    y = adapted.model(x)
    x.grad = None
    adapted.model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        (y * torch.linspace(-1, 1, y.shape[-1])).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, without["x"])


@pytest.mark.parametrize("method", ["lora", "dora", "pissa", "adalora", "vera", "qlora"])
def test_a_forward_pass_under_autocast_is_the_references(method: str) -> None:
    def act(model: Any, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=x.dtype == torch.float32):
            return model(x).to(x.dtype)  # type: ignore[no-any-return]

    def seen(name: str, dtype: torch.dtype, seed: int | None = None) -> dict[str, Tensor]:
        """Return what an implementation gives, with its numbers moved by half a bfloat16 unit if there is a seed."""
        adapted, x = attached(method, name, dtype), given(dtype)
        generator = torch.Generator().manual_seed(seed or 0)
        for tensor in () if seed is None else (x, *adapted.model.parameters()):
            tensor.data = perturbed(tensor.data, "bfloat16", generator)
        return gradients(adapted, x, act)

    # One draw of the reference's errors may happen to be small in one of the ten gradients.
    rounded = (seen("reference", torch.float32, seed) for seed in (None, *range(PERTURBED_DRAWS)))
    assert noise_floor(seen("fused", torch.float32), seen("reference", torch.float64), rounded, "bfloat16").passed


@pytest.mark.parametrize("method", ["lora", "pissa", "adalora"])  # in DoRA the weight is a constant
def test_a_base_that_trains_gets_its_gradient(method: str) -> None:
    found = []
    for name, dtype in (("fused", torch.float32), ("reference", torch.float64), ("reference", torch.float32)):
        adapted = attached(method, name, dtype)
        bases = {n: p for n, p in adapted.model.named_parameters() if ".base." in n}
        for p in bases.values():
            p.requires_grad_()
        one = gradients(adapted, given(dtype), lambda m, x: m(x))
        found.append(one | {n: p.grad for n, p in bases.items() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert noise_floor(*found, "float32").passed


def test_frozen_layers_are_not_in_the_backward_pass_of_trained_ones() -> None:
    adapted = attached()
    for name in ("A", "B"):
        getattr(adapted.model.q, name).requires_grad_(False)
    x = given().detach()
    assert not adapted.model.q(x).requires_grad
    assert adapted.model.k(x).requires_grad


def test_a_gradient_of_x_requested_later_is_complete() -> None:
    for method in ("lora", "vera"):
        found = []
        for name, dtype in (("fused", torch.float32), ("reference", torch.float64), ("reference", torch.float32)):
            model, x = attached(method, name, dtype).model, given(dtype).detach()
            kept = model.q(x)
            x.requires_grad_()
            model.k(x).sum().backward()
            assert kept is not None
            assert x.grad is not None
            found.append({"x": x.grad})
        assert noise_floor(*found, "float32").passed


def test_a_second_backward_pass_raises_with_a_hint() -> None:
    model, x = attached().model, given()
    q, k = model.q(x), model.k(x)
    q.sum().backward()
    with pytest.raises(RuntimeError, match=r"such as q, k and v.*retain_graph"):
        k.sum().backward()


def test_layers_of_another_width_are_computed_alone() -> None:
    """As in cross-attention over the states of another model."""
    for method in ("lora", "dora", "pissa", "adalora"):
        found = []
        for name, dtype in (("fused", torch.float32), ("reference", torch.float64), ("reference", torch.float32)):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(f"{__name__}.Attention", _Cross)
                model = attached(method, name, dtype).model
            x, states = given(dtype), given(dtype)[..., :32]
            found.append({"q": model.q(x), "k": model.k(states), "v": model.v(states)})
        assert noise_floor(*({n: t.detach() for n, t in one.items()} for one in found), "float32").passed


class _Cross(Attention):
    """k and v read something narrower."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("k", "v"):
            narrow = nn.Linear(32, 24)
            for tensor in narrow.parameters():
                tensor.data.normal_(generator=torch.Generator().manual_seed(3)).mul_(32**-0.5)
            setattr(self, name, narrow)


def test_weights_made_in_inference_mode() -> None:
    for method in ("lora", "dora", "adalora", "vera"):
        found = []
        for name, dtype in (("fused", torch.float32), ("reference", torch.float64), ("reference", torch.float32)):
            with torch.inference_mode():
                model = attached(method, name, dtype).model
            with torch.no_grad():
                found.append({"y": model(given(dtype))})
        assert noise_floor(*found, "float32").passed


def test_saved_outputs_are_freed_with_their_input_or_at_the_next_call() -> None:
    model, seen = attached().model, []
    for _ in range(3):
        x = given()
        model.q(x)
        seen.append(weakref.ref(x))
        del x
    gc.collect()
    assert [one() is None for one in seen[:-1]] == [True, True]
    with torch.no_grad():
        x = given()
        model.q(x)
        ahead = model.q.input_group._last.call.precomputed
        assert len(ahead) == 2
        del x
        assert not ahead


@pytest.mark.parametrize("method", ["lora", "dora", "pissa", "adalora", "vera", "qlora"])
def test_a_model_can_be_saved_whole(method: str, tmp_path: Path, together: list[int]) -> None:
    adapted, x = attached(method), given()
    want = adapted.model(x)
    torch.save(adapted.model, tmp_path / "model.pt")
    before = len(together)
    read = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(read(x), want)
    assert together[before:] == together[:before]


def test_a_copy_of_one_layer_is_alone() -> None:
    adapted = attached()
    one = copy.deepcopy(adapted.model.q)
    assert list(one.input_group._members) == [0]
    assert torch.equal(one(given()), one.forward_alone(given()))


def test_a_replaced_layer_is_freed() -> None:
    adapted = attached()
    adapted.model(given())
    gone = weakref.ref(adapted.model.k)
    adapted.layers.pop("k")
    adapted.model.k = nn.Linear(D, 16)
    gc.collect()
    assert gone() is None
    adapted.model(given())


def test_a_copied_model_is_independent(together: list[int]) -> None:
    adapted = attached()
    for _ in range(2):
        adapted.model(given())
    x = given()
    adapted.model.q(x)
    twin = copy.deepcopy(adapted.model)
    for other in (twin, copy.deepcopy(twin)):
        assert other.q.input_group is other.k.input_group
        assert other.q.input_group is not adapted.model.q.input_group
        with torch.no_grad():
            other.k.B.zero_()
        before = len(together)
        other(x)
        assert together[before:] == [3]
        assert torch.equal(other.k(x), other.k.base(x))
        assert not torch.equal(other.k(x), adapted.model.k(x))


@pytest.mark.slow
def test_threads_share_no_outputs(together: list[int]) -> None:
    adapted = attached()
    inputs = [given(seed=seed).detach() for seed in range(4)]
    want, wrong = [adapted.model(x) for x in inputs], []

    def many(index: int) -> None:
        for _ in range(100):
            if not torch.equal(adapted.model(inputs[index]), want[index]):
                wrong.append(index)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    before = len(together)
    running = [threading.Thread(target=many, args=(index,)) for index in range(4)]
    for one in running:
        one.start()
    for one in running:
        one.join()
    sys.setswitchinterval(interval)
    assert not wrong
    assert together[before:] == [3] * 400  # nobody's call takes the place of another's
