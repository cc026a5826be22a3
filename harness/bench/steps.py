"""The training steps that are timed: Methods and their configs, and the model around them. No torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
GALORE_GAP = 200
"""GaLore's steps from one refresh of its projector to the next, as in its paper."""
PRODUCTS = "its two products"
"""What limits GaLore's step: all else is of the size of its subspace, but for the refresh."""
CYCLE = 11
"""Steps from one refresh to the next while timing: one refresh and ten ordinary steps, from which `GALORE_GAP` follow."""


@dataclass(frozen=True)
class Backbone:
    """A small Llama and its batch. features: in and out of GaLore's one weight."""

    layers: int = 10
    width: int = 576
    mlp: int = 1536
    heads: int = 9
    kv_heads: int = 3
    vocabulary: int = 512
    batch: int = 4
    tokens: int = 128
    features: int = 2048

    def document(self) -> dict[str, Any]:
        """Return it as JSON can hold it."""
        return asdict(self)


@dataclass(frozen=True)
class StepBenchmark:
    """A training step. method: as in `reference/`; config: of its Config; base: how the frozen weights are packed.

    theirs: a config for who does not support it; the row then says that the two differ.
    """

    method: str
    config: dict[str, Any] = field(default_factory=dict)
    base: str = ""
    theirs: dict[str, Any] | None = None


_LORA: dict[str, Any] = {"rank": 16, "alpha": 32.0, "targets": LINEAR}
_GALORE: dict[str, Any] = {"rank": 128, "update_gap": CYCLE}
STEPS: dict[str, StepBenchmark] = {
    "lora": StepBenchmark("lora", _LORA),
    "lora-dropout": StepBenchmark("lora", _LORA | {"dropout": 0.1}),
    "dora": StepBenchmark("dora", _LORA),
    # Pruning from the first step on, every step: the allocator is part of what is timed.
    "adalora": StepBenchmark(
        "adalora",
        {"rank": 12, "target_rank": 8, "targets": LINEAR, "total_steps": 1000, "tinit": 0, "tfinal": 10, "delta_t": 1},
    ),
    "vera": StepBenchmark("vera", {"rank": 256, "targets": LINEAR}),
    "lora-nf4": StepBenchmark("lora", _LORA, base="nf4"),
    "galore": StepBenchmark("galore", _GALORE | {"niter": 2}, theirs=_GALORE),
    "galore-exact": StepBenchmark("galore", _GALORE),
}
"""Name, as in `--step NAME` -> step."""
