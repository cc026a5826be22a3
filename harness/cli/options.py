"""Options that several verbs have, so that they say and do the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

_C = TypeVar("_C", bound=Callable[..., Any])

as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")

_GRAMMAR = """

    \b
    EXPR of --only: terms separated by commas.
      key=value  id, model, task, method, implementation, base, optimizer,
                 dtype, seed, lr, batch, max_tokens, accumulate, checkpointing, lr_ratio,
                 compile, layerwise, tune (true: a search's Cells), or a key of the config
      word       the start of a cell_id, or a part of an id or name
    Terms of the same key are alternatives; different keys must all hold:
    `method=lora,implementation=fused,implementation=hf-peft`.
    Given again, its terms are added.
    """


def _together(_: click.Context, __: click.Parameter, given: tuple[str, ...]) -> str | None:
    return ",".join(given) if given else None


def cells(name: str, help_: str) -> Callable[[_C], _C]:
    """Return an option that names Cells, by an expression (see `expand.only`). Given twice, both are one expression."""
    return click.option(name, multiple=True, callback=_together, metavar="EXPR", help=help_)


def only(command: click.Command) -> click.Command:
    """Add `--only`, with its grammar, to a command."""
    command.help = (command.help or "") + _GRAMMAR
    return cells("--only", "Cells to keep, e.g. `method=lora,rank=8`; see below.")(command)
