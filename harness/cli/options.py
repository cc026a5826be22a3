"""Options and output functions that several commands share.

Sharing gives an option the same name, meaning and help in all commands.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from harness.console import print_json, print_lines
from harness.errors import closest_match

_C = TypeVar("_C", bound=Callable[..., Any])


class _NamedPath(click.Path):
    """A path that must not be empty. An unset variable in a script gives an empty path, which Python takes for `.`."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the Path. Raises BadParameter if `value` is empty."""
        if value == "":
            self.fail("the name is empty; name a file or a folder", param, ctx)
        return super().convert(value, param, ctx)


class Choice(click.Choice[str]):
    """One of several words. For another word, the error names the closest of them."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the word. Raises BadParameter if `value` is none of them."""
        try:
            return super().convert(value, param, ctx)
        except click.BadParameter as error:
            if close := closest_match(str(value), self.choices):
                self.fail(f"{error.message} Did you mean '{close}'?", param, ctx)
            raise


PATH = _NamedPath(path_type=Path)
FILE = _NamedPath(path_type=Path, dir_okay=False)
FOLDER = _NamedPath(path_type=Path, file_okay=False)
AGAIN = "Repeatable."

as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of text.")
strict = click.option("--strict", is_flag=True, help="Exit with 3 if a comparison stays undecided.")
device = click.option(
    "--device", type=Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True,
    help="Device to measure on; auto takes a GPU if there is one.",
)  # fmt: skip
junit = click.option("--junit", type=FILE, metavar="FILE", help="Also write the results as JUnit XML.")
html = click.option("--html", type=FILE, metavar="FILE", help="Also write the results as an HTML page.")
jobs = click.option(
    "--jobs", type=click.IntRange(1, 256), metavar="N",
    help="Processes to run at the same time.  [default: one per core, at most 8]",
)  # fmt: skip

_GRAMMAR = """

    \b
    EXPR of --only is a list of terms, separated by commas:
      key=value  key is id, model, task, method, implementation, environment, serve,
                 base, optimizer, dtype, seed, lr, batch, max_tokens, accumulate,
                 checkpointing, lr_ratio, compile, layerwise, loop, tune (true: Cells
                 of a learning-rate search), or a key of the Method's config
      word       the start of a cell_id, or a part of an id or name
    Terms with the same key are alternatives; terms with different keys must all
    match: `method=lora,implementation=fused,implementation=hf-peft`.
    If --only is repeated, its terms are joined.
    """


def author(default: str | None = None) -> Callable[[_C], _C]:
    """Return the option `--author` of a command that records a decision. default: its value if it is not given."""
    text = "Who decides this.  [default: git's user.name and user.email]"
    return click.option("--author", default=default, metavar="NAME", help=text)


def print_document(document: Any, as_json: bool, lines: Callable[[Any], Sequence[str]]) -> None:
    """Print a document: as JSON, or as the lines that `lines(document)` returns."""
    if as_json:
        print_json(document)
    else:
        print_lines(lines(document))


def finite_seconds(_: click.Context, __: click.Parameter, value: float) -> float:
    """Check a number of seconds that the user gave, and return it unchanged.

    Raises BadParameter for NaN, infinity, 0 and negative numbers. click's FloatRange would accept NaN and infinity.
    """
    if not 0 < value < math.inf:
        raise click.BadParameter(f"{value:g} is not a number of seconds above 0, e.g. 3600")
    return value


_LONGEST_SHARD = 20


def shard(_: click.Context, __: click.Parameter, value: str) -> tuple[int, int]:
    """Return (K, N) for the text `K/N`. Raises BadParameter unless K and N are whole numbers with 1 <= K <= N."""
    number, _slash, shards = value.partition("/")
    is_short = len(value) <= _LONGEST_SHARD
    if not (is_short and number.isdecimal() and shards.isdecimal() and 1 <= int(number) <= int(shards)):
        raise click.BadParameter(f"'{value[:_LONGEST_SHARD]}' is not K/N with whole numbers 1 <= K <= N, e.g. 1/4")
    return int(number), int(shards)


def join(_: click.Context, __: click.Parameter, values: tuple[str, ...]) -> str | None:
    """Return the values of a repeated option, joined by commas. If the option is not given, return None."""
    return ",".join(values) if values else None


def cells(name: str, help_: str) -> Callable[[_C], _C]:
    """Return an option called `name` that selects Cells by an expression, e.g. `method=lora`. help_: its help text."""
    return click.option(name, multiple=True, callback=join, metavar="EXPR", help=help_)


def only(command: click.Command) -> click.Command:
    """Add the option `--only` to a command, and return the command.

    The command's help then also explains the expressions that `--only` takes.
    """
    command.help = (command.help or "") + _GRAMMAR
    return cells("--only", "Use only these Cells, e.g. `method=lora,rank=8`. See below.")(command)
