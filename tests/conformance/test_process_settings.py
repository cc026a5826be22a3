"""What a process is left with: settings are put back whoever changed them, and seeds are noticed."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from harness.conformance import process_settings


def newer_precision() -> None:
    if not hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        pytest.skip("this torch has only the older way of saying it")
    torch.backends.cuda.matmul.fp32_precision = "tf32"


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda: torch.set_default_dtype(torch.float64), "default dtype"),
        (lambda: torch.set_grad_enabled(False), "gradients"),
        (lambda: torch.set_float32_matmul_precision("medium"), "precision"),
        (newer_precision, "precision"),  # after which torch refuses to be asked in the older way
        (lambda: torch.use_deterministic_algorithms(True), "deterministic"),
        (lambda: torch.set_autocast_enabled("cpu", True), "autocast"),
        (lambda: torch.set_autocast_dtype("cuda", torch.bfloat16), "autocast"),
        (lambda: torch.backends.cuda.enable_mem_efficient_sdp(False), "attention"),
        (lambda: torch.set_anomaly_enabled(True), "anomalies"),
        (lambda: np.seterr(divide="ignore", invalid="raise"), "numpy"),
    ],
)
def test_a_changed_setting_is_named_and_put_back(change: object, name: str) -> None:
    before = process_settings.snapshot()
    with process_settings.restored() as changed:
        change()  # type: ignore[operator]
    assert changed
    assert all(name in one for one in changed)
    assert process_settings.snapshot() == before


def test_a_setting_put_back_to_its_usual_value_is_named_where_it_had_another() -> None:
    before, usual = process_settings.snapshot(), torch.get_default_dtype()
    with process_settings.others() as changed:
        torch.set_default_dtype(usual)
    (named,) = changed
    assert "default dtype" in named
    assert process_settings.snapshot() == before


@pytest.mark.parametrize(
    ("act", "name"),
    [
        (lambda: torch.manual_seed(0), "torch"),
        (lambda: random.seed(0), "Python"),
        (lambda: np.random.seed(0), "numpy"),
    ],
)
def test_seeding_is_noticed_and_put_back(act: object, name: str) -> None:
    torch.manual_seed(11)
    (found,) = process_settings.find_seeding(act)  # type: ignore[arg-type]
    assert name in found
    after = torch.rand(1)
    torch.manual_seed(11)
    assert torch.equal(after, torch.rand(1))


def test_products_are_as_exact_as_before_low_precision_was_allowed() -> None:
    """On a CPU with instructions for bfloat16 the older way of allowing it changes what float32 products are."""
    x = torch.randn(64, 64)
    before = x @ x
    with process_settings.restored():
        torch.set_float32_matmul_precision("medium")
    assert torch.equal(x @ x, before)


def test_drawing_is_no_seeding() -> None:
    assert process_settings.find_seeding(lambda: (torch.rand(3), random.random(), np.random.rand(3))) == []
