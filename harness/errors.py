"""Exit codes, and errors with a location and a hint. Only `harness.console` prints them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from enum import IntEnum
from importlib import import_module
from types import ModuleType


class Exit(IntEnum):
    """Exit codes of the command `peft-harness`. Scripts may rely on them; harness/cli/README.md describes them."""

    PASS = 0
    FAIL = 1
    USAGE = 2
    INCONCLUSIVE = 3
    INFRASTRUCTURE = 4
    NOTHING_COMPARED = 5


EXITS = {
    Exit.PASS: "everything requested passed, or failed because of a known defect; or there was nothing to judge (`list`, "
    "`plan`, `explain`)",
    Exit.FAIL: "a finding: an implementation computes wrong results or leaves a tensor untrained, a claim of a paper is "
    "not reproduced, a comparison of the suite is refuted, nothing that `fit --batch` asks about fits, a rerun differs "
    "without a known cause, a Record was changed after its run, or a history shows more parameters or counted bytes, or a "
    "confirmed change for the worse",
    Exit.USAGE: "wrong use: an option, a name, a path, or a mistake in a suite; nothing was run",
    Exit.INCONCLUSIVE: "a question could not be decided either way; only with --strict, from `history settle`, or because "
    "an adapter is too weak for `check --served`",
    Exit.INFRASTRUCTURE: "Cells were not measured (out of memory, timeout, lost, ended by Ctrl-C, SIGTERM or SIGHUP), an "
    "implementation named to `check` could not be tried, a part of `night` failed, a model server stopped, or the machine "
    "failed: no GPU, no network, a full disk",
    Exit.NOTHING_COMPARED: "nothing was measured or compared, so nothing can pass; or there is nothing to export",
}


class HarnessError(Exception):
    """An error that a user can act on."""

    code = "error"
    """Name of this kind of error in `peft-harness explain`."""
    exit_code = Exit.INFRASTRUCTURE

    def __init__(self, what: str, *, where: str = "", hint: str = "", details: Sequence[str] = ()) -> None:
        """what: the error in one sentence. where: a file and line, a Cell or an option. hint: a way to fix it.

        details: further lines, printed between `what` and `hint`. Each is one line, even if it holds a line break.
        """
        super().__init__(what)
        self.what, self.where, self.hint, self.details = what, where, hint, tuple(details)

    def lines(self) -> list[str]:
        """Return the message as lines. They are not escaped: a text from a file or a library may hold any character."""
        head = f"{self.where}: {self.what}" if self.where else self.what
        return [head, *self.details, *([f"  hint: {self.hint}"] if self.hint else [])]

    def __str__(self) -> str:
        return "\n".join(self.lines())


class UsageError(HarnessError):
    """A wrong option, name or path on the command line. Nothing was run."""

    code = "usage"
    exit_code = Exit.USAGE


@dataclass(frozen=True)
class Problem:
    """One mistake in a file or on the command line."""

    where: str
    """`file:line`, or an option."""
    what: str
    hint: str = ""

    def lines(self) -> list[str]:
        """Return the mistake as lines of a list: its place and description, and its hint if there is one."""
        return [f"  {self.where}: {self.what}", *([f"    hint: {self.hint}"] if self.hint else [])]

    def __str__(self) -> str:
        return "\n".join(self.lines()).strip()


def sort_problems(problems: Iterable[Problem]) -> list[Problem]:
    """Return the problems of files without duplicates, sorted by file and line."""

    def place(problem: Problem) -> tuple[str, int, str]:
        path, _, line = problem.where.rpartition(":")
        return path, int(line), problem.what

    return sorted(set(problems), key=place)


def _listed(problems: Sequence[Problem]) -> list[str]:
    return [line for problem in problems for line in problem.lines()]


def usage_error(problems: Sequence[Problem]) -> UsageError:
    """Return one error for all mistakes on a command line."""
    if len(problems) == 1:
        (one,) = problems
        return UsageError(one.what, where=one.where, hint=one.hint)
    return UsageError(f"{len(problems)} mistakes", details=_listed(problems))


@contextmanager
def collect_errors(problems: list[Problem]) -> Iterator[None]:
    """Catch a UsageError that is raised inside the context and add it to `problems`, so that more checks can follow."""
    try:
        yield
    except UsageError as error:
        problems.append(Problem(error.where, error.what, error.hint))


class SuiteError(UsageError):
    """A suite, claim file or other YAML file has mistakes; each has a file and a line. Nothing was run."""

    code = "suite"

    def __init__(self, problems: Sequence[Problem], file: str = "suite") -> None:
        """file: kind of the file, for the message, e.g. `claim file`."""
        super().__init__(f"{plural(len(problems), 'mistake')} in the {file}", details=_listed(problems))
        self.problems = tuple(problems)


class RefusedError(UsageError):
    """A run cannot become a baseline. The message lists all reasons. No file was written."""

    code = "refused"

    def __init__(self, run: str, problems: Sequence[Problem]) -> None:
        count = f"{plural(len(problems), 'reason')} not to make a baseline of it"
        super().__init__(count, where=run, details=_listed(problems))
        self.problems = tuple(problems)


class Unsupported(NotImplementedError):  # noqa: N818  # an answer of an implementation, not an error
    """Raised by an implementation for a case that it does not support. It is shown as `unsupported`, not as a failure.

    A plain NotImplementedError is a failure: torch also raises it for a missing kernel or gradient.
    """


class AssetError(HarnessError):
    """A model or data set could not be fetched, verified or unpacked. The cache holds no half-written file."""

    code = "asset"


class StoreError(HarnessError):
    """A run folder or Record could not be written or read (full disk, torn file, newer schema). Finished Records stay."""

    code = "store"


class ServerError(HarnessError):
    """A model server did not answer, or stopped in the middle of an answer. Results so far are printed."""

    code = "server"


class ImplementationError(HarnessError):
    """An implementation is missing, broken, or does not support the request."""

    code = "implementation"
    exit_code = Exit.USAGE


def import_extra(module: str, where: str) -> ModuleType:
    """Import and return an optional dependency.

    where: the option that needs the dependency, e.g. `--executor ray`. Its last word is the name of the extra. Raises
    HarnessError, with a hint to install the extra, if the import fails.
    """
    try:
        return import_module(module)
    except ImportError as error:
        extra = where.rpartition(" ")[2]
        hint = f"pip install 'peft-harness[{extra}]'"
        raise HarnessError(f"{module} cannot be imported ({error})", where=where, hint=hint) from error


def plural(count: int, noun: str) -> str:
    """Return e.g. `1 Cell` or `3 Cells`."""
    return f"{count} {noun}{'s' if count != 1 else ''}"


def first_names(names: Sequence[str], most: int = 3) -> str:
    """Return a text that lists at most `most` of the names and says how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{', '.join(names[:most])}{more}"


def closest_match(name: str, known: Iterable[str], similarity: float = 0.6) -> str:
    """Return the known name that is most similar to `name`, or an empty string if none is close.

    similarity: smallest similarity of a close name, from 0 to 1 (see `difflib`).
    """
    return next(iter(get_close_matches(name, list(known), n=1, cutoff=similarity)), "")


def did_you_mean(name: str, known: Iterable[str], otherwise: str = "known", instead: str = "") -> str:
    """Return the hint "did you mean `NAME`?" with the closest known name.

    If no known name is close, return the hint "OTHERWISE: NAMES" with the text `otherwise` and all known names. instead:
    what to write instead of a name, if that is possible, e.g. `name a file`. It is appended to the hint.
    """
    names = list(known)
    if close := closest_match(name, names):
        return f"did you mean `{close}`?{f' Or {instead}' if instead else ''}"
    return f"{otherwise}: {', '.join(names) or 'none'}{f'; or {instead}' if instead else ''}"
