"""`bitsandbytes`: NF4 quantisation of base weights; quantisers, a 4-bit layer and optimizers as Operations."""

from __future__ import annotations

from harness.methods.registry import Implementation, implementations_in


def implementations() -> list[Implementation]:
    """Return the Implementations of this package. They import bitsandbytes and torch on their first call."""
    return implementations_in(__name__)
