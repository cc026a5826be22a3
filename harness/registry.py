"""Implementations, and the one door they come in by: the entry point group `harness.implementations`.

Ours use the same door as yours. No torch here: an implementation imports what it needs inside its function.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field, replace
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Literal, get_args

from harness.errors import ImplementationError
from harness.spelling import near

GROUP = "harness.implementations"
Kind = Literal["method", "operation", "base"]


@dataclass(frozen=True)
class Implementation:
    """Code that claims to be a Method, an Operation or a quantisation of the base weights.

    name: what suites write, e.g. `hf-peft`. target: the method (`lora`), operation (`nf4_linear`) or quantisation
    (`nf4`) it claims to be. requires: modules that are imported at a Cell's start-up, so that no measured phase pays
    for it; without them the Cell is skipped. distribution, version, point (its name): filled in from the entry point.
    """

    name: str
    kind: Kind
    target: str
    function: Callable[..., Any]
    dtypes: tuple[str, ...] = ("float32", "bfloat16", "float16")
    devices: tuple[str, ...] = ("cpu", "cuda")
    requires: tuple[str, ...] = ()
    distribution: str = ""
    version: str = ""
    point: str = ""

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"kind must be one of {', '.join(get_args(Kind))}; got {self.kind!r}")
        for part in ("dtypes", "devices", "requires"):
            if isinstance(getattr(self, part), str):  # tuple("cuda") would be four devices
                raise TypeError(f"{part} must be a list of words, got {getattr(self, part)!r}")
            object.__setattr__(self, part, tuple(getattr(self, part)))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Forward to the function."""
        return self.function(*args, **kwargs)

    def __str__(self) -> str:
        return f"{self.kind} {self.target} by {self.name}"


def implements(
    target: str,
    *,
    name: str,
    kind: Kind = "method",
    dtypes: Iterable[str] = ("float32", "bfloat16", "float16"),
    devices: Iterable[str] = ("cpu", "cuda"),
    requires: Iterable[str] = (),
) -> Callable[[Callable[..., Any]], Implementation]:
    """Mark a function as an Implementation of `target`. Nothing is registered: the entry point does that."""

    def wrap(function: Callable[..., Any]) -> Implementation:
        return Implementation(name, kind, target, function, dtypes, devices, requires)  # type: ignore[arg-type]

    return wrap


@dataclass(frozen=True)
class Registry:
    """What the installed distributions offer.

    broken: entry points that could not be used, and why; they are shown, never silently dropped.
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
                mend="install what it needs, or see `peft-harness list implementations`",
            )
        mend = near(name, offered, f"who offers {target}")
        if self.broken:
            mend += f"; broken plug-ins: {', '.join(self.broken)} (`peft-harness list implementations` says why)"
        others = sorted(i.target for i in self.implementations if i.name == name)
        if others:
            return ImplementationError(f"`{name}` does not offer {target}, only {', '.join(others)}", mend=mend)
        return ImplementationError(f"no implementation `{name}` of {target}", mend=mend)


def names_of_entry_points() -> list[str]:
    """List the names of the group's entry points, none of which is loaded."""
    return sorted({point.name for point in entry_points(group=GROUP)})


def discover(only: Collection[str] | None = None, begin: Callable[[str], None] | None = None) -> Registry:
    """Load every entry point of the group. Ours first, so that nobody can take a name that we use.

    only: load those of these names and no other; begin: is told of each before it is loaded.
    """
    found: dict[tuple[str, str, str], Implementation] = {}
    broken: dict[str, str] = {}
    for point in sorted(entry_points(group=GROUP), key=_order):
        if only is not None and point.name not in only:
            continue
        if begin is not None:
            begin(point.name)
        reasons = []
        try:
            # What a plug-in prints on import is talk, and stdout is data.
            with contextlib.redirect_stdout(sys.stderr):
                offered = list(_offered(point.load()))
        # Anything may be wrong with somebody else's package, sys.exit on import included; it must not stop the rest.
        except (Exception, SystemExit) as error:  # noqa: BLE001
            reasons.append(f"{type(error).__name__}: {error}")
            offered = []
        for implementation in offered:
            key = (implementation.kind, implementation.target, implementation.name)
            if key in found:
                reasons.append(f"{implementation} is offered twice, first by {found[key].distribution}")
            else:
                distribution, version = _provider(point)
                found[key] = replace(implementation, distribution=distribution, version=version, point=point.name)
        if reasons:
            broken[point.name] = "; ".join([*filter(None, [broken.get(point.name)]), *reasons])
    return Registry(tuple(found.values()), broken)


def _order(point: EntryPoint) -> tuple[bool, str, str]:
    distribution, _ = _provider(point)
    return distribution != "peft-harness", distribution, point.name


def _provider(point: EntryPoint) -> tuple[str, str]:
    return (point.dist.name, point.dist.version) if point.dist is not None else ("unknown", "")


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
