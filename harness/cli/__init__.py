"""Command line of peft-harness: one module per command, and the options that commands share."""

from __future__ import annotations

from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command `peft-harness` and return its exit code."""
    from harness.cli.app import launch

    return launch(argv)
