"""Read the Methods from the source of `reference/`, without importing it, so that torch is not needed.

A file of `reference/` with `SPEC = ReferenceSpec(...)` is a Method. There is no other list of Methods.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from harness.errors import closest_match
from reference.spec import Deviation, ReferenceSpec

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer

_REFERENCE = Path(__file__).resolve().parents[2] / "reference"
_TYPES = {
    "int": (int, "a whole number"),
    "float": (float, "a number"),
    "bool": (bool, "true or false"),
    "str": (str, "a word"),
    "tuple[str, ...]": (tuple, "a list of words"),
}
"""Annotation of a field -> Python type of its values, and name of the type in messages to authors of suites."""
_SPEC_CLASSES = {kind.__name__: kind for kind in (ReferenceSpec, Deviation)}
TARGET_WORDS = frozenset({"attention", "all-linear"})
"""Words that a suite may write instead of a list of layers; `reference.shared.layers.WORDS` defines them."""

FieldProblem = tuple[tuple[str | int, ...], str, str]
"""A problem of a value, as a tuple: the keys that lead to it inside the value, a description, and a hint."""


class Adapted(Protocol):
    """An adapted model. `attach(model, config, generator)` of every Method and Implementation returns one."""

    model: nn.Module
    """The model that was passed to `attach`."""
    layers: dict[str, Any]
    """Adapted layers, by module path."""
    can_merge: bool
    """True if `merge` can fold the adapter into the weights. Also False if there is no adapter. If it is False, `merge` may
    raise NotImplementedError."""

    def tensors(self) -> dict[str, Tensor]:
        """Map the Method's canonical names, `<path>.<letter>`, to the trainable tensors.

        The model's state_dict has these tensors, unless hooks instead of modules hold them. Each call looks them up, because
        `load_state_dict(assign=True)` gives the model new parameters. So does each call of `parameters`.
        """

    def state(self) -> dict[str, Tensor]:
        """Map `<path>.<name>` to tensors that the Method created and does not train (PiSSA's residual, VeRA's A and B).

        The model's state_dict has these tensors, except constants that follow from the config alone (VeRA's A and B). Each
        call looks them up, as `tensors` does.
        """

    def parameters(self) -> list[nn.Parameter]:
        """List the parameters that train."""

    def regularizer(self) -> Tensor | None:
        """Return the scalar that the Method adds to the loss (AdaLoRA's orthogonality), or None."""

    def optimizer(self, lr: float, weight_decay: float) -> Optimizer | None:
        """Return the Method's own optimizer, or None if the caller chooses.

        An optimizer with 8-bit moments takes a third argument `bits`, 8 or 32 (the default).
        """

    def after_step(self, step: int) -> None:
        """Do the Method's work after an optimizer step, such as pruning ranks. `step` counts from 1."""

    def merge(self) -> None:
        """Fold the adapter into the weights. If it is merged already, do nothing.

        `merge`, `unmerge` and `detach` do not change the mode, training or eval: a mode that is set after `merge` stays.
        """

    def unmerge(self) -> None:
        """Undo `merge`. If nothing is merged, do nothing."""

    def detach(self) -> None:
        """Restore the layers of the model as they were before `attach`. What `attach` has frozen stays frozen.

        A merged adapter is detached, too. The program may then put the adapted layers back into the model and into `layers`,
        and all functions must work again. Before that, it calls none of them.
        """


@dataclass(frozen=True)
class FieldInfo:
    """A field of a Method's Config."""

    type: str
    """Annotation in the source: `int`, `float`, `bool`, `str` or `tuple[str, ...]`."""
    default: Any
    minimum: float | None = None
    """Smallest valid value. None means that there is no bound."""
    maximum: float | None = None
    """Largest valid value. None means that there is no bound."""
    choices: tuple[Any, ...] | None = None
    """Valid values. None means that there is no restriction."""
    omit_default: bool = False
    """True if a Cell omits the field when it has its default. Such a field was added after Records were published, and must
    not change their cell_ids."""
    opt_in: bool = False
    """True if a value other than the default is passed only to implementations that name the field in `offers`. Older
    plug-ins would ignore such a field, because it was added after they were written."""
    about: str = ""
    """Description of the field. It is the string below the field in the source."""

    @property
    def is_list(self) -> bool:
        """True if the value of this field is a list of words."""
        return self.type.startswith("tuple")

    @property
    def type_label(self) -> str:
        """Name of the field's type, for authors of suites."""
        return _TYPES[self.type][1]

    @property
    def hint(self) -> str:
        """Hint for an invalid value."""
        words = f"; a word for layers is {' or '.join(sorted(TARGET_WORDS))}" if self.is_list else ""
        return f"the default is {self.shown_default}{words}"

    @property
    def shown_default(self) -> str:
        """The default value, as an author writes it in a suite."""
        if self.is_list:
            return f"[{', '.join(self.default)}]"
        return str(self.default).lower() if self.type == "bool" else str(self.default)

    def resolved(self, value: Any, folder: Path) -> Any:
        """Return the value. A subclass may replace a file name by the content of the file; this class does not.

        folder: folder of the suite, to which file names are relative.
        """
        return value

    def misfits(self, value: Any, kind: str) -> Iterator[FieldProblem]:
        """Yield the reasons why a valid value does not suit a model of this kind (`causal`, `encoder`)."""
        yield from ()

    def is_well_formed(self, value: Any) -> bool:
        """Return whether `canonical` and `misfits` can take a value. In this class, only a valid value is well-formed."""
        return not self.problem(value)

    def canonical(self, value: Any) -> Any:
        """Return the JSON form of a valid value. For example, `16` for a float becomes 16.0.

        Return None for the default of a field with `omit_default`, which a Cell leaves out.
        """
        if self.omit_default and value == self.default:
            return None
        if self.is_list:
            return [value] if isinstance(value, str) else list(value)
        return float(value) if self.type == "float" else value

    def problems(self, value: Any) -> Iterator[FieldProblem]:
        """Yield every problem of a value."""
        if text := self.problem(value):
            close = closest_match(value, TARGET_WORDS) if self.is_list and isinstance(value, str) else ""
            yield (), text, f"did you mean `{close}`?" if close else self.hint

    def problem(self, value: Any) -> str:
        """Return the first problem of a value, or an empty string."""
        if self.is_list:
            words = isinstance(value, (list, tuple)) and value and all(isinstance(v, str) and v for v in value)
            words = words or (isinstance(value, str) and value in TARGET_WORDS)
            return "" if words else f"must be {self.type_label}, got {value!r}"
        expected: Any = (int, float) if self.type == "float" else _TYPES[self.type][0]
        # bool is a subclass of int in Python; in a suite `true` is no number.
        if not isinstance(value, expected) or (isinstance(value, bool) and self.type != "bool"):
            return f"must be {self.type_label}, got {value!r}"
        if isinstance(value, float) and not math.isfinite(value):
            return f"must be finite, got {value!r}"
        if self.choices is not None and value not in self.choices:
            return f"must be one of {', '.join(map(str, self.choices))}; got {value!r}"
        if self.minimum is not None and value < self.minimum:
            return f"must be at least {in_digits(self.minimum)}, got {value!r}"
        if self.maximum is not None and value > self.maximum:
            return f"must be at most {in_digits(self.maximum)}, got {value!r}"
        return ""


@dataclass(frozen=True)
class MethodInfo:
    """A Method as its file in `reference/` describes it."""

    name: str
    """Name of the Method: the name of its file without the suffix."""
    summary: str
    """First line of the docstring of the Method's file."""
    spec: ReferenceSpec
    fields: dict[str, FieldInfo]
    """Fields of its `Config`, by name."""
    path: Path
    """Path of the Method's file."""


def in_digits(number: float) -> str:
    """Return a whole number with all its digits, and any other number with up to 10."""
    return str(number) if isinstance(number, int) else f"{number:.10g}"


def methods(folder: Path = _REFERENCE) -> dict[str, MethodInfo]:
    """Read every Method in `folder`; return them by name, sorted. Raises TypeError for a malformed SPEC or Config."""
    read = (_method(path, path.stat().st_mtime_ns) for path in sorted(folder.glob("*.py")))
    return {info.name: info for info in read if info is not None}


def method_info(name: str) -> MethodInfo:
    """Read one Method, and return it. Raises KeyError for an unknown name."""
    path = _REFERENCE / f"{name}.py"
    info = _method(path, path.stat().st_mtime_ns) if path.is_file() else None
    if info is None:
        raise KeyError(name)
    return info


@cache  # claim files call it once per row
def _method(path: Path, changed_ns: int) -> MethodInfo | None:  # a file that has changed is read again
    module = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    spec = next((node.value for node in module.body if isinstance(node, ast.Assign) and _is_spec(node)), None)
    if spec is None:
        return None
    config = next((n for n in module.body if isinstance(n, ast.ClassDef) and n.name == "Config"), None)
    try:
        evaluated = _evaluated(spec)
        if not isinstance(evaluated, ReferenceSpec):
            raise TypeError("SPEC must be a ReferenceSpec(...)")  # noqa: TRY301
        fields = dict(_fields(config.body)) if config else {}
    except (TypeError, ValueError) as error:
        raise TypeError(f"{path}: {error}") from error
    summary = (ast.get_docstring(module) or "").partition("\n")[0]
    return MethodInfo(path.stem, summary, evaluated, fields, path)


def _is_spec(node: ast.Assign) -> bool:
    return any(isinstance(target, ast.Name) and target.id == "SPEC" for target in node.targets)


def _evaluated(node: ast.expr) -> Any:
    """Return the value of an expression in a Method's source, without importing this source.

    The expression may have literals, and calls of the classes in `reference/spec.py`.
    """
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _SPEC_CLASSES:
        arguments = {str(keyword.arg): _evaluated(keyword.value) for keyword in node.keywords}
        return _SPEC_CLASSES[node.func.id](*map(_evaluated, node.args), **arguments)
    if isinstance(node, ast.Tuple):
        return tuple(map(_evaluated, node.elts))
    return ast.literal_eval(node)


def _fields(body: Sequence[ast.stmt]) -> Iterator[tuple[str, FieldInfo]]:
    """Yield the name and the FieldInfo of each annotated field; the string literal below a field describes it."""
    for node, below in zip(body, [*body[1:], None], strict=True):
        if isinstance(node, ast.AnnAssign):
            yield ast.unparse(node.target), _field(node, _text(below))


def _text(node: ast.stmt | None) -> str:
    value = node.value if isinstance(node, ast.Expr) else None
    return " ".join(value.value.split()) if isinstance(value, ast.Constant) and isinstance(value.value, str) else ""


def _field(node: ast.AnnAssign, about: str) -> FieldInfo:
    name, kind = ast.unparse(node.target), ast.unparse(node.annotation)
    if kind not in _TYPES:
        raise TypeError(f"Config.{name}: a suite cannot write a {kind}; use one of {', '.join(_TYPES)}")
    if node.value is None:
        raise TypeError(f"Config.{name}: needs a default, so that a suite may leave it out")
    if not isinstance(node.value, ast.Call):
        return FieldInfo(kind, ast.literal_eval(node.value), about=about)
    options = {keyword.arg: ast.literal_eval(keyword.value) for keyword in node.value.keywords}
    return FieldInfo(kind, options["default"], **options.get("metadata", {}), about=about)
