"""Paging moves bytes and changes no value: any optimizer, any budget, to the last bit."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from reference.galore import GaLore
from reference.operations.adamw8bit import AdamW8bit
from reference.operations.paged import MIN_PAGED_ELEMENTS, Paged, is_paged

LEAST = MIN_PAGED_ELEMENTS
NUMELS = (LEAST, 5, LEAST + 1000, LEAST - 1, LEAST + 3000)  # the second and fourth are too small
PAGES = [2 * 4 * n for n in NUMELS if n >= LEAST]  # two float32 moments each
EVERYTHING = sum(PAGES)

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.1, weight_decay=0.1),
    "adamw-8bit": lambda groups: AdamW8bit(groups, lr=0.1),
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.1),  # no state at all
    "momentum": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9),
    "galore": lambda groups: GaLore(groups, lr=0.1),
}


def parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(n, generator=generator)) for n in NUMELS]


def grouped(params: list[nn.Parameter]) -> list[dict[str, Any]]:
    return [{"params": params[:2]}, {"params": params[2:], "lr": 0.2}]


def run(
    params: list[nn.Parameter], optimizer: torch.optim.Optimizer, steps: range, without: tuple[int, ...] = ()
) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(100 + step)
        for index, p in enumerate(params):
            p.grad = torch.randn(p.shape, generator=generator)
            if index in without:
                p.grad = None
        optimizer.step()


def paged_adamw(budget: int) -> tuple[list[nn.Parameter], Paged]:
    params = parameters()
    return params, Paged(OPTIMIZERS["adamw"](grouped(params)), budget)


def on_device(params: list[nn.Parameter], optimizer: Paged) -> list[int]:
    """The places in `params` of what is on the device."""
    where = optimizer.where()
    return [i for i, p in enumerate(params) if where.get(p) == "device"]


@pytest.mark.parametrize("numel", [1, LEAST - 1, LEAST, 10 * LEAST])
def test_paged_tensors(numel: int) -> None:
    assert is_paged(numel) == (numel >= 1e5)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("budget", [0, PAGES[0] + PAGES[1], EVERYTHING], ids=["nothing", "some", "all"])
def test_paging_changes_no_bit(name: str, budget: int) -> None:
    plain, paged = parameters(), parameters()
    optimizers = [OPTIMIZERS[name](grouped(plain)), Paged(OPTIMIZERS[name](grouped(paged)), budget)]
    for params, optimizer in zip((plain, paged), optimizers, strict=True):
        run(params, optimizer, range(4))
    for p, other in zip(plain, paged, strict=True):
        assert torch.equal(other, p)
        state, its = optimizers[0].state[p], optimizers[1].state[other]
        assert state.keys() == its.keys()
        for key, value in state.items():
            assert torch.equal(its[key], value) if isinstance(value, Tensor) else its[key] == value


def test_states_within_the_budget_do_not_move() -> None:
    _, optimizer = paged = paged_adamw(EVERYTHING)
    run(*paged, range(3))
    assert (optimizer.bytes_in, optimizer.bytes_out) == (0, 0)
    assert optimizer.resident == optimizer.peak == EVERYTHING
    assert set(optimizer.where().values()) == {"device"}


def test_with_a_budget_of_0_each_state_moves_in_and_out_once_per_step() -> None:
    _, optimizer = paged = paged_adamw(0)
    run(*paged, range(5))
    assert optimizer.bytes_in == 4 * EVERYTHING  # at the first step they are made on the device
    assert optimizer.bytes_out == 5 * EVERYTHING
    assert (optimizer.resident, optimizer.peak) == (0, max(PAGES))  # one at a time
    assert set(optimizer.where().values()) == {"host"}


def test_small_states_are_not_paged() -> None:
    params, optimizer = paged = paged_adamw(0)
    small = [params[1], params[3]]
    run(*paged, range(1))
    held = [optimizer.state[p]["exp_avg"] for p in small]
    run(*paged, range(1, 3))
    assert all(optimizer.state[p]["exp_avg"] is t for p, t in zip(small, held, strict=True))
    assert not set(small) & set(optimizer.where())


@pytest.mark.parametrize("budget", [0, PAGES[0], PAGES[0] + PAGES[1], PAGES[2], EVERYTHING - 1, EVERYTHING])
def test_peak_memory_stays_within_the_budget(budget: int) -> None:
    _, optimizer = paged = paged_adamw(budget)
    run(*paged, range(1))
    optimizer.peak = 0  # from here on every state exists
    run(*paged, range(1, 4))
    assert optimizer.resident <= budget
    assert optimizer.peak <= max(budget, max(PAGES))
    assert optimizer.resident == sum(
        t.nbytes for p, place in optimizer.where().items() if place == "device"
        for t in optimizer.state[p].values() if t.numel() >= LEAST
    )  # fmt: skip


def test_the_least_recently_used_state_is_evicted_first() -> None:
    params, optimizer = paged = paged_adamw(EVERYTHING)
    run(*paged, range(1))
    run(*paged, range(1, 2), without=(2, 4))  # only the first of the large ones is used
    optimizer.make_room(EVERYTHING - 1)
    assert on_device(params, optimizer) == [0, 4]  # 2 was used before 4, 0 after both
    optimizer.make_room(PAGES[0])
    assert on_device(params, optimizer) == [0]
    assert (optimizer.resident, optimizer.bytes_out) == (PAGES[0], PAGES[1] + PAGES[2])
    optimizer.make_room(0)
    assert optimizer.resident == 0


def test_eviction_between_steps_changes_no_bit() -> None:
    """The paper's case: memory is short in the backward pass, and plentiful again in the update."""
    plain = parameters()
    run(plain, OPTIMIZERS["adamw"](grouped(plain)), range(4))
    params, optimizer = paged_adamw(EVERYTHING)
    for step in range(4):
        optimizer.make_room(0)
        run(params, optimizer, range(step, step + 1))
        assert optimizer.resident == EVERYTHING
    assert all(map(torch.equal, params, plain))
    assert optimizer.bytes_in == optimizer.bytes_out == 3 * EVERYTHING


def test_a_parameter_without_a_gradient_is_not_moved() -> None:
    params, optimizer = paged = paged_adamw(0)
    run(*paged, range(1))
    run(*paged, range(1, 2), without=(0, 2))
    assert optimizer.bytes_in == PAGES[2]
    assert on_device(params, optimizer) == []


def test_the_host_has_a_separate_copy() -> None:
    params, optimizer = paged = paged_adamw(EVERYTHING)
    run(*paged, range(1))
    before = optimizer.state[params[0]]["exp_avg"]
    optimizer.make_room(0)
    page = optimizer.state[params[0]]["exp_avg"]
    assert torch.equal(page, before)
    assert page.data_ptr() != before.data_ptr()


@pytest.mark.parametrize("into", [0, EVERYTHING])
def test_a_saved_optimizer_continues_exactly(into: int) -> None:
    params, optimizer = paged = paged_adamw(PAGES[0])
    run(*paged, range(2))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    others, resumed = paged_adamw(into)
    run(others, resumed, range(9, 10))  # what it held before is forgotten
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert resumed.resident == into
    for p, other in zip(params, others, strict=True):
        other.data.copy_(p)
    run(params, optimizer, range(2, 4))
    run(others, resumed, range(2, 4))
    assert all(map(torch.equal, others, params))


def test_a_schedule_reaches_the_inner_optimizer() -> None:
    plain, paged = parameters(), parameters()
    optimizers = [OPTIMIZERS["adamw"](grouped(plain)), Paged(OPTIMIZERS["adamw"](grouped(paged)), 0)]
    for params, optimizer in zip((plain, paged), optimizers, strict=True):
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))
        for step in range(3):
            run(params, optimizer, range(step, step + 1))
            schedule.step()
    assert all(map(torch.equal, paged, plain))


def test_a_group_added_later_reaches_the_inner_optimizer() -> None:
    params, optimizer = paged_adamw(0)
    late = nn.Parameter(torch.ones(LEAST))
    optimizer.add_param_group({"params": [late], "lr": 0.5})
    late.grad = torch.ones(LEAST)
    optimizer.step()
    assert optimizer.inner.param_groups is optimizer.param_groups
    assert optimizer.where() == {late: "host"}
    assert bool((late < 1).all())
    assert len(params) == 5


def test_a_closure_and_a_failing_step() -> None:
    params, optimizer = paged_adamw(0)

    def closure() -> Tensor:
        loss = params[0].square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) is not None
    assert on_device(params, optimizer) == []
    params[0].grad = params[0].grad.to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
    assert optimizer.inner.param_groups is optimizer.param_groups


def test_a_negative_budget_is_an_error() -> None:
    with pytest.raises(ValueError, match="budget must be a number of bytes of at least 0, got -1"):
        paged_adamw(-1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="pinned pages need a CUDA device")
def test_on_cuda_pages_are_pinned_and_no_bit_changes() -> None:
    plain, paged = ([nn.Parameter(p.detach().cuda()) for p in parameters()] for _ in range(2))
    inner = OPTIMIZERS["adamw"](grouped(paged))
    for params, optimizer in ((plain, OPTIMIZERS["adamw"](grouped(plain))), (paged, Paged(inner, 0))):
        for step in range(4):
            for p in params:
                p.grad = torch.full_like(p, 1.0 + step)
            optimizer.step()
    assert all(map(torch.equal, paged, plain))
    page = inner.state[paged[0]]["exp_avg"]
    assert page.device.type == "cpu"
    assert page.is_pinned()
