"""Memory that calls leave behind."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch

from harness.conformance.comparison.kept_memory import StorageWatch, describe_leak


@pytest.fixture(autouse=True)
def _no_collection_by_chance() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


def test_a_cycle_in_each_call_is_no_leak() -> None:
    def call() -> None:
        cycle: list[object] = [torch.ones(3)]
        cycle.append(cycle)

    assert describe_leak(call) == ""


def test_a_tensor_that_each_call_keeps_is_a_leak() -> None:
    kept: list[torch.Tensor] = []
    assert describe_leak(lambda: kept.append(torch.ones(3))) == "4 tensors are left after 4 calls"


def test_only_a_tensor_that_somebody_keeps_is_named() -> None:
    tensors = {name: torch.ones(3) for name in ("kept", "in a graph", "in a cycle", "dropped")}
    watch, kept = StorageWatch(tensors), [tensors["kept"]]
    kept.append(tensors.pop("in a graph").requires_grad_(True).square().sum())
    cycle: list[object] = [tensors.pop("in a cycle")]
    cycle.append(cycle)
    del cycle
    tensors.clear()
    assert watch.alive() == ["kept", "in a graph"]
    kept.clear()
    assert watch.alive() == []
