"""Measures of "LoRA Without Regret": they hold for the reference, and fail for a LoRA that is another one."""

from __future__ import annotations

from typing import Any

import pytest

import reference.lora
from harness.claims.worker import find

HOLDS: dict[str, dict[str, Any]] = {
    "operations_are_2nn_6nr": {"widths": [16, 24], "ranks": [1, 4]},
    "adam_ignores": {"p": 2, "q": 4, "steps": 5},
    "first_step_averages": {"rank": 4},
}


def holds(measure: str, **changed: Any) -> tuple[bool, str]:
    found = find({"measure": measure, "with": HOLDS[measure] | changed})
    assert isinstance(found.value, bool)
    return found.value, found.how


@pytest.mark.parametrize("measure", HOLDS)
def test_it_holds_for_the_reference(measure: str) -> None:
    assert holds(measure)[0]


def test_the_share_of_the_operations_is_shown() -> None:
    assert "N = 24, R = 4: 1,728 / 1,728 = 1.0000" in holds("operations_are_2nn_6nr", widths=[24], ranks=[4])[1]


def test_a_product_more_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = reference.lora.LoraLinear.forward

    def twice(self: Any, x: Any) -> Any:
        return plain(self, x) + 0 * plain(self, x)

    monkeypatch.setattr(reference.lora.LoraLinear, "forward", twice)
    value, how = holds("operations_are_2nn_6nr")
    assert not value
    assert how.startswith("N = 16, R = 1: LoRA ")


def test_a_scaling_that_ignores_alpha_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference.lora.Config, "scaling", property(lambda _: 2.0))
    value, how = holds("adam_ignores")
    assert not value
    assert how.startswith("after step 1 the update B A differs by up to ")


def test_a_scaling_that_ignores_the_rank_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference.lora.Config, "scaling", property(lambda self: self.alpha))
    assert not holds("first_step_averages")[0]
