"""A Case: one seeded input for the checks of a Method."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from harness.conformance.tolerance_constants import NOISE_FACTOR

if TYPE_CHECKING:
    from harness.conformance.subject import Subject


@dataclass(frozen=True)
class Case:
    """One seeded input for the checks.

    state: `init` (as attached) or `warm` (random adapter tensors; the subject is in it already). tokens: rows of a
    layer's input. inputs: runs the whole model on fixed inputs and returns its output; base_output: the same before
    attaching. forward: runs a given model on those inputs, differentiably. fresh: attaches the same implementation anew,
    to the same weights, with some values of the config changed; `seed`: by another generator; `square`: to a model whose
    two layers are of one shape. factors: check name -> a factor on the noise floor that is
    not the usual one.
    """

    state: str
    tokens: int = 16
    seed: int = 0
    inputs: Callable[[], Tensor] | None = None
    base_output: Tensor | None = None
    forward: Callable[[nn.Module], Tensor] | None = None
    fresh: Callable[..., Subject] | None = None
    factors: Mapping[str, float] = field(default_factory=dict)

    def generator(self, salt: int = 0) -> torch.Generator:
        """Return a fresh generator of this case."""
        return torch.Generator().manual_seed(self.seed * 1_000_003 + salt)

    def factor(self, check: str) -> float:
        """Return how often the reference's own rounding a check allows."""
        return self.factors.get(check, NOISE_FACTOR)

    def anew(self, **config: Any) -> Subject | None:
        """Return a freshly attached subject, or None where the case cannot make one (a Cell's own model)."""
        return None if self.fresh is None else self.fresh(**config)
