"""How many cases of each parity suite are tried: few, all, or others besides, drawn at random. No torch."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

LARGEST_RANK = 160
LARGEST_TOKENS = 300
LARGEST_FEATURES = 1500
LARGEST_VECTOR = 20_000
LARGEST_STATE = 300_000
"""Beyond what the kernels' tiles of up to 128 or 256 hold, and small enough that a case takes a tenth of a second."""

LEAST_FEATURES = 8


@dataclass(frozen=True)
class CaseSelection:
    """Which cases of a parity suite are tried.

    full: all configs x shapes x layers x dtypes; else each of them at least once. drawn: how many cases besides, their
    ranks and shapes drawn at random by `seed`, so that nobody can be right at the suite's own sizes only.
    """

    full: bool = False
    drawn: int = 0
    seed: int = 0

    def dice(self, target: str) -> random.Random:
        """Return what the cases of `target` are drawn by."""
        return random.Random(f"{self.seed} {target}")  # noqa: S311


FEW = CaseSelection()


def draw_log_uniform(dice: random.Random, least: int, most: int) -> int:
    """Draw a whole number whose logarithm is uniform: small sizes are as likely as large ones."""
    return min(most, int(math.exp(dice.uniform(math.log(least), math.log(most + 1)))))


def draw_config(dice: random.Random, given: Mapping[str, Any], features: int) -> dict[str, Any]:
    """Return a config with another rank, where it has one: from what the budget leaves (AdaLoRA) to the smaller side."""
    if "rank" not in given:
        return dict(given)
    least = int(given.get("target_rank", 1))
    rank = draw_log_uniform(dice, least, max(least, min(LARGEST_RANK, features)))
    # LoRA's orthogonal start is there for even ranks only.
    return {**given, "rank": rank + rank % 2 if given.get("init") == "orthogonal" else rank}


def draw_call(dice: random.Random, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return an Operation's case with other sizes, of those that it says."""
    return {key: _draw_size(dice, key, value) for key, value in given.items()}


def _draw_size(dice: random.Random, key: str, value: Any) -> Any:
    if key == "shape":
        most = LARGEST_VECTOR if len(value) == 1 else LARGEST_FEATURES // len(value)
        return [draw_log_uniform(dice, 1, most) for _ in value]
    if key == "rows":
        return [draw_log_uniform(dice, 1, int(LARGEST_TOKENS ** (1 / len(value)))) for _ in value]
    if key == "sizes":
        return [draw_log_uniform(dice, 1, LARGEST_STATE) for _ in value]
    if key == "numel":
        return draw_log_uniform(dice, 1, LARGEST_VECTOR)
    if key == "rank":
        return draw_log_uniform(dice, 1, LARGEST_RANK)
    return draw_log_uniform(dice, 1, LARGEST_TOKENS) if key in ("tokens", "blocks") else value
