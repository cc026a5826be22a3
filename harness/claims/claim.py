"""A claim of a paper, its source, and the measure (a function) that computes our result. Imports no torch.

A claim states a figure, i.e. a printed number, or a property, which is true or false.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from harness.claims.printed_number import NEAREST, Dimension, Printed, Rounding

Tier = Literal["exact", "gpu-synthetic", "trained"]
"""Resources that are needed to decide a claim. `exact`: only arithmetic or small tensors. `gpu-synthetic`: a GPU, with
random weights. `trained`: training on data."""


@dataclass(frozen=True)
class MeasureRequest:
    """A measure and its arguments."""

    measure: str
    arguments: Mapping[str, Any]
    """Name of each argument -> its value. A value may be another MeasureRequest, or a list of them; then the measure
    gets the numbers that these requests give."""

    def find(self, argument: str) -> str:
        """Return the string argument `argument` of this request or, if it has none, of the first nested request that has it.

        Otherwise return ''.
        """
        own = self.arguments.get(argument)
        if isinstance(own, str):
            return own
        values = [one for value in self.arguments.values() for one in (value if isinstance(value, list) else [value])]
        return next((found for one in values if isinstance(one, MeasureRequest) and (found := one.find(argument))), "")


@dataclass(frozen=True)
class Reading:
    """Another way to understand a claim than the paper's own, e.g. with another rank."""

    under: str
    """Description of this reading, e.g. `rank 8`."""
    request: MeasureRequest


@dataclass(frozen=True)
class Claim:
    """One falsifiable sentence of a paper."""

    id: str
    sentence: str
    """The claim in our words."""
    paper: str
    """Short name of the paper, as in the claim file, e.g. `lora`."""
    version: str
    """Version of the paper that was read, e.g. `arXiv:2106.09685v2`."""
    source: str
    """The section or table of the paper that contains the claim."""
    tier: Tier
    printed: str
    dimension: Dimension
    request: MeasureRequest
    figure: Printed | None = None
    """The printed figure; None if the claim states a property."""
    rounding: Rounding = NEAREST
    otherwise: tuple[Reading, ...] = ()
    """Other readings, to be tried in this order if the paper's own reading does not reproduce the claim."""
    scale: str = ""
    """Description of our measurement if it is smaller than the paper's, e.g. a smaller model; otherwise empty. A
    different result at a smaller scale does not refute the claim."""
    headline: str = ""
    """Short name of the paper's main claim that this claim supports, e.g. `no added latency`; empty if there is
    none."""
    needs: str = ""
    """Information that the paper leaves out and that is needed to decide the claim; empty if nothing is left out."""
    note: str = ""
    """Known reason why our result differs from the paper's, if there is one."""
    where: str = ""
    """Place of the claim: `file:line`."""
    entry: str = ""
    """`file:line` of the entry of `claims:` that defines the claim, alone or as one of its rows."""

    @property
    def rule(self) -> str:
        """The rule by which our result is compared with the figure, in words. Empty for the rule `nearest`.

        It is also empty for a figure with a relation such as `<`.
        """
        return "" if self.figure is None or self.figure.relation else self.rounding.words
