"""The registry that a worker uses for a Cell."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from harness.methods.registry import Registry
from harness.runner import worker_imports


def cell(implementation: str, quantization: str = "none", packed_by: str = "") -> Any:
    base = SimpleNamespace(quantization=quantization, implementation=packed_by)
    return SimpleNamespace(method="lora", implementation=implementation, base=base)


def test_a_cell_of_the_harnesss_own_implementations_loads_no_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    own, every = worker_imports.own_registry(), Registry()
    monkeypatch.setattr(worker_imports, "discover", lambda: every)
    assert worker_imports.registry(cell("fused")) is own
    assert worker_imports.registry(cell("hf-peft", "nf4", "bitsandbytes")) is own
    assert worker_imports.registry(cell("acme")) is every
    assert worker_imports.registry(cell("fused", "nf4", "acme")) is every
