"""The checks. Each tests one property that an implementation can violate, and returns a `CheckResult`.

There is one file per topic. A check is a function `check_NAME` with the decorator `check`, by which the harness finds
it:

    @check(States.WARM)
    def check_strides(subject: Subject, case: Case) -> CheckResult:
        ...

The decorator also declares when the check is tried. Parity suites (`suites/parity/*.yaml`) refer to a check by NAME,
and `peft-harness explain NAME` prints the docstring. The first argument is the subject: an implementation that is
attached to a model, an Operation with its arguments, or a loader of adapter files. A check restores the subject's state
before it returns. The parity gate of a Cell tries some checks on the Cell's own model.
"""

from __future__ import annotations

import ast
import importlib
import pkgutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum, auto
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeGuard, TypeVar

from harness.records.check import CheckResult

if TYPE_CHECKING:
    from harness.conformance.case import Case

_PREFIX = "check_"
_Subject = TypeVar("_Subject")


class States(Enum):
    """The states of an adapter in which a parity suite tries a check."""

    ALL = auto()
    """Every state that the parity suite lists."""
    INIT = auto()
    """Only `init`, the state right after attaching."""
    WARM = auto()
    """Only `warm` (random adapter tensors). If the parity suite does not list `warm`, every state that the suite lists.
    This value suits checks that show nothing new in the state `init`, where most updates are zero."""

    def include(self, state: str, listed: Iterable[str]) -> bool:
        """Return whether a check that declares this value is tried in `state`.

        listed: the states that the parity suite lists.
        """
        if self is States.INIT:
            return state == "init"
        return self is States.ALL or state == "warm" or "warm" not in listed


class CellStage(Enum):
    """The stages of a Cell at which the parity gate tries a check."""

    ATTACHED = auto()
    """Right after attaching. If a check fails at this stage, the gate tries no check of another stage."""
    START = auto()
    """In the state from which training starts."""
    WARM = auto()
    """With random adapter tensors."""
    TRAINED = auto()
    """After training and all measurements."""


class Reference(Enum):
    """Use of the reference implementation of the Method by a check."""

    REQUIRED = auto()
    """The check is tried only for adapters with a reference."""
    UNUSED = auto()
    """The check needs no reference. It is tried for adapters with and without a reference."""
    ABSENT = auto()
    """The check is tried only for adapters without a reference (`method: peft`)."""


@dataclass(frozen=True)
class Check(Generic[_Subject]):
    """A check, with the states of an adapter and the stages of a Cell in which it is tried."""

    name: str
    function: Callable[[_Subject, Case], CheckResult]
    states: States
    in_cell: tuple[CellStage, ...]
    reference: Reference
    depends_on_sizes: bool
    """True if the result may change with the sizes of the layers or the settings of the Method or Operation. If False,
    the check is not tried in the sample of further cases that a wide selection adds to the suite's examples."""
    in_minor_examples: bool
    """True if the check is tried in the suite's minor examples (`CaseRole.minor`) even when the selection is not wide. By
    default, this is `depends_on_sizes`."""
    only_wide: bool
    """True if the check is tried only when the selection of cases is wide (`CaseSelection.is_wide`)."""
    also_in_typical_case: bool
    """True if a check with `only_wide` is also tried when the selection is not wide, but only in the suite's typical
    case."""
    also_in_representative_cases: bool
    """True if a check with `only_wide` is also tried in the typical case and in each representative one
    (`CaseRole.representative`)."""
    in_brief_cases: bool
    """True if the check is tried in a brief case (`CaseRole.is_brief`) when the selection is not wide."""
    calls_first: bool
    """True if the check of an Operation must run before any other call. It is tried once, in the suite's typical case,
    before the first case. The other fields then do not matter. Its outcome keeps its place in the suite's list."""

    def __call__(self, subject: _Subject, case: Case) -> CheckResult:
        """Run the check and return its result."""
        return self.function(subject, case)

    def is_tried(
        self,
        *,
        wide: bool,
        sampled: bool,
        typical: bool,
        representative: bool = False,
        minor: bool = False,
        brief: bool = False,
        has_first: bool = False,
    ) -> bool:
        """Return whether the check is tried in a case.

        wide: whether the selection of cases is wide. sampled: whether the case belongs to the sample that is added to
        the suite's examples. typical, representative, minor, brief: the case's fields in `CaseRole`; `brief` is the field
        `is_brief`. has_first: whether the case has `first`.
        """
        if self.calls_first:
            return has_first
        if brief and not wide:
            return self.in_brief_cases
        also = self.also_in_typical_case and typical
        also |= self.also_in_representative_cases and (typical or representative)
        selected = wide or not self.only_wide or also
        if minor and not wide and not self.in_minor_examples:
            return False
        return selected and (self.depends_on_sizes or not sampled)


def check(
    states: States = States.ALL,
    *,
    in_cell: Iterable[CellStage] = (),
    reference: Reference = Reference.REQUIRED,
    depends_on_sizes: bool = True,
    in_minor_examples: bool | None = None,
    only_wide: bool = False,
    also_in_typical_case: bool = False,
    also_in_representative_cases: bool = False,
    in_brief_cases: bool = False,
    calls_first: bool = False,
) -> Callable[[Callable[[_Subject, Case], CheckResult]], Check[_Subject]]:
    """Return a decorator that turns the function `check_NAME` into the Check NAME.

    in_cell: stages at which the parity gate of a Cell also tries the check. The other parameters become fields of
    `Check`. Raises TypeError if the name of the function does not begin with `check_`.
    """

    def declare(function: Callable[[_Subject, Case], CheckResult]) -> Check[_Subject]:
        if not function.__name__.startswith(_PREFIX):
            raise TypeError(f"a check is called {_PREFIX}NAME, not {function.__name__}")
        name = function.__name__.removeprefix(_PREFIX)
        also = also_in_typical_case, also_in_representative_cases, in_brief_cases
        minor = depends_on_sizes if in_minor_examples is None else in_minor_examples
        where = depends_on_sizes, minor, only_wide
        return Check(name, function, states, tuple(in_cell), reference, *where, *also, calls_first)

    return declare


AnyCheck = Check[Any]


@cache
def every() -> dict[str, AnyCheck]:
    """Return all checks by name, in the order of the files."""
    return {
        one.name: one
        for module in pkgutil.iter_modules(__path__)
        for one in vars(importlib.import_module(f"{__name__}.{module.name}")).values()
        if isinstance(one, Check)
    }


def of_cell(stage: CellStage, names: Iterable[str]) -> list[AnyCheck]:
    """Return the checks in `names` that a Cell's parity gate tries at `stage`, in the order of `names`."""
    return [every()[name] for name in names if stage in every()[name].in_cell]


def without_reference() -> list[str]:
    """List the names of the checks that are tried for adapters without a reference."""
    return [name for name, one in every().items() if one.reference is not Reference.REQUIRED]


def docstrings() -> Mapping[str, str]:
    """Return the docstring of every check, by the check's name.

    The docstrings are read from the source, without importing torch.
    """
    return _docstrings_in(_files())


@cache  # each pattern of a known defect asks for all names
def _docstrings_in(files: tuple[Path, ...]) -> Mapping[str, str]:
    return {name: ast.get_docstring(function) or "" for name, function in _declared(files).items()}


def names_of_wide(*, never_by_default: bool = False) -> set[str]:
    """Return the names of the checks that declare `only_wide`, without importing torch.

    never_by_default: True leaves out the checks that also run in some cases when the selection is not wide.
    """
    declared = {
        name: {str(one.arg) for one in decorator.keywords}
        for name, function in _declared(_files()).items()
        for decorator in function.decorator_list
        if _is_declaration(decorator)
    }
    elsewhere = {"also_in_typical_case", "also_in_representative_cases"} if never_by_default else set[str]()
    return {name for name, given in declared.items() if "only_wide" in given and not given & elsewhere}


def _files() -> tuple[Path, ...]:
    return tuple(file for folder in __path__ for file in sorted(Path(folder).glob("*.py")))


def _declared(files: Iterable[Path]) -> dict[str, ast.FunctionDef]:
    return {name: function for file in files for name, function in _declared_in(file).items()}


@cache
def _declared_in(file: Path) -> dict[str, ast.FunctionDef]:
    return {
        node.name.removeprefix(_PREFIX): node
        for node in ast.parse(file.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef) and any(_is_declaration(one) for one in node.decorator_list)
    }


def _is_declaration(decorator: ast.expr) -> TypeGuard[ast.Call]:
    return (
        isinstance(decorator, ast.Call) and isinstance(decorator.func, ast.Name) and decorator.func.id == check.__name__
    )
