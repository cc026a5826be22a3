"""The new head of an encoder: it trains as a whole, and no adapter sits on it."""

from __future__ import annotations

from collections.abc import Collection


def in_head(path: str, head: Collection[str]) -> bool:
    """Return whether the layer at `path` is a part of the head, which has parameters of these names."""
    return any(name.startswith(f"{path}.") for name in head)
