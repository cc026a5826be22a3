"""Suggestions for mistyped names."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def near(name: str, known: Iterable[str], otherwise: str = "known") -> str:
    """Return "did you mean ...?", or `otherwise` and the names there are when none is close."""
    names = list(known)
    close = get_close_matches(name, names, n=1)
    return f"did you mean `{close[0]}`?" if close else f"{otherwise}: {', '.join(names) or 'none'}"
