"""LoRA layers of one input, computed by one call: the same numbers whatever is called, changed or freed in between."""

from __future__ import annotations

import copy
import sys
import threading
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from harness.conformance.subject import configure
from harness.conformance.tolerance import noise_floor
from harness.kernels import siblings
from harness.kernels.nf4_linear import Nf4Linear
from harness.registry import discover

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
    knobs = {"adalora": {"target_rank": 2}}.get(method, {})
    config = configure(method, {"rank": R, "alpha": 2.0, "targets": list(NAMES), **knobs})
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
    right = siblings.lora_linears

    def counted(x: Tensor, layers: Any, *rest: Any) -> list[Tensor]:
        seen.append(len(layers))
        return right(x, layers, *rest)

    monkeypatch.setattr(siblings, "lora_linears", counted)
    return seen


@pytest.mark.parametrize("method", ["lora", "dora", "pissa", "adalora"])
def test_one_call_computes_all_and_the_same(method: str, together: list[int]) -> None:
    adapted = attached(method)
    for seed in range(3):
        x = given(seed=seed)
        assert are_those_of_the_reference(gradients(adapted, x, lambda m, x: m(x)), method, x, lambda m, x: m(x))
    assert together == [3, 3, 3]


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_packed_layers_too(method: str, together: list[int]) -> None:
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
def test_any_order_any_choice_and_twice(names: tuple[str, ...]) -> None:
    adapted = attached()
    for _ in range(2):
        gradients(adapted, given(), lambda m, x: m(x))
    for _ in range(3):
        x = given(seed=9)
        act = lambda m, x: torch.cat([m(x, names), m(x)], dim=-1)  # noqa: E731
        assert are_those_of_the_reference(gradients(adapted, x, act), "lora", x, act)


def test_who_is_never_asked_is_no_longer_computed(together: list[int]) -> None:
    adapted = attached()
    for _ in range(siblings.PATIENCE + 3):
        adapted.model(given(), ("q", "k"))
    assert together[0] == 3
    assert together[-1] == 2


def test_layers_beside_each_other_with_other_names_and_of_other_parents_are_strangers() -> None:
    pair = [SimpleNamespace() for _ in range(5)]
    paths = ("0.q_proj", "0.o_proj", "1.q_proj", "1.v_proj", "v_proj")
    siblings.meet(dict(zip(paths, pair, strict=True)))
    families = [one.family for one in pair]
    assert families[2] is families[3]
    assert len({id(one) for one in families}) == 4


def test_one_after_the_other_each_with_its_own_backward_pass() -> None:
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
def test_who_is_not_asked_gets_no_gradient(method: str) -> None:
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
    x.data.mul_(2)
    x.detach().mul_(2)  # through an alias, which counts


def _writes_to_b(model: Any, x: Tensor) -> None:
    with torch.no_grad():
        model.k.B.mul_(2)


def _replaces_the_base(model: Any, x: Tensor) -> None:
    model.k.base.weight = nn.Parameter(2 * model.k.base.weight, requires_grad=False)


@pytest.mark.parametrize("change", [_writes_to_x, _writes_to_b, _replaces_the_base])
def test_what_changed_in_between_is_seen(change: Callable[[Any, Tensor], None]) -> None:
    found = []
    for name, dtype in (("fused", torch.float32), ("reference", torch.float64), ("reference", torch.float32)):
        model, x = attached(name=name, dtype=dtype).model, given(dtype).detach()
        model.q(x)
        change(model, x)
        found.append({"k": model.k(x).detach()})
    assert noise_floor(*found, "float32").passed


def test_gradients_switched_on_in_between_are_recorded() -> None:
    adapted = attached()
    for _ in range(2):
        adapted.model(given())
    x = given()
    with torch.no_grad():
        adapted.model.q(x)
    assert adapted.model.k(x).requires_grad


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_from_the_first_step_on(reentrant: bool) -> None:
    adapted = attached()
    act = lambda m, x: checkpoint(m, x, use_reentrant=reentrant)  # noqa: E731
    for seed in range(3):
        x = given(seed=seed)
        assert are_those_of_the_reference(gradients(adapted, x, act), "lora", x, lambda m, x: m(x))


def test_checkpointing_of_what_ceases_to_be_computed_in_advance() -> None:
    """A recomputation that kept other tensors than the first pass would be refused."""
    adapted = attached()
    for _ in range(siblings.PATIENCE + 3):
        gradients(adapted, given(), lambda m, x: checkpoint(_cross, m, x, use_reentrant=False))
    for _ in range(siblings.PATIENCE + 3):
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


def test_a_copy_is_a_model_of_its_own(together: list[int]) -> None:
    adapted = attached()
    for _ in range(2):
        adapted.model(given())
    x = given()
    adapted.model.q(x)
    twin = copy.deepcopy(adapted.model)
    for other in (twin, copy.deepcopy(twin)):
        assert other.q.family is other.k.family
        assert other.q.family is not adapted.model.q.family
        with torch.no_grad():
            other.k.B.zero_()
        before = len(together)
        other(x)
        assert together[before:] == [3]
        assert torch.equal(other.k(x), other.k.base(x))
        assert not torch.equal(other.k(x), adapted.model.k(x))


def test_threads_get_each_their_own() -> None:
    adapted = attached()
    inputs = [given(seed=seed).detach() for seed in range(4)]
    want, wrong = [adapted.model(x) for x in inputs], []

    def many(index: int) -> None:
        for _ in range(100):
            if not torch.equal(adapted.model(inputs[index]), want[index]):
                wrong.append(index)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    running = [threading.Thread(target=many, args=(index,)) for index in range(4)]
    for one in running:
        one.start()
    for one in running:
        one.join()
    sys.setswitchinterval(interval)
    assert not wrong
