"""Print results and errors of commands."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Container, Sequence
from types import TracebackType

import click

from harness.errors import Exit, HarnessError


def echo(text: str) -> None:
    """Print a result on stdout. A closed stdout is ignored."""
    try:
        click.echo(text)
    except BrokenPipeError:  # closed by `| head`; the exit code still counts
        discard_stdout()


def align_columns(rows: Sequence[Sequence[str]], *, right: Container[int] = (), indent: str = "  ") -> list[str]:
    """Return one line per row, with columns aligned to the left. right: indices of columns to align to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    columns = [(">" if i in right else "<", width) for i, width in enumerate(widths)]
    padded = ([f"{cell:{sign}{width}}" for cell, (sign, width) in zip(row, columns, strict=True)] for row in rows)
    return [(indent + "  ".join(row)).rstrip() for row in padded]


def discard_stdout() -> None:
    """Discard the buffered output of a closed stdout. Without this, Python would report an error at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def report_bug(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Report an unexpected exception as a bug of peft-harness, and exit. Serves as `sys.excepthook`."""
    if issubclass(kind, KeyboardInterrupt):
        return sys.__excepthook__(kind, error, trace)
    traceback.print_exception(kind, error, trace)
    what = f"internal error in peft-harness: {kind.__name__}: {error}"
    notes = "; ".join(getattr(error, "__notes__", ())) or "no Record was written or changed"
    sys.exit(report_error(HarnessError(what, hint=f"please report it with the lines above; {notes}")))


def report_error(error: HarnessError) -> Exit:
    """Print an error on stderr, and return its exit code."""
    click.echo(f"peft-harness: {error}", err=True)
    return error.exit_code
