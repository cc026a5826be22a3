"""Suggestions for mistyped names."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def closest(name: str, known: Iterable[str]) -> str:
    """Return the known name that is nearly this one, or an empty string."""
    return next(iter(get_close_matches(name, list(known), n=1)), "")


def near(name: str, known: Iterable[str], otherwise: str = "known") -> str:
    """Return "did you mean ...?", or `otherwise` and the names there are when none is close."""
    names = list(known)
    close = closest(name, names)
    return f"did you mean `{close}`?" if close else f"{otherwise}: {', '.join(names) or 'none'}"
