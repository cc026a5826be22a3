"""Memory of tensors, counted: to the byte, in a step that is undone, and judged by the gate without a test."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from harness.cell.measure.memory import peak_while
from harness.cell.training import loop
from harness.cell.training.counted_step import copied_B, step_peak
from support.small_encoder import Encoder, batches, nothing, setting

Plant = Callable[[Any], "Tensor | None"]
MIB = 2**20
PLANTED = MIB // 2
"""Elements of float32 in 2 MiB."""


@pytest.fixture(autouse=True, scope="module")
def _only_ours() -> Iterator[None]:
    """Put what other tests left out of the collector's sight, as a worker does with its imports: it takes its time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def most(run: Callable[[], object]) -> int:
    """Return what `run` takes beyond what is there."""
    taken, idle = peak_while(run), peak_while(lambda: None)
    assert taken is not None
    assert idle is not None
    return taken - idle


def test_allocations_are_counted_to_the_byte_and_releases_too() -> None:
    assert most(lambda: torch.ones(PLANTED)) == 2 * MIB
    assert most(lambda: [torch.ones(PLANTED), torch.ones(PLANTED)]) == 4 * MIB
    assert most(lambda: [float(torch.ones(PLANTED)[0]) for _ in range(3)]) == 2 * MIB
    x = torch.ones(PLANTED, requires_grad=True)
    assert most(lambda: x * x.detach()) == 2 * MIB
    # Beside x: its cube and the square in it, and of the way back, the gradients of both.
    assert most(lambda: (x * x).sum().backward()) > 2 * 2 * MIB


def test_what_was_there_counts_once_and_what_takes_no_memory_does_not() -> None:
    def there() -> int:
        return peak_while(lambda: None) or 0

    before = there()
    kept: list[Any] = [{"deep": (torch.ones(PLANTED),)}]
    assert there() - before == 2 * MIB
    kept += [kept[0]["deep"][0][1:], nn.Parameter(kept[0]["deep"][0]), torch.ones(PLANTED, device="meta")]
    with FakeTensorMode():
        kept.append(torch.ones(PLANTED))
    assert there() - before == 2 * MIB
    kept.clear()
    assert there() == before


def test_tensors_without_a_storage_count_nothing_and_break_nothing() -> None:
    kept: list[Any] = []

    def keeps_a_tensor_of_a_transform(x: Tensor) -> Tensor:
        kept.append(x)
        return x.sum()

    with_storage = torch.ones(2, 3), torch.ones(3)
    before = peak_while(lambda: None)
    torch.vmap(keeps_a_tensor_of_a_transform)(with_storage[0])
    torch.func.grad(keeps_a_tensor_of_a_transform)(with_storage[1])
    kept.append(nn.LazyLinear(3))
    assert peak_while(lambda: None) == before
    assert len(kept) == 3


def test_garbage_in_circles_does_not_count_and_the_collector_is_on_again() -> None:
    def circle() -> None:
        holder: list[Any] = [torch.ones(PLANTED)]
        holder.append(holder)

    before = peak_while(lambda: None)
    circle()
    assert peak_while(lambda: None) == before
    with pytest.raises(ZeroDivisionError):
        peak_while(lambda: 1 / 0)
    assert gc.isenabled()


# --- in a step -------------------------------------------------------------------------------------------------------


class Planted(Encoder):
    """An Encoder whose forward pass runs `plant` first; what that returns becomes part of the graph."""

    def __init__(self, plant: Plant) -> None:
        super().__init__()
        self.plant = plant

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        planted = self.plant(self)
        out = super().forward(input_ids, attention_mask)
        if planted is not None:
            out.logits = out.logits + 0 * planted
        return out


def trained(method: str = "lora", implementation: str = "fused", plant: Plant = lambda _: None) -> dict[str, Any]:
    """Return what `most_in_step` takes, after three steps."""
    model = Planted(plant)
    if plant is changes:
        model.norm, model.generator = nn.BatchNorm1d(3), torch.Generator()
        model.register_buffer("average", torch.zeros(2))
        model.register_buffer("expanded", torch.zeros(1).expand(3))
    s = setting(model, method, implementation)
    loop.train(batches=batches(3), seed=0, report=nothing, **s)
    return {name: s[name] for name in ("adapted", "head", "optimizer")} | {"batches": batches(3)}


def counted(s: dict[str, Any]) -> int:
    found = step_peak(**s)
    assert found is not None
    return found - (peak_while(lambda: None) or 0)


def keeps(model: Any) -> None:
    if not hasattr(model, "cache"):
        model.cache = torch.zeros(PLANTED)


def saves(model: Any) -> Tensor:
    long = model.head.base.weight.sum() * torch.ones(PLANTED, requires_grad=True)
    return (long * long).sum()


def changes(model: Any) -> None:
    """Change what a module may keep: buffers, in place and by a new one, and every random state that it may draw from."""
    model.norm(torch.rand(4, 3))
    model.average = 0.9 * model.average + torch.rand(2, generator=model.generator)
    model.drawn = random.random(), np.random.rand()


def takes(model: Any) -> None:
    torch.ones(PLANTED)


def test_equal_steps_have_equal_numbers_and_a_larger_one_is_seen() -> None:
    plain = counted(trained())
    assert counted(trained()) == plain
    assert counted(trained(plant=saves)) - plain > 2 * 2 * MIB
    assert counted(trained(plant=takes)) == 2 * MIB  # when nothing else of the step is there


def test_it_is_the_step_alone_that_counts() -> None:
    s = trained("full", "reference")
    (batch,) = s["batches"] = s["batches"][:1]
    from_it = counted(s)
    idle = peak_while(lambda: None)
    assert idle is not None
    assert peak_while(lambda: loop.step(s["adapted"], [batch], s["optimizer"], seed=0)) == idle + from_it


def test_a_tensor_that_is_kept_is_in_it() -> None:
    s = trained(plant=keeps)
    with_it = step_peak(**s) or 0
    s["adapted"].model.cache = s["adapted"].model.cache[:0].clone()
    assert with_it - (step_peak(**s) or 0) == 2 * MIB


def test_the_step_is_one_over_the_largest_batch() -> None:
    s = trained()
    every, sizes = s["batches"], {}
    for batch in every:
        sizes[batch.padded_tokens] = counted({**s, "batches": [batch]})
    assert len(sizes) > 1
    assert max(sizes.values()) == sizes[max(sizes)] == counted(s) > min(sizes.values())
    assert counted({**s, "accumulate": 4}) < counted(s)


def _trace(s: dict[str, Any]) -> dict[str, Tensor]:
    model = s["adapted"].model
    python, numpy = random.getstate()[1], np.random.get_state(legacy=False)["state"]
    found = {
        "torch": torch.get_rng_state(), "python": torch.tensor(python), "numpy": torch.from_numpy(numpy["key"].copy()),
        "numpy's place": torch.tensor(numpy["pos"]),
    }  # fmt: skip
    if hasattr(model, "generator"):
        found["generator"] = model.generator.get_state()
    return found | {name: t.clone() for name, t in model.state_dict().items()}


@pytest.mark.parametrize(
    ("method", "implementation"), [("full", "reference"), ("lora", "reference"), ("lora", "fused"), ("dora", "fused")]
)
def test_what_the_step_changes_is_put_back(method: str, implementation: str) -> None:
    s = trained(method, implementation, plant=changes)
    before = _trace(s)
    average = s["adapted"].model.average
    assert step_peak(**s)
    after = _trace(s)
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert torch.equal(value, after[name]), name
    assert s["adapted"].model.average is average
    assert all(p.grad is None for p in s["adapted"].parameters())
    assert s["adapted"].model.training


def test_copies_to_put_back_do_not_count_and_a_method_s_frozen_weights_are_not_copied() -> None:
    s = trained("full", "reference")
    plain, copied = counted(s), copied_B(s["adapted"], s["head"])
    s["adapted"].model.register_buffer("statistics", torch.zeros(PLANTED))
    s["adapted"].model.generator = torch.Generator()
    assert copied_B(s["adapted"], s["head"]) == copied + 2 * MIB
    assert counted(s) == plain
    s = trained("pissa", "reference")
    trains = sum(p.nbytes for p in s["adapted"].parameters())
    assert s["adapted"].state()
    assert copied_B(s["adapted"], s["head"]) == trains


def test_what_the_step_changes_is_put_back_where_it_fails() -> None:
    s = trained("full", "reference", plant=changes)
    before = _trace(s)
    step = s["optimizer"].step

    def fails() -> None:
        step()
        raise MemoryError

    s["optimizer"].step = fails
    with pytest.raises(MemoryError):
        step_peak(**s)
    after = _trace(s)
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert all(p.grad is None for p in s["adapted"].parameters())
