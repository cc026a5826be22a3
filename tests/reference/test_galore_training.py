"""GaLore as a Method: what trains, through which optimizer; saving; beside the authors' package."""

from __future__ import annotations

import copy
import io
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from harness.conformance.comparison.tolerance_policies import exact, noise_floor
from harness.conformance.subject import DTYPES, configure
from reference import galore
from reference.galore import GaLore, galore_step
from support.two_layer_model import draw


class Small(nn.Module):
    """q_proj 6 -> 9 with a bias, a norm, v_proj 9 -> 4 without a bias, head 4 -> 3."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.q_proj = nn.Linear(6, 9, dtype=dtype)
        self.norm = nn.LayerNorm(9, dtype=dtype)
        self.v_proj = nn.Linear(9, 4, bias=False, dtype=dtype)
        self.head = nn.Linear(4, 3, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.v_proj(self.norm(torch.tanh(self.q_proj(x)))))


def attached(model: nn.Module | None = None, **config: Any) -> Any:
    options = {"rank": 2, "update_gap": 3, **config}
    return galore.attach(model or Small(), configure("galore", options), torch.Generator())


def backward(model: nn.Module, step: int) -> None:
    dtype = next(model.parameters()).dtype
    model(draw(5, 6, seed=step, dtype=dtype)).square().sum().backward()


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def assert_same(have: Tensor | dict[str, Tensor], want: Tensor | dict[str, Tensor], dtype: str = "float64") -> None:
    """Judge by the policy; `want` is in float64, and what rounding it to `dtype` loses is the noise."""
    have, want = ({"it": t} if isinstance(t, Tensor) else t for t in (have, want))
    judged = noise_floor(have, want, {n: t.to(DTYPES[dtype]) for n, t in want.items()}, dtype)
    assert judged.passed, judged


def test_everything_trains_and_the_targets_are_projected() -> None:
    adapted = attached()
    optimizer = adapted.optimizer(0.1, 0.0)
    model = adapted.model
    low, rest = optimizer.param_groups
    assert [id(p) for p in low["params"]] == [id(model.q_proj.weight), id(model.v_proj.weight)]
    assert (low["rank"], rest["rank"]) == (2, 0)
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {id(p) for p in model.parameters()}
    assert all(p.requires_grad for p in model.parameters())
    assert adapted.tensors().keys() == dict(model.named_parameters()).keys()


def test_the_rest_may_be_frozen() -> None:
    adapted = attached(train_rest=False)
    assert adapted.tensors().keys() == {"q_proj.weight", "v_proj.weight"}
    optimizer = adapted.optimizer(0.1, 0.3)
    before = weights(adapted.model)
    backward(adapted.model, 1)
    optimizer.step()
    moved = {n for n, p in adapted.model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {"q_proj.weight", "v_proj.weight"}


def test_the_config_reaches_the_optimizer() -> None:
    options = {
        "rank": 3,
        "update_gap": 5,
        "scale": 0.75,
        "side": "paper",
        "beta1": 0.5,
        "beta2": 0.25,
        "eps": 0.125,
        "niter": 7,
    }
    optimizer = attached(**options).optimizer(0.1, 0.3)
    assert {k: optimizer.param_groups[0][k] for k in options} == options
    assert {k: optimizer.param_groups[1][k] for k in ("beta1", "beta2", "eps")} == {
        "beta1": 0.5, "beta2": 0.25, "eps": 0.125,
    }  # fmt: skip
    assert {(g["lr"], g["weight_decay"]) for g in optimizer.param_groups} == {(0.1, 0.3)}


def test_the_optimizer_takes_the_steps_of_the_function() -> None:
    adapted = attached()
    optimizer = adapted.optimizer(0.1, 0.3)
    want, states = weights(adapted.model), {n: {} for n in weights(adapted.model)}
    for step in range(5):
        backward(adapted.model, step)
        for name, p in adapted.model.named_parameters():
            rank = 2 if name in ("q_proj.weight", "v_proj.weight") else 0
            galore_step(want[name], p.grad, states[name], lr=0.1, weight_decay=0.3, rank=rank, update_gap=3)
        optimizer.step()
        optimizer.zero_grad()
    assert exact(weights(adapted.model), want).passed


def test_a_tied_weight_is_updated_once() -> None:
    model = Small()
    model.head = nn.Linear(9, 4, bias=False, dtype=torch.float64)
    model.head.weight = model.v_proj.weight
    adapted = attached(model, targets=("v_proj", "head"))
    groups = adapted.optimizer(0.1, 0.0).param_groups
    assert [id(p) for p in groups[0]["params"]] == [id(model.v_proj.weight)]
    assert {"v_proj.weight", "head.weight"} <= adapted.tensors().keys()


def test_a_group_added_later_takes_over_its_tensors() -> None:
    adapted = attached()
    optimizer = adapted.optimizer(0.1, 0.0)
    optimizer.add_param_group({"params": list(adapted.model.head.parameters()), "lr": 0.5})
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in adapted.model.parameters())
    assert {id(p) for p in optimizer.param_groups[-1]["params"]} == {id(p) for p in adapted.model.head.parameters()}
    assert (optimizer.param_groups[-1]["lr"], optimizer.param_groups[-1]["rank"]) == (0.5, 0)


def test_a_packed_weight_is_refused() -> None:
    model = Small()
    model.q_proj.weight = nn.Parameter(torch.zeros(27, 1, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match=r"q_proj: GaLore trains the weight itself, but it is packed \(torch.uint8\)"):
        attached(model)


def test_a_saved_optimizer_continues_exactly() -> None:
    adapted = attached()
    optimizer = adapted.optimizer(0.1, 0.3)
    for step in range(2):  # not at a refresh, so that the projector must come back too
        optimizer.zero_grad()
        backward(adapted.model, step)
        optimizer.step()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    twin = attached(copy.deepcopy(adapted.model))
    resumed = twin.optimizer(0.1, 0.3)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for each, its in ((adapted, optimizer), (twin, resumed)):
        for step in range(2, 6):
            its.zero_grad()
            backward(each.model, step)
            its.step()
    assert exact(weights(twin.model), weights(adapted.model)).passed


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_state_has_the_gradients_dtype(dtype: str) -> None:
    adapted = attached(Small(DTYPES[dtype]))
    optimizer = adapted.optimizer(0.01, 0.1)
    backward(adapted.model, 1)
    optimizer.step()
    for state in optimizer.state.values():
        assert {t.dtype for t in state.values() if isinstance(t, Tensor)} == {DTYPES[dtype]}
    assert all(bool(p.isfinite().all()) for p in adapted.model.parameters())


def test_a_closure_may_run_backward() -> None:
    adapted = attached()
    optimizer = adapted.optimizer(0.1, 0.0)

    def closure() -> Tensor:
        loss = adapted.model(draw(5, 6)).square().sum()
        loss.backward()
        return loss

    before = weights(adapted.model)
    assert float(optimizer.step(closure).detach()) > 0
    assert not torch.equal(adapted.model.q_proj.weight, before["q_proj.weight"])


def test_an_optimizer_without_a_model() -> None:
    p = nn.Parameter(draw(4, 7))
    optimizer = GaLore([{"params": [p], "rank": 2}], lr=0.1)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    assert optimizer.step() is None
    assert torch.equal(p, draw(4, 7))  # no gradient, no step, no decay
    p.grad = draw(4, 7, seed=2)
    optimizer.step()
    want, state = draw(4, 7), {}
    galore_step(want, p.grad, state, lr=0.1, rank=2)
    assert torch.equal(p, want)


def theirs(params: Any, **options: Any) -> Any:
    package = pytest.importorskip("galore_torch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that it is deprecated
        return package.GaLoreAdamW(params, no_deprecation_warning=True, **options)


def test_the_authors_package_updates_the_rest_by_the_same_adam() -> None:
    mine, other = attached(targets=("q_proj",)), Small()
    low = {"rank": 2, "update_proj_gap": 3, "scale": 0.25, "proj_type": "std"}
    rest = [p for n, p in other.named_parameters() if n != "q_proj.weight"]
    optimizers = [
        mine.optimizer(0.1, 0.3),
        theirs([{"params": rest}, {"params": [other.q_proj.weight], **low}], lr=0.1, weight_decay=0.3),
    ]
    backward(mine.model, 1)
    backward(other, 1)
    for optimizer in optimizers:
        optimizer.step()
    names = [n for n in weights(other) if n != "q_proj.weight"]
    assert_same({n: weights(other)[n] for n in names}, {n: weights(mine.model)[n] for n in names})
