"""Find unknown names on a command line. For each one, suggest the closest known name."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from harness.errors import Problem, closest_match, did_you_mean

_LISTED = {"method": "methods bases", "operation": "operations", "implementation": "implementations"}
"""Kind of names -> arguments of `peft-harness list` that print them. `--method` also takes quantised bases."""


@dataclass(frozen=True)
class NameOption:
    """An option that takes names of one kind, or the arguments of a command."""

    option: str
    """The option, e.g. `--op`. For arguments: the command, e.g. `check`."""
    kind: str
    """Kind of thing that has such a name, e.g. `operation`."""
    known: Collection[str]
    """Every valid name."""

    def unknown(
        self, given: Sequence[str], others: Sequence[NameOption] = (), more: str = "", *, always: bool = False
    ) -> Iterator[Problem]:
        """Yield a problem for each name in `given` that is unknown.

        others: further options, whose names the user may have meant. more: a text to append to the hint if no name is
        close, or always.
        """
        elsewhere = {name: other for other in others for name in other.known if name not in self.known}
        for name in given:
            if name not in self.known:
                close = closest_match(name, [*self.known, *elsewhere])
                hint = self._hint(close, elsewhere.get(close)) if close else self._all(name)
                hint = "; ".join(filter(None, (hint, "" if close and not always else more)))
                yield Problem(self.option, f"unknown {self.kind} {name!r}", hint)

    def _hint(self, close: str, other: NameOption | None) -> str:
        """Return a hint with the closest name. other: the option that takes this name, if it is another one."""
        guess, kind = (f"{other.option} {close}", other.kind) if other else (close, self.kind)
        return f"did you mean `{guess}`?" + (
            f" `peft-harness list {_LISTED[kind]}` shows all" if kind in _LISTED else ""
        )

    def _all(self, name: str) -> str:
        shows = f"`peft-harness list {_LISTED[self.kind]}` describes them" if self.kind in _LISTED else ""
        return "; ".join(filter(None, (did_you_mean(name, self.known, "there are"), shows)))
