"""A Case: one seeded input for the checks of a Method, an Operation or a loader."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast

import torch
from torch import Tensor, nn

from harness.conformance.tolerance_constants import NOISE_FACTOR, USUAL_FACTORS

if TYPE_CHECKING:
    from harness.conformance.subject import Subject

_T = TypeVar("_T")


class AttachFresh(Protocol):
    """Type of `Case.attach_fresh`: a function that attaches the implementation under test to a model again."""

    def __call__(
        self,
        *,
        seed: int | torch.Generator = ...,
        square: bool = ...,
        model: nn.Module | None = ...,
        adapter: str = ...,
        **config: Any,
    ) -> Subject:
        """Attach the implementation under test again, and return the new Subject.

        seed: the generator that the implementation's `attach` gets, or the seed of a new one. square: True for a model
        whose two layers have the same shape. model: a model from which an earlier adapter was detached, or a model that
        is no ParityModel, with its targets in `config`; by default, a new ParityModel. adapter: for a quantised base, the
        name of a Method. The implementation of this Method with the name of the implementation under test adapts the packed
        base, in place of the reference's LoRA. config: values that replace those of the case in the Method's config. Raises
        Unsupported if there is no implementation for `adapter`.
        """


@dataclass(frozen=True)
class Case:
    """One seeded input for the checks, in one state of the subject.

    The subject is under test: an implementation attached to a model, an Operation with its arguments, or a loader.
    """

    state: str
    """State of the implementation under test: `init` (as attached), `warm` (with random adapter tensors) or `trained`.
    For an Operation, it is always `call`, and for a loader `loaded`."""
    tokens: int = 16
    """Number of rows in a layer's input."""
    magnitude: str = "normal"
    """Size of the numbers in a layer's input, by its name, such as `large`. `comparison.magnitudes` lists the names."""
    weights: str = "normal"
    """Size of the model's weights, by its name: normal, large, small or tiny."""
    seed: int = 0
    run_model: Callable[[], Tensor] | None = None
    """Function that runs the whole model on fixed inputs and returns the output. None if only single layers are run."""
    base_output: Tensor | None = None
    """Output of the model for the inputs of `run_model`, before the implementation was attached."""
    forward: Callable[[nn.Module], Tensor] | None = None
    """Function that runs a given model on the inputs of `run_model`, and returns an output from which gradients can be
    computed."""
    forward_of: Callable[[nn.Module], Callable[[nn.Module], Tensor]] | None = None
    """Function that takes a model from `attach_fresh`, and returns the function `forward` that fits this model."""
    walks: int = 0
    """Number of random walks (random sequences of calls) to try.

    If 0, an Operation's call is repeated a hundred times instead of a thousand, and `trajectory` takes no steps by
    bitsandbytes.
    """
    is_drawn: bool = False
    """True for a random case. A run may have many of these, so checks repeat a call in them only a hundred times
    instead of a thousand, and never repeat calls of a large layer."""
    is_brief: bool = False
    """True if checks leave out what takes long: to compile a layer, to repeat a call a hundred times, and to call a second
    linear layer in all forms. False for a suite's typical case, and for some cases of a wide selection (see
    `CaseSelection.is_wide`)."""
    walk_seed: int = 0
    """Seed that decides the calls in the random walks."""
    attach_fresh: AttachFresh | None = None
    """Function that attaches the implementation once more, to a model with the same weights. None if this is
    impossible, as with the model of a Cell."""
    other_settings: Sequence[dict[str, Any]] = ()
    """Settings of the Method's config that differ from the case's. Each item is a dict of settings that the Method accepts
    together, in place of the case's. Empty in cases in which the check `each_setting` is not tried."""
    factors: Mapping[str, float] = field(default_factory=dict)
    """Check name -> largest allowed error, as a multiple of the reference's own rounding error. A check without an
    entry uses its usual factor."""
    long_sums: Mapping[str, float] = field(default_factory=dict)
    """Check name -> further factor for long sums, whose rounding errors are larger. It does not apply to tensors in 16
    bits."""
    dtype: str = ""
    """Dtype of the subject. Only `long_sums` needs it."""
    _computed: dict[Any, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def generator(self, salt: int = 0) -> torch.Generator:
        """Return a fresh generator, seeded by the case's seed and by `salt`."""
        return torch.Generator().manual_seed(self.seed * 1_000_003 + salt)

    def factor(self, check: str, dtype: str = "") -> float:
        """Return the largest error that a check allows, as a multiple of the reference's own rounding error.

        dtype: dtype of the compared tensors, if it is not the subject's.
        """
        longer = self.long_sums.get(check, 1.0) if (dtype or self.dtype) in ("float32", "float64") else 1.0
        return longer * self.factors.get(check, USUAL_FACTORS.get(check, NOISE_FACTOR))

    def attach_again(self, **config: Any) -> Subject | None:
        """Return a new Subject from `attach_fresh`. Return None if `attach_fresh` is None."""
        return None if self.attach_fresh is None else self.attach_fresh(**config)

    def once(self, compute: Callable[[Subject, Case], _T], subject: Subject) -> _T:
        """Return `compute(subject, self)`. The first call computes the result. Later calls return the stored result.

        The stored result stays valid, because a Case stands for one state of the subject. A copy of the Case made by
        `dataclasses.replace` computes its own result.
        """
        key = compute, id(subject)
        if key not in self._computed:
            self._computed[key] = subject, compute(subject, self)  # the subject too, so that its id is not reused
        return cast("_T", self._computed[key][1])
