"""The command `explain`: print what a name means, such as a Method, a check or an error."""

from __future__ import annotations

import click

from harness.console import print_lines
from harness.errors import Exit


@click.command(epilog="Example: peft-harness explain lora")
@click.argument("words", nargs=-1, required=True, metavar="NAME")
def explain(words: tuple[str, ...]) -> Exit:
    """Explain a name.

    NAME is a method, a key of its config, an operation, a check, a known defect, a claim, a measure, an error, an exit code,
    a status, a verdict, a part of the memory that `fit` predicts, a command, or a term that reports use. `peft-harness
    explain claims` describes the format of a claim file.
    """
    from harness.cli import topics

    print_lines(topics.explain(" ".join(words)).split("\n"))
    return Exit.PASS
