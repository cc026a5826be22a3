"""Selection of the cases of a parity suite: a few, all, and others drawn at random. No torch."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Any

LARGEST_RANK = 160
LARGEST_TOKENS = 300
LARGEST_FEATURES = 1500
LARGEST_VECTOR = 20_000
LARGEST_STATE = 300_000
"""Upper limits of drawn sizes: beyond the tiles of 128 or 256 of the kernels, and small enough for a tenth of a second
per case.
"""

LEAST_FEATURES = 8


Values = dict[str, Any]
"""Values of a Method's config, or of an Operation's case: key -> number, word or list."""


@dataclass(frozen=True)
class CaseSelection:
    """Selection of the cases of a parity suite."""

    full: bool = False
    """All configs x shapes x layers x dtypes; otherwise each of them at least once."""
    drawn: int = 0
    """Number of additional cases, with ranks and shapes drawn at random: an implementation must not be right at the
    suite's own sizes only.
    """
    seed: int = 0
    """Seed of the drawn cases."""

    def dice(self, target: str) -> random.Random:
        """Return the random generator that draws the cases of `target`."""
        return random.Random(f"{self.seed} {target}")  # noqa: S311


FEW = CaseSelection()


def draw_log_uniform(dice: random.Random, least: int, most: int) -> int:
    """Draw a whole number with uniform logarithm: small sizes are as likely as large ones."""
    return min(most, int(math.exp(dice.uniform(math.log(least), math.log(most + 1)))))


def draw_config(dice: random.Random, given: Values, features: int) -> Values:
    """Return a config with another rank, if it has one: at least what the budget leaves (AdaLoRA), at most the smaller
    side.
    """
    if "rank" not in given:
        return dict(given)
    least = int(given.get("target_rank", 1))
    rank = draw_log_uniform(dice, least, max(least, min(LARGEST_RANK, features)))
    # LoRA's orthogonal start exists for even ranks only.
    return {**given, "rank": rank + rank % 2 if given.get("init") == "orthogonal" else rank}


def draw_call(dice: random.Random, given: Values) -> Values:
    """Return an Operation's case with other sizes in place of those that it has."""
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
