"""Implementations, and the one door they come in by: the entry point group `harness.implementations`.

Ours use the same door as yours. No torch here: an implementation imports what it needs inside its function.
"""

from __future__ import annotations

import contextlib
import re
import sys
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, Literal, get_args

from harness.errors import ImplementationError, near
from harness.methods.peft_config import UNREFERENCED
from harness.methods.spec import methods
from harness.resources import folder

GROUP = "harness.implementations"
DTYPES = ("float64", "float32", "bfloat16", "float16")
TargetKind = Literal["method", "operation", "base"]

_OPERATIONS = Path(__file__).resolve().parents[1] / "conformance" / "operations"
_WORD = re.compile(r"[\w.+-]+")
_ADAPTED = (
    "model", "layers", "can_merge", "tensors", "state", "parameters", "regularizer", "optimizer", "after_step", "merge",
    "unmerge", "detach",
)  # fmt: skip


@dataclass(frozen=True)
class Implementation:
    """Code that claims to be a Method, an Operation or a quantisation of the base weights.

    name: what suites write, e.g. `hf-peft`. target: the method (`lora`), operation (`nf4_linear`) or quantisation
    (`nf4`) it claims to be. requires: modules that are imported at a Cell's start-up, so that no measured phase pays
    for it; without them the Cell is skipped. distribution, version, point (its name): filled in from the entry point.
    """

    name: str
    kind: TargetKind
    target: str
    function: Callable[..., Any]
    dtypes: tuple[str, ...] = ("float32", "bfloat16", "float16")
    devices: tuple[str, ...] = ("cpu", "cuda")
    requires: tuple[str, ...] = ()
    distribution: str = ""
    version: str = ""
    point: str = ""

    def __post_init__(self) -> None:
        if self.kind not in get_args(TargetKind):
            raise ValueError(f"kind must be one of {', '.join(get_args(TargetKind))}; got {self.kind!r}")
        for part in ("name", "target"):
            if not _is_word(getattr(self, part)):
                raise TypeError(f"{part} must be a word of letters, digits and ._+-, got {getattr(self, part)!r}")
        for part in ("dtypes", "devices", "requires"):
            several = getattr(self, part)
            # tuple("cuda") would be four devices
            if isinstance(several, str) or not isinstance(several, Iterable):
                raise TypeError(f"{part} must be a list of words, got {several!r}")
            object.__setattr__(self, part, tuple(several))
        for part in ("devices", "requires"):
            if odd := [one for one in getattr(self, part) if not _is_word(one)]:
                raise TypeError(f"{part} must be words, got {odd[0]!r}")
        if not self.dtypes:
            raise ValueError(f"dtypes is empty; there are: {', '.join(DTYPES)}")
        if odd := [one for one in self.dtypes if one not in DTYPES]:
            hint = near(str(odd[0]).removeprefix("torch."), DTYPES, "there are")
            raise ValueError(f"dtypes has {odd[0]!r}, but a dtype is one of our words: {hint}")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Forward to the function. Raises TypeError if it returns for a Method what is no Adapted."""
        returned = self.function(*args, **kwargs)
        if self.kind == "method" and (lacks := [name for name in _ADAPTED if not hasattr(returned, name)]):
            without = f"an Adapted without {', '.join(lacks)}" if len(lacks) < len(_ADAPTED) else "no Adapted"
            raise TypeError(
                f"attach returned {_shortly(returned)}, which is {without} (harness/methods/spec.py has the protocol; "
                "harness.testing.wrap_layers makes one)"
            )
        return returned

    def __str__(self) -> str:
        return f"{self.kind} {self.target} by {self.name}"


def implements(
    target: str,
    *,
    name: str,
    kind: TargetKind | None = None,
    dtypes: Iterable[str] = ("float32", "bfloat16", "float16"),
    devices: Iterable[str] = ("cpu", "cuda"),
    requires: Iterable[str] = (),
) -> Callable[[Callable[..., Any]], Implementation]:
    """Mark a function as an Implementation of `target`. Nothing is registered: the entry point does that.

    kind: follows from the target, and need not be given.
    """

    def wrap(function: Callable[..., Any]) -> Implementation:
        guessed = kind or (targets().get(target, "method") if isinstance(target, str) else "method")
        return Implementation(name, guessed, target, function, dtypes, devices, requires)  # type: ignore[arg-type]

    return wrap


@cache
def targets() -> dict[str, TargetKind]:
    """Map everything that can be implemented to its kind, by the names of files: nothing is imported or read."""
    found: dict[str, TargetKind] = {file.stem: "base" for file in (folder("suites") / "parity").glob("*.yaml")}
    found |= {file.stem: "operation" for file in _OPERATIONS.glob("*.py") if not file.stem.startswith("_")}
    return found | dict.fromkeys([*methods(), *UNREFERENCED], "method")


@dataclass(frozen=True)
class Registry:
    """What the installed distributions offer.

    broken: entry points that could not be used, or not all of what they offer, by the names of `doors`, and why; they are
    shown, never silently dropped.
    """

    implementations: tuple[Implementation, ...] = ()
    broken: dict[str, str] = field(default_factory=dict)

    def names(self, kind: str, target: str) -> list[str]:
        """List who offers `target`, sorted."""
        return sorted(i.name for i in self.implementations if (i.kind, i.target) == (kind, target))

    def find(self, kind: str, target: str, name: str) -> Implementation:
        """Return one Implementation; raises ImplementationError with the nearest name or the plug-in's own error."""
        for implementation in self.implementations:
            if (implementation.kind, implementation.target, implementation.name) == (kind, target, name):
                return implementation
        raise self._missing(kind, target, name)

    def _missing(self, kind: str, target: str, name: str) -> ImplementationError:
        offered = self.names(kind, target)
        if name in self.broken:
            return ImplementationError(
                f"implementation `{name}` is installed but broken: {self.broken[name]}",
                hint="install what it needs, or see `peft-harness list implementations`",
            )
        hint = near(name, offered, f"who offers {target}")
        if self.broken:
            hint += f"; broken plug-ins: {', '.join(self.broken)} (`peft-harness list implementations` says why)"
        others = sorted(i.target for i in self.implementations if i.name == name)
        if others:
            return ImplementationError(f"`{name}` does not offer {target}, only {', '.join(others)}", hint=hint)
        return ImplementationError(f"no implementation `{name}` of {target}", hint=hint)


def told(error: BaseException) -> str:
    """Say an error of somebody else's in one line that a terminal can show, also if it cannot say itself."""
    text = " ".join("".join(traceback.format_exception_only(error)).split())
    return "".join(one if one.isprintable() else "?" for one in text)


def doors() -> dict[str, EntryPoint]:
    """Map the names of the group's entry points to them, ours first; none is loaded.

    One that has a name which is taken already is called by its distribution too, so that nobody is taken for another.
    """
    found: dict[str, EntryPoint] = {}
    for point in sorted(entry_points(group=GROUP), key=_order):
        name = point.name if point.name not in found else f"{point.name} of {_provider(point)[0]}"
        while name in found:  # twice in one distribution
            name += " (again)"
        found[name] = point
    return found


def discover(only: Collection[str] | None = None, begin: Callable[[str], None] | None = None) -> Registry:
    """Load every entry point of the group. Ours first, so that nobody can take a name that we use.

    only: load those of these `doors` and no other; begin: is told of each before it is loaded.
    """
    found: dict[tuple[str, str, str], Implementation] = {}
    broken: dict[str, str] = {}
    there = targets()
    for door, point in doors().items():
        if only is not None and door not in only:
            continue
        if begin is not None:
            begin(door)
        reasons = []
        try:
            # What a plug-in prints on import is talk, and stdout is data.
            with contextlib.redirect_stdout(sys.stderr):
                offered = list(_offered(point.load()))
        # Anything may be wrong with somebody else's package, sys.exit on import included; it must not stop the rest.
        except (Exception, SystemExit) as error:  # noqa: BLE001
            reasons.append(told(error))
            offered = []
        for implementation in offered:
            key = (implementation.kind, implementation.target, implementation.name)
            if misfit := _misfit(implementation, there):
                reasons.append(misfit)
            elif key in found:
                reasons.append(f"{implementation} is offered twice, first by {found[key].distribution}")
            else:
                distribution, version = _provider(point)
                found[key] = replace(implementation, distribution=distribution, version=version, point=door)
        if reasons:
            broken[door] = "; ".join(reasons)
    return Registry(tuple(found.values()), broken)


def _misfit(implementation: Implementation, there: dict[str, TargetKind]) -> str:
    """Say what is wrong with an Implementation of something that is not there, or is of another kind; nothing if nothing."""
    target, kind = implementation.target, implementation.kind
    if target not in there:
        return f"{implementation}: nothing here is called {target!r}; {near(target, there, 'there are')}"
    if there[target] != kind:
        return f"{implementation}: {target} is of kind {there[target]!r}; leave `kind` out of @implements"
    return ""


def _is_word(value: object) -> bool:
    return isinstance(value, str) and _WORD.fullmatch(value) is not None


def _shortly(value: object) -> str:
    return repr(value) if value is None or isinstance(value, (int, str)) else f"a {type(value).__name__}"


def _order(point: EntryPoint) -> tuple[bool, str, str]:
    distribution, _ = _provider(point)
    return distribution != "peft-harness", distribution, point.name


def _provider(point: EntryPoint) -> tuple[str, str]:
    """Return the distribution's name and version; either may be missing from its METADATA."""
    return (point.dist.name or "unknown", point.dist.version or "") if point.dist is not None else ("unknown", "")


def _offered(loaded: object) -> Iterator[Implementation]:
    """Yield the Implementations behind an entry point: one, several, or a function that returns either."""
    if callable(loaded) and not isinstance(loaded, Implementation):
        loaded = loaded()
    several = [loaded] if isinstance(loaded, Implementation) else loaded
    if not isinstance(several, Iterable):
        raise TypeError(f"expected an Implementation, several, or a function returning them; got {several!r}")
    for one in several:
        if not isinstance(one, Implementation):
            raise TypeError(f"expected an Implementation, got {one!r}")
        yield one
