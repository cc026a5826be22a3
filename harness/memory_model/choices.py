"""Bases, optimizers and dtypes of predictions. No torch."""

from __future__ import annotations

from typing import get_args

from harness.records.record import Dtype, Optimizer, Quantization

BASES = get_args(Quantization)
DTYPES = get_args(Dtype)
OPTIMIZERS = get_args(Optimizer)
OWN = "its own"
"""Base of a Method that makes its own: QLoRA's codes, PiSSA's residual."""
