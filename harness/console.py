"""What a command says last: to a reader that may have left, and of errors, those that nobody foresaw among them."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from types import TracebackType

import click

from harness.errors import Exit, HarnessError


def echo(text: str) -> None:
    """Print a line of data."""
    try:
        click.echo(text)
    except BrokenPipeError:  # `| head` has seen enough; the exit code still counts
        discard_stdout()


def align_columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Pad the columns of `rows` to one width each; the last column is left as it is."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    padded = ([f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)] for row in rows)
    return [("  " + "  ".join(row)).rstrip() for row in padded]


def discard_stdout() -> None:
    """Send what is still to be written to stdout nowhere, or Python complains at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def report_bug(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """End the process after an error that nobody foresaw: it is ours, and no finding about what was measured."""
    if issubclass(kind, KeyboardInterrupt):
        return sys.__excepthook__(kind, error, trace)
    traceback.print_exception(kind, error, trace)
    what = f"this is a bug of peft-harness, not of what you asked: {kind.__name__}: {error}"
    kept = "; ".join(getattr(error, "__notes__", ())) or "no Record was written, and none was touched"
    sys.exit(report_error(HarnessError(what, hint=f"report it with the lines above; {kept}")))


def report_error(error: HarnessError) -> Exit:
    """Print an error, and return its exit code."""
    click.echo(f"peft-harness: {error}", err=True)
    return error.exit_code
