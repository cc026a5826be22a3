"""Facts that the harness reads from the source of a reference, without importing torch.

The file of a Method has one `SPEC = ReferenceSpec(...)`. `harness.methods.spec` evaluates it from the syntax tree, so
it must contain only literals. `peft-harness explain` prints it, also that in the file of an Operation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Deviation:
    """A difference between a paper and the code of the reference, with its reason."""

    topic: str
    """Subject of the difference, in a few words."""
    paper: str
    """Statement of the paper. For a deviation of an Implementation, this is what the reference computes."""
    here: str
    """Behaviour of the code of the reference, or of the Implementation that deviates."""
    why: str
    """The reason, and which libraries do the same or differ."""


@dataclass(frozen=True)
class ReferenceSpec:
    """Facts about a reference. All values are literals, so that they can be read without importing the file."""

    paper: str
    """arXiv number of the paper with its version, and the sections that matter. Without a paper, the reason why there
    is none."""
    deviations: tuple[Deviation, ...] = ()
    """Differences from the paper, and what it leaves open."""
    factors: tuple[str, ...] = ()
    """Letters of the low-rank factors that train. LoRA+ (`lr_ratio`) needs a factor B."""
    replaces_weight: str = ""
    """Name in `state()` of the tensor that is used in place of the base weight. Empty if the base weight itself is used."""
    merge_quantises: bool = False
    """True if merging quantises the sum of weight and update. Merged layers are then compared with the merged layers of
    the reference, since they compute something else than the adapted layers."""
    opt_in_layers: tuple[str, ...] = ()
    """Kinds of layers (`reference.shared.layers.KINDS`) that are passed only to implementations that name them in `offers`.
    Older plug-ins would not adapt such a layer, because its kind was added after they were written."""
    start_from_weight: tuple[str, ...] = ()
    """Names in `state()` of tensors that `attach` computes from the base weight, e.g. PiSSA's residual."""
    start_from_config: tuple[str, ...] = ()
    """Names in `state()` of constants that `attach` computes from the config alone, e.g. VeRA's projections. The model's
    state_dict may leave them out."""
    quick_start: Mapping[str, int] = field(default_factory=dict)
    """Config values that make `attach` much faster. They are for callers that overwrite the initial tensors anyway."""
    optimizer: str = ""
    """Name of the Method's own optimizer. Empty if the Method has none, so that the suite chooses."""
    optimizers: tuple[str, ...] = ("adamw",)
    """Values of a suite's setting `optimizer` that are possible with the Method's own optimizer."""
    trains_weights: bool = False
    """True if the model's own weights train. If so, the base cannot be quantised."""
