"""Names of layers, as in `targets` of a suite, that match no layer of a model. Imports no torch."""

from __future__ import annotations

from typing import TypedDict


class Misfit(TypedDict):
    """A name that matches no layer that a Method can adapt."""

    reason: str
    closest: str
    """The closest name that matches such layers. Empty if there is none."""


def hint(misfit: Misfit, model: str) -> str:
    """Return a hint for a name that matches no layer. model: the name of the model."""
    return f"did you mean `{misfit['closest']}`?" if misfit["closest"] else f"name layers of {model}"
