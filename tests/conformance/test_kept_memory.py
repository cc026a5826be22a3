"""Memory that calls leave behind."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch

from harness.conformance.comparison.kept_memory import kept_alive


@pytest.fixture(autouse=True)
def _no_collection_by_chance() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


def test_a_cycle_in_each_call_is_no_leak() -> None:
    def call() -> None:
        cycle: list[object] = [torch.ones(3)]
        cycle.append(cycle)

    assert kept_alive(call) == ""


def test_a_tensor_that_each_call_keeps_is_a_leak() -> None:
    kept: list[torch.Tensor] = []
    assert kept_alive(lambda: kept.append(torch.ones(3))) == "4 tensors are left after 4 calls"
