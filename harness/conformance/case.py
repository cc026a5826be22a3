"""A Case: one seeded input for the checks of a Method or an Operation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast

import torch
from torch import Tensor, nn

from harness.conformance.tolerance_constants import NOISE_FACTOR

if TYPE_CHECKING:
    from harness.conformance.subject import Subject

_T = TypeVar("_T")


class Attach(Protocol):
    """A function that attaches the implementation again."""

    def __call__(self, *, seed: int = ..., square: bool = ..., **config: Any) -> Subject:
        """Return a freshly attached subject.

        seed: seed of the generator passed to `attach`. square: attach to a model with two layers of one shape. config:
        values of the Method's config that differ from the case's.
        """


@dataclass(frozen=True)
class Case:
    """One seeded input for the checks, in one state of the subject."""

    state: str
    """The subject's state: `init` (as attached), `warm` (random adapter tensors), `trained`, `call` for an Operation."""
    tokens: int = 16
    """Rows of a layer's input."""
    magnitude: str = "normal"
    """Magnitude of a layer's input, see `comparison.magnitudes`."""
    seed: int = 0
    inputs: Callable[[], Tensor] | None = None
    """Runs the whole model on fixed inputs and returns its output; None where only layers are run."""
    base_output: Tensor | None = None
    """Output of the model before attaching, on the same inputs as `inputs`."""
    forward: Callable[[nn.Module], Tensor] | None = None
    """Runs a given model on the same inputs, differentiably."""
    forward_of: Callable[[nn.Module], Callable[[nn.Module], Tensor]] | None = None
    """Returns the `forward` of another model, one that `fresh` made."""
    walks: int = 0
    """Number of random walks. With 0, the case also skips other long checks, which need not run in every case."""
    walk_seed: int = 0
    """Decides the rules of the walks."""
    fresh: Attach | None = None
    """Attaches the implementation again, to the same weights; None if the case cannot (a Cell's own model)."""
    factors: Mapping[str, float] = field(default_factory=dict)
    """Check name -> factor on the noise floor, for checks that do not use NOISE_FACTOR."""
    _computed: dict[Any, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def generator(self, salt: int = 0) -> torch.Generator:
        """Return a fresh generator, seeded by the case's seed and by `salt`."""
        return torch.Generator().manual_seed(self.seed * 1_000_003 + salt)

    def factor(self, check: str) -> float:
        """Return the largest error that a check allows, as a multiple of the reference's own rounding error."""
        return self.factors.get(check, NOISE_FACTOR)

    def attach_again(self, **config: Any) -> Subject | None:
        """Return a freshly attached subject, or None where the case cannot make one; see `Attach`."""
        return None if self.fresh is None else self.fresh(**config)

    def once(self, compute: Callable[[Subject, Case], _T], subject: Subject) -> _T:
        """Return `compute(subject, self)`, computed at the first request and shared by the checks that need it.

        A Case stands for one state of the subject. A copy by `dataclasses.replace` computes again.
        """
        key = compute, id(subject)
        if key not in self._computed:
            self._computed[key] = subject, compute(subject, self)  # the subject too, so that its id is not reused
        return cast("_T", self._computed[key][1])
