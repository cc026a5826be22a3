"""A private copy of a module of the reference, in which right code can be replaced by wrong code."""

from __future__ import annotations

import builtins
import inspect
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from harness.methods.spec import Adapted

Right = Callable[[Tensor], Tensor]
"""Function x -> y: the right forward pass of a layer."""
Forward = Callable[[Any, Tensor, Right], Tensor]
"""Function (layer, x, right) -> y: a wrong forward pass. `right` is the right forward pass."""
PackedForm = tuple[Tensor, Tensor, int, bool]
"""A packed weight: (bytes, absmax, block size, whether absmax is quantised too). The absmax is always the decoded one."""
Pack = Callable[[nn.Module, list[str]], dict[str, PackedForm]]
"""Function (model, paths) -> packed weights: the right way to pack a base. It replaces the layers at these paths by
packed layers."""
_PACKAGES = ("reference", "reference.operations", "reference.shared")


class PatchedCopy:
    """A copy of the reference's module `name`, whose code can be changed.

    Other modules of the reference that this module imports are copied, too. The originals do not change.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._lines: dict[str, list[tuple[str, str]]] = {}
        self._sources: dict[str, str] = {}
        self._changes: list[Callable[[Any], object]] = []
        self._made: dict[str, ModuleType] = {}
        self._packing: Callable[[Pack, nn.Module, list[str]], dict[str, PackedForm]] | None = None

    def replace_line(self, right: str, wrong: str, file: str = "") -> None:
        """Replace the code `right`, which must occur exactly once, by the code `wrong`.

        file: e.g. `nf4` for reference/operations/nf4.py; by default, the module `name`. Raises LookupError if `right`
        does not occur exactly once, so that a change of the reference cannot disable a fault unnoticed.
        """
        name = _module(file) if file else self.name
        count = _source(name).count(right)
        if count != 1:
            raise LookupError(f"{name} has {right!r} {count} times, not once: adapt the planted fault to the reference")
        self._lines.setdefault(name, []).append((right, wrong))

    def replace_source(self, module: str, source: str) -> None:
        """Replace the whole source code of a module of the reference. module: its dotted name."""
        self._sources[module] = source

    def change_adapted(self, change: Callable[[Any], object]) -> None:
        """Register a function that `attach` calls with the Adapted object before it returns this object."""
        self._changes.append(change)

    def change_layers(self, change: Callable[[Any], object]) -> None:
        """Register a function that `attach` calls with each adapted layer before it returns."""
        self.change_adapted(lambda adapted: [change(layer) for layer in adapted.layers.values()])

    def replace_forward(self, wrong: Forward) -> None:
        """Make each adapted layer compute `wrong(layer, x, right)`, where `right` is the layer's right forward pass."""

        def change(layer: Any) -> None:
            layer.forward = partial(_call_wrong, wrong, layer, layer.forward)  # unlike a closure, follows copy.deepcopy

        self.change_layers(change)

    def replace_packing(self, wrong: Callable[[Pack, nn.Module, list[str]], dict[str, PackedForm]]) -> None:
        """Pack the base's layers by `wrong(right, model, paths)`, where `right` is the right way to pack."""
        self._packing = wrong

    def packing(self, right: Pack) -> Pack:
        """Return the function that packs the base: the one registered by `replace_packing`, or else `right`."""
        return right if self._packing is None else partial(self._packing, right)

    def attach(self, model: nn.Module, config: Any, generator: torch.Generator) -> Adapted:
        """Call `attach` of the copied module, apply the registered changes to its result, and return the result."""
        adapted: Adapted = self.module().attach(model, config, generator)
        for change in self._changes:
            change(adapted)
        return adapted

    def module(self, name: str = "") -> Any:
        """Return the copied module. name: dotted name of another module of the reference, to return a copy of that one
        instead.
        """
        name = name or self.name
        if name not in self._made:
            text = self._sources.get(name) or _source(name)
            for right, wrong in self._lines.get(name, []):
                text = text.replace(right, wrong)
            copy = ModuleType(name)
            vars(copy)["__builtins__"] = {**vars(builtins), "__import__": self._import}
            self._made[name] = copy
            exec(compile(text, f"<{name}, with a planted fault>", "exec"), vars(copy))  # noqa: S102  # our own source
        return self._made[name]

    def _import(
        self, name: str, scope: Any = None, local: Any = None, names: Sequence[str] | None = (), level: int = 0
    ) -> object:
        """Do what Python's `import` does, but return copies of the reference's modules."""
        real = builtins.__import__(name, scope, local, names, level)
        if name in _PACKAGES and names:
            return SimpleNamespace(**{n: self.module(f"{name}.{n}") for n in names})
        return self.module(name) if names and name.startswith("reference.") else real


def _call_wrong(wrong: Forward, layer: nn.Module, right: Right, x: Tensor) -> Tensor:
    out: Tensor = wrong(layer, x, right)
    return out


def _module(file: str) -> str:
    return next(f"{package}.{file}" for package in _PACKAGES if find_spec(f"{package}.{file}"))


def _source(name: str) -> str:
    import_module(name)  # dataclasses of the copy look up their module in sys.modules
    return inspect.getsource(sys.modules[name])
