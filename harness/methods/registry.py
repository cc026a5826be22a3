"""Implementations from the entry point group `harness.implementations`, including the harness's own.

No torch here: an Implementation imports its libraries inside its function.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache
from importlib import import_module
from importlib.metadata import Distribution, EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from harness.console import foreign_output
from harness.errors import ImplementationError, Unsupported, did_you_mean
from harness.methods.loader import ADAPTER_FILES
from harness.methods.peft_config import UNREFERENCED
from harness.methods.spec import Adapted, method_info, methods
from harness.resources import data_folder, import_path

if TYPE_CHECKING:
    from harness.records.record import Environment

GROUP = "harness.implementations"
OWN_DISTRIBUTION = "peft-harness"
"""Name of the distribution that contains the harness."""
DTYPES = ("float64", "float32", "bfloat16", "float16")
TargetKind = Literal["method", "operation", "base", "loader"]

_OPERATIONS = Path(__file__).resolve().parents[1] / "conformance" / "operations"
_WORD = re.compile(r"[\w.+-]+")
_ADAPTED = [name for name in (*Adapted.__annotations__, *vars(Adapted)) if not name.startswith("_")]


@dataclass(frozen=True)
class Implementation:
    """Code that implements a Method, an Operation or a quantisation of the base weights, or that loads adapter files."""

    name: str
    """Name in suites, e.g. `hf-peft`."""
    kind: TargetKind
    target: str
    """The implemented Method (`lora`), Operation (`nf4_linear`) or quantisation (`nf4`); `adapter_files` for a loader."""
    function: Callable[..., Any]
    """The code. For a Method, it takes (model, config, generator) and returns an `Adapted`, see `harness.methods.spec`. For
    `adapter_files`, it takes (base_folder, dtype) and returns a `Loader`, see `harness.methods.loader`."""
    dtypes: tuple[str, ...] = ("float32", "bfloat16", "float16")
    """Supported dtypes, a subset of `DTYPES`."""
    devices: tuple[str, ...] = ("cpu", "cuda")
    """Supported device types."""
    requires: tuple[str, ...] = ()
    """Modules that a Cell imports at its start-up, outside every measured phase. If one is missing, the Cell is skipped."""
    offers: tuple[str, ...] = ()
    """Optional features of the Method that the Implementation has: fields of the Config that are marked `opt_in`, e.g.
    LoRA's `lora_bias`, and kinds of layers in `opt_in_layers`, e.g. QLoRA's `experts`."""
    distribution: str = ""
    """Name of the Python distribution whose entry point offers the Implementation."""
    version: str = ""
    """Version of this distribution."""
    point: str = ""
    """Name of the entry point, as in `entry_points_by_name`."""

    def __post_init__(self) -> None:
        if self.kind not in get_args(TargetKind):
            raise ValueError(f"kind must be one of {', '.join(get_args(TargetKind))}; got {self.kind!r}")
        for part in ("name", "target"):
            if not _is_word(getattr(self, part)):
                raise TypeError(f"{part} must be a word of letters, digits and ._+-, got {getattr(self, part)!r}")
        for part in ("dtypes", "devices", "requires", "offers"):
            words = getattr(self, part)
            # tuple("cuda") would give four devices
            if isinstance(words, str) or not isinstance(words, Iterable):
                raise TypeError(f"{part} must be a list of words, got {words!r}")
            object.__setattr__(self, part, tuple(words))
        for part in ("devices", "requires", "offers"):
            if invalid := [one for one in getattr(self, part) if not _is_word(one)]:
                raise TypeError(f"{part} must be words, got {invalid[0]!r}")
        if not self.dtypes:
            raise ValueError(f"dtypes is empty; there are: {', '.join(DTYPES)}")
        if invalid := [one for one in self.dtypes if one not in DTYPES]:
            hint = did_you_mean(str(invalid[0]).removeprefix("torch."), DTYPES, "there are")
            raise ValueError(f"dtypes has {invalid[0]!r}, which is no dtype: {hint}")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function.

        Raises Unsupported if the config or the model uses an optional feature of the Method that is not in `offers`.
        Raises TypeError if the function lacks a parameter, and if a Method's function returns an object that is not an
        `Adapted`.
        """
        if self.kind == "method":
            given = {**dict(zip(("model", "config"), args, strict=False)), **kwargs}
            self._require_offered(given.get("model"), given.get("config"))
        try:
            returned = self.function(*args, **kwargs)
        except TypeError as error:
            if why := _why_not_called(self.function, *args, **kwargs):
                names = ", ".join([f"{len(args)} by position", *kwargs] if args else kwargs)
                raise TypeError(
                    f"{self.target} gets the arguments {names}; {_name_of(self.function)}{inspect.signature(self.function)} "
                    f"cannot take them: {why} (`peft-harness explain {self.target}`)"
                ) from error
            raise
        if self.kind == "method" and (missing := [name for name in _ADAPTED if not hasattr(returned, name)]):
            kind = f"an Adapted without {', '.join(missing)}" if len(missing) < len(_ADAPTED) else "no Adapted"
            raise TypeError(
                f"attach returned {_abbreviated(returned)}, which is {kind} (harness/methods/spec.py has the protocol; "
                "harness.testing.wrap_layers makes one)"
            )
        return returned

    def _require_offered(self, model: Any, config: Any) -> None:
        for name, default in opt_in_fields(self.target).items():
            if name not in self.offers and getattr(config, name, default) != default:
                raise Unsupported(f"{self.name} does not offer {name} of {self.target}")
        if kinds := set(opt_in_layers(self.target)) - {*self.offers}:
            layers = importlib.import_module("reference.shared.layers")  # here, because it imports torch
            for path, layer in layers.named(model, config.targets).items():
                if (kind := layers.kind_of(layer)) in kinds:
                    raise Unsupported(f"{path}: {self.name} does not offer {kind} for {self.target}")

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
    offers: Iterable[str] = (),
) -> Callable[[Callable[..., Any]], Implementation]:
    """Return a decorator that makes a function an Implementation of `target`.

    The harness finds the Implementation only if an entry point offers it. kind: by default, the kind of `target`.
    The other arguments are fields of Implementation.
    """

    def wrap(function: Callable[..., Any]) -> Implementation:
        known = kind or (targets().get(target, "method") if isinstance(target, str) else "method")
        return Implementation(name, known, target, function, dtypes, devices, requires, offers)  # type: ignore[arg-type]

    return wrap


def implementations_in(name: str) -> list[Implementation]:
    """Return the Implementations in a module, or in the modules directly in a package.

    name: dotted name of the module or package.
    """
    found = import_module(name)
    modules = [file.name for file in pkgutil.iter_modules(getattr(found, "__path__", ())) if not file.ispkg]
    namespaces = [vars(found), *(vars(import_module(f"{name}.{module}")) for module in modules)]
    return [one for names in namespaces for one in names.values() if isinstance(one, Implementation)]


@cache
def targets() -> dict[str, TargetKind]:
    """Map each valid value of `Implementation.target` to its kind.

    Operations and quantisations are listed by the names of their files. The files are not read.
    """
    found: dict[str, TargetKind] = {file.stem: "base" for file in (data_folder("suites") / "parity").glob("*.yaml")}
    found |= {file.stem: "operation" for file in _OPERATIONS.glob("*.py") if not file.stem.startswith("_")}
    found[ADAPTER_FILES] = "loader"
    return found | dict.fromkeys([*methods(), *UNREFERENCED], "method")


@cache
def opt_in_fields(method: str) -> dict[str, Any]:
    """Map each field of a Method's Config that is marked `opt_in` to its default."""
    fields = {} if method in UNREFERENCED else method_info(method).fields
    return {name: info.default for name, info in fields.items() if info.opt_in}


def opt_in_layers(method: str) -> tuple[str, ...]:
    """Return the kinds of layers that a Method passes only to implementations that name them in `offers`."""
    return () if method in UNREFERENCED else method_info(method).spec.opt_in_layers


def optional_features(method: str) -> tuple[str, ...]:
    """Return all values that `Implementation.offers` may have for a Method: fields of its Config, and kinds of layers."""
    return (*opt_in_fields(method), *opt_in_layers(method))


@dataclass(frozen=True)
class Registry:
    """Implementations of the installed distributions."""

    implementations: tuple[Implementation, ...] = ()
    broken: dict[str, str] = field(default_factory=dict)
    """Name of an entry point, as in `entry_points_by_name`, that failed entirely or in part -> reason."""
    environment: Environment | None = None
    """Software of the process that loaded the entry points. None if this process loaded them."""

    def names(self, kind: str, target: str) -> list[str]:
        """List the names of the Implementations of `target`, sorted. kind: the kind of `target`, e.g. `method`."""
        return sorted(i.name for i in self.implementations if (i.kind, i.target) == (kind, target))

    def find(self, kind: str, target: str, name: str) -> Implementation:
        """Return the Implementation with this name.

        If there is none, raise ImplementationError with the nearest name or, if the plug-in `name` is broken, with the
        reason.
        """
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
        hint = did_you_mean(name, offered, f"implementations of {target}")
        if self.broken:
            hint += f"; broken plug-ins: {', '.join(self.broken)} (`peft-harness list implementations` shows why)"
        others = sorted(i.target for i in self.implementations if i.name == name)
        if others:
            return ImplementationError(f"`{name}` does not offer {target}, only {', '.join(others)}", hint=hint)
        return ImplementationError(f"no implementation `{name}` of {target}", hint=hint)


def format_error(error: BaseException) -> str:
    """Format an exception of a plug-in in one printable line, even if its `__str__` raises."""
    text = " ".join("".join(traceback.format_exception_only(error)).split())
    return "".join(one if one.isprintable() else "?" for one in text)


def entry_points_by_name() -> dict[str, EntryPoint]:
    """Map names to the entry points of the group `harness.implementations`, without loading any. The harness's come first.

    If two entry points have the same name, the name of the distribution is appended to that of the second.
    """
    return dict(_entry_points(import_path()))


@lru_cache(maxsize=1)
def _entry_points(_path: tuple[tuple[str, int], ...]) -> dict[str, EntryPoint]:
    found: dict[str, EntryPoint] = {}
    for point in sorted(entry_points(group=GROUP), key=_order):
        name = point.name if point.name not in found else f"{point.name} of {_provider(point)[0]}"
        while name in found:  # even one distribution may have the name twice
            name += " (again)"
        found[name] = point
    return found


def discover(only: Collection[str] | None = None, begin: Callable[[str], None] | None = None) -> Registry:
    """Load every entry point of the group `harness.implementations`, and return the Registry.

    The harness's own come first, so that no plug-in can take one of their names. only: names of the entry points to
    load, as in `entry_points_by_name`. begin: called with each name before loading.
    """
    found: dict[tuple[str, str, str], Implementation] = {}
    broken: dict[str, str] = {}
    known = targets()
    for name, point in entry_points_by_name().items():
        if only is not None and name not in only:
            continue
        if begin is not None:
            begin(name)
        reasons = []
        try:
            with foreign_output():  # a plug-in may print on import
                offered = list(_offered(point.load()))
        # A plug-in may raise anything, SystemExit included; the others must still load.
        except (Exception, SystemExit) as error:  # noqa: BLE001
            reasons.append(format_error(error) + _place(error))
            offered = []
        distribution, version = _provider(point)
        for implementation in offered:
            key = (implementation.kind, implementation.target, implementation.name)
            if misfit := _misfit(implementation, known):
                reasons.append(misfit)
            elif key in found:
                reasons.append(f"{implementation} is offered twice, first by {found[key].distribution}")
            else:
                found[key] = replace(implementation, distribution=distribution, version=version, point=name)
        if reasons:
            broken[name] = "; ".join(reasons)
    return Registry(tuple(found.values()), broken)


def sibling(implementation: Implementation, method: str, dtype: str, device: str) -> Implementation:
    """Return the implementation of `method` with the same name, from the same entry point.

    Raises Unsupported if there is none, or if it does not support the dtype or the type of device.
    """
    try:
        found = discover([implementation.point]).find("method", method, implementation.name)
    except ImplementationError as error:
        raise Unsupported(str(error)) from error
    if dtype not in found.dtypes or device not in found.devices:
        raise Unsupported(f"{method} is not offered for {dtype} on {device}")
    return found


def _place(error: BaseException) -> str:
    """Return ` (FILE:LINE)` of the last line of a file that was running, or an empty text."""
    frames = [one for one in traceback.extract_tb(error.__traceback__) if not one.filename.startswith("<")]
    inside = [
        one for one in frames if Path(one.filename) != Path(__file__) and "importlib" not in Path(one.filename).parts
    ]
    return f" ({inside[-1].filename}:{inside[-1].lineno})" if inside else ""


def _misfit(implementation: Implementation, known: dict[str, TargetKind]) -> str:
    """Return an error message if the target, kind or `offers` is invalid, or an empty string. known: target -> kind."""
    target, kind = implementation.target, implementation.kind
    if target not in known:
        return f"{implementation}: unknown target {target!r}; {did_you_mean(target, known, 'there are')}"
    if known[target] != kind:
        return f"{implementation}: {target} is of kind {known[target]!r}; leave `kind` out of @implements"
    possible = optional_features(target) if kind == "method" else ()
    if unknown := [name for name in implementation.offers if name not in possible]:
        hint = did_you_mean(unknown[0], possible, "there are") if possible else "leave `offers` out"
        return f"{implementation}: `offers` has {unknown[0]!r}, which is no optional feature of {target}; {hint}"
    return ""


def _why_not_called(function: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    """Return why `function` cannot be called with these arguments, or an empty text."""
    try:
        inspect.signature(function).bind(*args, **kwargs)
    except TypeError as error:
        return str(error)
    except ValueError:  # a function in C may have no signature
        return ""
    return ""


def _name_of(function: Callable[..., Any]) -> str:
    return str(getattr(function, "__name__", "the function"))


def _is_word(value: object) -> bool:
    return isinstance(value, str) and _WORD.fullmatch(value) is not None


def _abbreviated(value: object) -> str:
    return repr(value) if value is None or isinstance(value, (int, str)) else f"a {type(value).__name__}"


def _order(point: EntryPoint) -> tuple[bool, str, str]:
    distribution, _ = _provider(point)
    return distribution != OWN_DISTRIBUTION, distribution, point.name


def _provider(point: EntryPoint) -> tuple[str, str]:
    """Return the name and the version of an entry point's distribution: "unknown" and "" where its METADATA lacks them."""
    return ("unknown", "") if point.dist is None else _name_and_version(point.dist)


@lru_cache(maxsize=64)
def _name_and_version(distribution: Distribution) -> tuple[str, str]:
    """Return name and version in the METADATA of a distribution. The cache saves some milliseconds per entry point."""
    metadata = distribution.metadata
    return metadata["Name"] or "unknown", metadata["Version"] or ""


def _offered(loaded: object) -> Iterator[Implementation]:
    """Yield the Implementations of an entry point.

    `loaded` is one Implementation, several, or a function that returns either.
    """
    if callable(loaded) and not isinstance(loaded, Implementation):
        if _why_not_called(loaded):
            raise TypeError(
                f"{_name_of(loaded)} is no Implementation, because @implements(TARGET, name=NAME) does not decorate it; a "
                "function that returns Implementations takes no arguments"
            )
        loaded = loaded()
    offered = [loaded] if isinstance(loaded, Implementation) else loaded
    if not isinstance(offered, Iterable):
        raise TypeError(f"expected an Implementation, several, or a function returning them; got {offered!r}")
    for implementation in offered:
        if not isinstance(implementation, Implementation):
            got = _name_of(implementation) if callable(implementation) else repr(implementation)
            raise TypeError(
                f"expected an Implementation, got {got}; decorate a function with @implements(TARGET, name=NAME)"
            )
        yield implementation
