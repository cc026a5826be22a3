"""The bases, optimizers and dtypes that a prediction is made for. No torch."""

from __future__ import annotations

from typing import get_args

from harness.records.record import Dtype, Optimizer, Quantization

BASES = get_args(Quantization)
DTYPES = get_args(Dtype)
OPTIMIZERS = get_args(Optimizer)
OWN = "its own"
"""The base of a Method that makes it: QLoRA's codes, PiSSA's residual."""
