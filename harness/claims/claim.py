"""A claim of a paper, its source, and the measure that decides it. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from harness.claims.printed_number import NEAREST, Dimension, Printed, Rounding

Tier = Literal["exact", "gpu-synthetic", "trained"]
"""Requirement of a claim: arithmetic or small tensors; a GPU with random weights; training on data."""


@dataclass(frozen=True)
class MeasureRequest:
    """A measure and its arguments."""

    measure: str
    arguments: Mapping[str, Any]
    """An argument may be a MeasureRequest or a list of them; the measure then gets their numbers."""


@dataclass(frozen=True)
class Reading:
    """A reading of the claim under another convention, rank or unit than the paper states."""

    under: str
    """The convention, rank or unit."""
    request: MeasureRequest


@dataclass(frozen=True)
class Claim:
    """One falsifiable sentence of a paper."""

    id: str
    sentence: str
    """The claim in our words."""
    paper: str
    """Name of the paper in its file, e.g. `lora`."""
    version: str
    """Version that was read, e.g. `arXiv:2106.09685v2`."""
    source: str
    """Section or table."""
    tier: Tier
    printed: str
    dimension: Dimension
    request: MeasureRequest
    figure: Printed | None = None
    """The printed figure; None for a property."""
    rounding: Rounding = NEAREST
    otherwise: tuple[Reading, ...] = ()
    """Readings to try in this order if the paper's own reading does not reproduce the claim."""
    scale: str = ""
    """Description of the measurement if its scale is smaller than the paper's: a different result then refutes nothing."""
    headline: str = ""
    """The headline to which the claim belongs, if any."""
    needs: str = ""
    """Information that the paper leaves out, if the claim cannot be decided."""
    note: str = ""
    """Known explanation of a difference."""
    where: str = ""
    """`file:line`."""

    @property
    def rule(self) -> str:
        """The looser rule of comparison in words; empty for plain rounding and for relations such as `<`."""
        return "" if self.figure is None or self.figure.relation else self.rounding.words
