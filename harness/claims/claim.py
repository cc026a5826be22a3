"""A claim: what a paper says, where, and the measure that decides it. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from harness.claims.printed_number import NEAREST, Dimension, Printed, Rounding

Tier = Literal["exact", "gpu-synthetic", "trained"]
"""What it takes to decide a claim: arithmetic or a small tensor; a GPU and random weights; training on data."""


@dataclass(frozen=True)
class Asking:
    """A measure and its arguments. An argument may be an Asking itself, or a list of them; then the measure gets numbers."""

    measure: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class Reading:
    """Another convention, rank or unit than the paper states. under: which, in words."""

    under: str
    asking: Asking


@dataclass(frozen=True)
class Claim:
    """One falsifiable sentence of a paper.

    sentence: in our words. paper, version: the file's, e.g. `lora` and `arXiv:2106.09685v2`; source: section or table.
    figure: None of a property. otherwise: readings to be tried in turn where the paper's own does not come out.
    scale: of what is measured smaller than the paper did it: a result that differs then refutes nothing.
    headline: the headline that it is part of, if it is. needs: what the paper leaves out, if it cannot be decided.
    note: what is known about the difference. where: `file:line`.
    """

    id: str
    sentence: str
    paper: str
    version: str
    source: str
    tier: Tier
    printed: str
    dimension: Dimension
    asking: Asking
    figure: Printed | None = None
    rounding: Rounding = NEAREST
    otherwise: tuple[Reading, ...] = ()
    scale: str = ""
    headline: str = ""
    needs: str = ""
    note: str = ""
    where: str = ""

    @property
    def rule(self) -> str:
        """By what other rule than rounding a number comes out as the figure, in words; `<` is one itself."""
        return "" if self.figure is None or self.figure.relation else self.rounding.words
