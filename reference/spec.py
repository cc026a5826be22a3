"""Facts about a reference that the harness reads from its source, without torch.

The file of a Method has one `SPEC = ReferenceSpec(...)` of literals only, since `harness.methods.spec` evaluates it from
the syntax tree. In the file of an Operation, `SPEC` only informs the reader.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Deviation:
    """A difference between a paper and the code here, with its reason."""

    topic: str
    """Subject of the difference, in a few words."""
    paper: str
    """Statement of the paper; for a deviation of an Implementation, what the reference computes."""
    here: str
    """Behaviour of this code."""
    why: str
    """Reason, with the libraries that do the same or differ."""


@dataclass(frozen=True)
class ReferenceSpec:
    """Description of a reference. Values are literals, so that they can be read without importing the file."""

    paper: str
    """arXiv number with version, and sections where they matter. If there is no paper, the reason."""
    deviations: tuple[Deviation, ...] = ()
    """Differences from the paper."""
    factors: tuple[str, ...] = ()
    """Letters of the trained low-rank factors. LoRA+ (`lr_ratio`) requires a B."""
    replaces_weight: str = ""
    """Name in `state()` of the tensor that replaces the base weight in the product; empty if there is none."""
    start_from_weight: tuple[str, ...] = ()
    """Names in `state()` of tensors that `attach` computes from the weight together with the factors (PiSSA's residual)."""
    quick_start: Mapping[str, int] = field(default_factory=dict)
    """Config values with which `attach` is much faster, for callers that overwrite the initial tensors."""
    optimizer: str = ""
    """Name of the Method's own optimizer; empty if the suite chooses."""
    optimizers: tuple[str, ...] = ("adamw",)
    """Values of a suite's setting `optimizer` that the Method's own optimizer supports."""
    trains_weights: bool = False
    """Whether the model's own weights train, which excludes a quantised base."""
