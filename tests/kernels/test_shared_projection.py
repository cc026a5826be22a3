"""VeRA's layers that see one input share its product with A: when they do, and that no number tells."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from harness.conformance.comparison.tolerance_policies import noise_floor
from harness.kernels.torch import vera_linear
from harness.kernels.torch.vera_linear import SharedProjection

T, D, E, R = 6, 20, 14, 5


def drawn(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Return what two layers compute by; x, b and d want gradients."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": (T, D), "W": (E, D), "A": (R, D), "B": (E, R), "b": (E,), "d": (R,)}
    found = {name: torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for name, s in shapes.items()}
    return {name: t.requires_grad_(name in ("x", "b", "d")) for name, t in found.items()}


@pytest.fixture
def projections(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each product with A."""
    seen: list[int] = []
    right = vera_linear._projection

    def counted(x: Tensor, A: Tensor, mask: Tensor | None) -> Tensor:
        seen.append(len(x))
        return right(x, A, mask)

    monkeypatch.setattr(vera_linear, "_projection", counted)
    return seen


def call(of: dict[str, Tensor], shared: SharedProjection | None, mask: Tensor | None = None) -> Tensor:
    return vera_linear.vera_linear(of["x"], of["W"], None, of["A"], of["B"], of["b"], of["d"], mask, shared)


def test_one_product_for_all_layers_of_one_input(projections: list[int]) -> None:
    of, shared = drawn(), SharedProjection()
    kept = [call(of, shared) for _ in range(3)]
    assert len(projections) == 1
    assert all(torch.equal(y, call(of, None)) for y in kept)


def test_layers_with_masks_share_nothing(projections: list[int]) -> None:
    of, shared = drawn(), SharedProjection()
    kept = [call(of, shared, torch.ones(T, D)) for _ in range(3)]
    assert len(projections) == len(kept)


def _x(of: dict[str, Tensor]) -> None:
    of["x"].detach().mul_(2)


def _a(of: dict[str, Tensor]) -> None:
    of["A"].mul_(2)


def _another_x(of: dict[str, Tensor]) -> None:
    of["x"] = (2 * of["x"]).detach().requires_grad_()


def _another_a(of: dict[str, Tensor]) -> None:
    of["A"] = 2 * of["A"]


def _memory(of: dict[str, Tensor]) -> None:
    of["x"].data = 2 * of["x"].data


@pytest.mark.parametrize("change", [_x, _a, _another_x, _another_a, _memory])
def test_modified_inputs_and_weights_are_detected(
    change: Callable[[dict[str, Tensor]], None], projections: list[int]
) -> None:
    of, shared = drawn(), SharedProjection()
    kept = call(of, shared)  # whose graph keeps what is shared
    change(of)
    assert torch.equal(call(of, shared), call(of, None))
    assert not torch.equal(kept, call(of, None))


def test_gradients_enabled_between_calls_are_recorded() -> None:
    of, shared = drawn(), SharedProjection()
    with torch.no_grad():
        kept = call(of, shared)
    call(of, shared).sum().backward()
    mine = of["x"].grad
    fresh = drawn()
    call(fresh, None).sum().backward()
    assert kept is not None
    assert mine is not None
    assert fresh["x"].grad is not None
    assert torch.equal(mine, fresh["x"].grad)


def test_each_layer_may_have_a_separate_backward_pass() -> None:
    of, shared = drawn(), SharedProjection()
    outputs = [call(of, shared) for _ in range(2)]
    for y in outputs:
        y.sum().backward()
    alone = drawn()
    (2 * call(alone, None).sum()).backward()
    assert of["x"].grad is not None
    assert alone["x"].grad is not None
    rounded = {"x": alone["x"].grad}
    wide = drawn(torch.float64)
    (2 * call(wide, None).sum()).backward()
    assert wide["x"].grad is not None
    assert noise_floor({"x": of["x"].grad}, {"x": wide["x"].grad}, rounded, "float32").passed


def test_a_second_derivative() -> None:
    def second(dtype: torch.dtype, by: Callable[[dict[str, Tensor]], Tensor]) -> dict[str, Tensor]:
        of = drawn(dtype)
        trained = [of[name] for name in ("x", "b", "d")]
        first = torch.autograd.grad(by(of).square().sum(), trained, create_graph=True)
        found = torch.autograd.grad(sum(g.square().sum() for g in first), trained)
        return dict(zip(("x", "b", "d"), found, strict=True))

    def plain(of: dict[str, Tensor]) -> Tensor:
        return of["x"] @ of["W"].T + of["b"] * ((of["d"] * (of["x"] @ of["A"].T)) @ of["B"].T)

    mine = second(torch.float32, lambda of: call(of, SharedProjection()))
    assert noise_floor(mine, second(torch.float64, plain), second(torch.float32, plain), "float32").passed


@pytest.mark.slow
def test_threads_with_different_inputs_share_nothing() -> None:
    of, shared, wrong = drawn(), SharedProjection(), []

    def many(seed: int) -> None:
        x = torch.randn(T, D, generator=torch.Generator().manual_seed(seed))
        mine = {**of, "x": x}
        want = call(mine, None)
        wrong.extend(1 for _ in range(500) if not torch.equal(call(mine, shared), want))

    running = [threading.Thread(target=many, args=(seed,)) for seed in range(4)]
    for one in running:
        one.start()
    for one in running:
        one.join()
    assert not wrong
