"""The bases, optimizers and dtypes that a prediction is made for. No torch."""

from __future__ import annotations

from typing import get_args

from harness.records import Dtype, Quantization

BASES = get_args(Quantization)
DTYPES = get_args(Dtype)
OPTIMIZERS = ("adamw", "adamw-8bit", "paged-adamw", "paged-adamw-8bit")
OWN = "its own"
"""The optimizer of a Method that brings one (GaLore); the base of one that makes it (QLoRA's codes, PiSSA's residual)."""
