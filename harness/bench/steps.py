"""The training steps that `bench` can time: their Methods, configs and model. This module imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
GALORE_GAP = 200
"""Number of steps from one refresh of GaLore's projector to the next (arXiv:2403.03507)."""
PRODUCTS = "its two products"
"""Name of the lower bound for GaLore's step: the time of the two matrix products that every step needs.

All other work of a step without a refresh is on small matrices.
"""
CYCLE = 11
"""Number of steps in a timed cycle: one refresh and ten ordinary steps.

In training, one of `GALORE_GAP` steps is a refresh. The times are weighted accordingly.
"""


@dataclass(frozen=True)
class Backbone:
    """Sizes of the small Llama that a benchmark trains, and of its batch."""

    layers: int = 10
    width: int = 576
    mlp: int = 1536
    heads: int = 9
    kv_heads: int = 3
    vocabulary: int = 512
    batch: int = 4
    tokens: int = 128
    features: int = 2048
    """Number of input features, and also of output features, of the single weight in GaLore's benchmark."""


@dataclass(frozen=True)
class StepBenchmark:
    """A training step of one Method."""

    method: str
    """Name of the Method, and of its module in `reference/`."""
    config: dict[str, Any] = field(default_factory=dict)
    """Fields of the Method's Config."""
    base: str = ""
    """Quantisation of the frozen weights, e.g. `nf4`, or empty if they are not quantised."""
    fallback: dict[str, Any] | None = None
    """Config for an implementation that does not support `config`.

    If it is used, the result row says how the computations differ.
    """


_LORA: dict[str, Any] = {"rank": 16, "alpha": 32.0, "targets": LINEAR}
_GALORE: dict[str, Any] = {"rank": 128, "update_gap": CYCLE}
STEPS: dict[str, StepBenchmark] = {
    "lora": StepBenchmark("lora", _LORA),
    "lora-dropout": StepBenchmark("lora", _LORA | {"dropout": 0.1}),
    "dora": StepBenchmark("dora", _LORA),
    # AdaLoRA prunes at every step, so that each timed step includes the rank allocator.
    "adalora": StepBenchmark(
        "adalora",
        {"rank": 12, "target_rank": 8, "targets": LINEAR, "total_steps": 1000, "tinit": 0, "tfinal": 10, "delta_t": 1},
    ),
    "vera": StepBenchmark("vera", {"rank": 256, "targets": LINEAR}),
    "lora on nf4": StepBenchmark("lora", _LORA, base="nf4"),
    "galore": StepBenchmark("galore", _GALORE | {"niter": 2}, fallback=_GALORE),
    "galore-exact": StepBenchmark("galore", _GALORE),
}
"""Value of `--step` -> the training step. The value names Method and base, such as `lora on nf4`."""
FORMER_NAMES = {"lora-nf4": "lora on nf4"}
"""Former name of a step -> its present name. `--step` accepts both."""
