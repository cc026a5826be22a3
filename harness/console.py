"""Print results, notes and errors of commands. Nothing else in this package prints, except workers that report events.

Texts come from Records, suites, claim files, plug-ins and libraries, so any of them may be hostile. They could hold
commands for the terminal, or line breaks that forge a verdict. A command therefore prints a list of lines, and each line
passes through `visible`, which shows such characters as escapes. The library rich draws the live display of `run`
(`harness.runner.progress`), and its lines pass through `visible` too.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import sys
import traceback
from collections.abc import Container, Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any, TextIO

import click

from harness.errors import Exit, HarnessError, StoreError

_NARROWEST = 12
"""Smallest number of characters to which a column is cut."""
_PROSE = 20
"""Largest width that is reserved for the last column when other columns are cut to fit. The last column may hold a sentence,
so it is never cut."""
_COLOURS = {
    "green": ("✓", "ok", "pass", "reproduced"),
    "red": ("✗", "FAIL", "fail", "BROKEN", "no", "error", "nonconforming", "untrained", "lost", "not-reproduced"),
    "yellow": ("?", "!", "defect", "oom", "timeout", "inconclusive", "note", "reproduced-under", "reproduced-mixed"),
}
"""Signs and words of statuses, by colour. A sign stands at the start of a line; a word stands there or in a table."""
_COLOUR_OF = {word: colour for colour, words in _COLOURS.items() for word in words}
_STATUS = re.compile(
    r"(?:^ *|(?<=  ))[✓✗?!](?= )(?: [\w-]+(?=:|  |$))?|^(?:FAIL|BROKEN)(?= )"
    rf"|(?:^|(?<=  ))(?:{'|'.join(word for word in _COLOUR_OF if word[0].isalpha())})(?=  |$| [\d./]+(?:  |$))"
)


def visible(text: str) -> str:
    """Return a text in which each character that cannot be printed is shown as an escape, such as `\\x1b` or `\\n`.

    These are control characters, line breaks, invisible characters, and characters that change the direction of a text.
    """
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)


def without_code_marks(text: str) -> str:
    """Return a YAML file's text without the backticks around code. A terminal or a table would show them."""
    return text.replace("`", "")


def print_lines(lines: Iterable[str], *, err: bool = False) -> None:
    """Print lines on stdout, or on stderr if `err` is true.

    A line break inside a line is shown as `\\n`. Status words have colours on a terminal. A closed stream is ignored.
    Raises StoreError if stdout cannot be written, e.g. on a full disk.
    """
    _write(lines, sys.stderr if err else sys.stdout)


def print_note(line: str) -> None:
    """Print one line on stderr."""
    print_lines([line], err=True)


def print_json(document: Any) -> None:
    """Print a JSON document on stdout, as `json_text` returns it."""
    _echo(json_text(document), sys.stdout)


def json_text(document: Any) -> str:
    """Return a JSON document as text. Characters that are not printable ASCII are escaped."""
    return json.dumps(document, indent=1).replace("\x7f", "\\u007f")  # json.dumps leaves DEL as it is


def _write(lines: Iterable[str], stream: TextIO) -> None:
    shown = [visible(line) for line in lines]
    if _has_colours(stream):
        shown = [_STATUS.sub(_coloured, line) for line in shown]
    if shown:
        _echo("\n".join(shown), stream)


def _echo(text: str, stream: TextIO) -> None:
    try:
        click.echo(text, file=stream)
    except BrokenPipeError:  # closed by `| head`; the exit code still counts
        _discard(stream)
    except OSError as error:
        _discard(stream)
        if stream is not sys.stderr:
            hint = "free some space, or write the output to another place"
            raise StoreError(f"cannot print: {error.strerror or error}", where="standard output", hint=hint) from error


def _has_colours(stream: TextIO) -> bool:
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def _coloured(found: re.Match[str]) -> str:
    return click.style(found[0], fg=_COLOUR_OF[found[0].split()[0]])


def terminal_width() -> int | None:
    """Return the number of characters in a line of the terminal, or None if stdout is not a terminal."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def align_columns(rows: Sequence[Sequence[str]], *, right: Container[int] = (), indent: str = "  ") -> list[str]:
    """Return one line per row, with columns aligned to the left. right: indices of columns to align to the right.

    If stdout is a terminal, long names are cut, so that the columns fit into its width.
    """
    shown = [[visible(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
    if (available := terminal_width()) is not None:
        widths = _fitted(widths, right, available - len(indent))
    columns = [(">" if i in right else "<", width) for i, width in enumerate(widths)]
    padded = (
        [f"{_cut(cell, width):{sign}{width}}" for cell, (sign, width) in zip(row, columns, strict=True)]
        for row in shown
    )
    return [(indent + "  ".join(row)).rstrip() for row in padded]


def _fitted(widths: Sequence[int], right: Container[int], available: int) -> list[int]:
    """Return the widths of columns that fit into `available` characters, as far as this is possible.

    Columns of numbers, which are aligned to the right, keep their width. So does the last column.
    """
    fitted, last = list(widths), len(widths) - 1
    names = [i for i in range(last) if i not in right]
    total = sum(fitted[:last]) + 2 * last + (fitted[last] if last in right else min(fitted[last], _PROSE))
    while total > available and names and max(fitted[i] for i in names) > _NARROWEST:
        fitted[max(names, key=lambda i: fitted[i])] -= 1
        total -= 1
    return fitted


def _cut(cell: str, width: int) -> str:
    """Replace the middle of a text by `…` if it is longer than `width`. Names that begin alike often differ at their
    ends.
    """
    if len(cell) <= width:
        return cell
    end = (width - 1) // 3
    return f"{cell[: width - 1 - end]}…{cell[-end:]}"


class _SafeStderr(io.TextIOBase):
    """A stream that prints each line on stderr with the prefix `| `. Unprintable characters are escaped."""

    def __init__(self) -> None:
        self._stream, self._rest = sys.stderr, ""

    def write(self, text: str) -> int:
        """Print the lines that are complete with `text`, and return its length."""
        *lines, self._rest = (self._rest + text).split("\n")
        _write([f"| {line}" for line in lines], self._stream)
        return len(text)

    def fileno(self) -> int:
        """Return the descriptor of stderr, which a subprocess can inherit."""
        return self._stream.fileno()

    def end_line(self) -> None:
        """Print the text after the last line break, if there is any."""
        if self._rest:
            self.write("\n")


@contextlib.contextmanager
def foreign_output() -> Iterator[None]:
    """Redirect what plug-ins and libraries write inside the context to stderr, with unprintable characters escaped."""
    stream = _SafeStderr()  # it is never closed, since a library may keep it, e.g. for its log
    with contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream):
        try:
            yield
        finally:
            stream.end_line()


@contextlib.contextmanager
def hold_output() -> Iterator[None]:
    """Hold back the output of libraries inside the context: Python's stdout and stderr, and the file descriptor 2.

    Each line is then logged by the logger `harness`. If the context raises an error that is no HarnessError, the lines are
    also printed on stderr, with unprintable characters escaped.
    """
    import logging  # not above: `--help` needs neither
    import tempfile

    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as kept:
        sys.stderr.flush()
        own = os.dup(2)
        os.dup2(kept.fileno(), 2)
        explained = False
        try:
            with contextlib.redirect_stdout(kept), contextlib.redirect_stderr(kept):
                yield
            explained = True
        except HarnessError:
            explained = True
            raise
        finally:
            os.dup2(own, 2)
            os.close(own)
            kept.seek(0)
            lines = kept.read().splitlines()
            if not explained:
                print_lines([f"| {line}" for line in lines], err=True)
            for line in lines:
                logging.getLogger("harness").debug(visible(line))


def discard_stdout() -> None:
    """Discard the buffered output of a closed stdout. Otherwise Python would report an error at exit."""
    _discard(sys.stdout)


def _discard(stream: TextIO) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def report_bug(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Report an unexpected exception as a bug of peft-harness, and exit. Serves as `sys.excepthook`."""
    lines = "".join(traceback.format_exception(kind, error, trace)).rstrip("\n").split("\n")
    print_lines([f"| {line}" for line in lines], err=True)  # the prefix shows that these lines are not ours
    if issubclass(kind, KeyboardInterrupt):
        return
    what = f"internal error in peft-harness: {kind.__name__}: {error}"
    notes = "; ".join(getattr(error, "__notes__", ())) or "no Record was written or changed"
    sys.exit(report_error(HarnessError(what, hint=f"please report it with the lines above; {notes}")))


def report_error(error: HarnessError) -> Exit:
    """Print an error on stderr, and return its exit code."""
    first, *others = error.lines()
    print_lines([f"peft-harness: {first}", *others], err=True)
    return error.exit_code


def format_warning(
    message: Warning | str, category: type[Warning], file: str, number: int, line: str | None = None
) -> str:
    """Return a Python warning as one line. Serves as `warnings.formatwarning`."""
    return visible(f"{category.__name__}: {message} ({file}:{number})") + "\n"
