"""The Methods there are, read from the source of `reference/` without importing it (and so without torch).

A module of `reference/` that has a `PAPER` is a Method; nobody keeps a list.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer

_REFERENCE = Path(__file__).resolve().parents[2] / "reference"
_TYPES = {"int": int, "float": float, "bool": bool, "str": str, "tuple[str, ...]": tuple}
TARGET_WORDS = frozenset({"attention", "all-linear"})
"""What a suite may write for a list of layers; `reference.shared.layers.WORDS` says what they stand for."""
_CALLED = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "a word",
    "tuple[str, ...]": "a list of words",
}


FieldProblem = tuple[tuple[str | int, ...], str, str]
"""Where in what was looked at, what is wrong, and the mend."""


class Adapted(Protocol):
    """What `attach(model, config, generator)` of a Method or of an Implementation returns.

    layers: path to the adapted layer. can_merge: whether `merge` folds anything in.
    """

    model: nn.Module
    layers: dict[str, Any]
    can_merge: bool

    def tensors(self) -> dict[str, Tensor]:
        """Map the Method's canonical names to the trainable tensors."""

    def state(self) -> dict[str, Tensor]:
        """Map canonical names to the tensors that the Method made and does not train (PiSSA's residual, VeRA's A and B)."""

    def parameters(self) -> list[nn.Parameter]:
        """List what trains."""

    def regularizer(self) -> Tensor | None:
        """Return the term that the Method adds to the loss (AdaLoRA's orthogonality), or None."""

    def optimizer(self, lr: float, weight_decay: float) -> Optimizer | None:
        """Return the Method's own optimizer, or None to leave the choice to the caller.

        One that can have moments in 8 bits takes a further argument `bits`, 8 or 32 (the default).
        """

    def after_step(self, step: int) -> None:
        """Do what the Method does between optimizer steps; `step` counts from 1."""

    def merge(self) -> None:
        """Fold the adapter into the weights."""

    def unmerge(self) -> None:
        """Undo `merge`."""

    def detach(self) -> None:
        """Put the model back as it was before `attach`."""


@dataclass(frozen=True)
class FieldInfo:
    """One knob of a Method's Config.

    type: `int`, `float`, `bool`, `str` or `tuple[str, ...]`. least, most, choices: None where there is no bound. later: it
    came after the first published Records, so at its default it stands in no Cell, and an old Cell keeps its id.
    """

    type: str
    default: Any
    least: float | None = None
    most: float | None = None
    choices: tuple[Any, ...] | None = None
    later: bool = False

    @property
    def is_list(self) -> bool:
        """Whether one value of this field is a list."""
        return self.type.startswith("tuple")

    @property
    def called(self) -> str:
        """The type in the words of a suite's author."""
        return _CALLED[self.type]

    @property
    def hint(self) -> str:
        """What to write instead of a value that is wrong."""
        words = f"; a word for layers is {' or '.join(sorted(TARGET_WORDS))}" if self.is_list else ""
        return f"the default is {self.shown_default}{words}"

    @property
    def shown_default(self) -> str:
        """The default as a suite would write it."""
        if self.is_list:
            return f"[{', '.join(self.default)}]"
        return str(self.default).lower() if self.type == "bool" else str(self.default)

    def resolved(self, value: Any, folder: Path) -> Any:
        """Return the value that a suite in `folder` means: here the value itself."""
        return value

    def misfits(self, value: Any, kind: str) -> Iterator[FieldProblem]:
        """Yield why a legible value is not for a model of this kind (`causal`, `encoder`)."""
        yield from ()

    def is_legible(self, value: Any) -> bool:
        """Say whether a value, be it right or wrong, tells enough to go on with; here what is right."""
        return not self.problem(value)

    def canonical(self, value: Any) -> Any:
        """Return the one spelling of a valid value (`16` for a float becomes 16.0), as JSON can hold it.

        None stands for the default of a later knob, which stands in no Cell.
        """
        if self.later and value == self.default:
            return None
        if self.is_list:
            return [value] if isinstance(value, str) else list(value)
        return float(value) if self.type == "float" else value

    def problems(self, value: Any) -> Iterator[FieldProblem]:
        """Yield all that is wrong with a value."""
        if what := self.problem(value):
            yield (), what, self.hint

    def problem(self, value: Any) -> str:
        """Say what is wrong with a value, or return an empty string."""
        if self.is_list:
            words = isinstance(value, (list, tuple)) and value and all(isinstance(v, str) and v for v in value)
            words = words or (isinstance(value, str) and value in TARGET_WORDS)
            return "" if words else f"must be {self.called}, got {value!r}"
        wanted: Any = (int, float) if self.type == "float" else _TYPES[self.type]
        # bool is an int in Python, but not in anybody's suite.
        if not isinstance(value, wanted) or (isinstance(value, bool) and self.type != "bool"):
            return f"must be {self.called}, got {value!r}"
        if isinstance(value, float) and not math.isfinite(value):
            return f"must be finite, got {value!r}"
        if self.choices is not None and value not in self.choices:
            return f"must be one of {', '.join(map(str, self.choices))}; got {value!r}"
        if self.least is not None and value < self.least:
            return f"must be at least {self.least:g}, got {value!r}"
        if self.most is not None and value > self.most:
            return f"must be at most {self.most:g}, got {value!r}"
        return ""


@dataclass(frozen=True)
class MethodInfo:
    """A Method as its file in `reference/` describes it.

    deviations: (topic, what the paper says, what we do, why), as in the file. about_fields: what each knob means. factors:
    the letters of its trained low-rank factors. optimizer: the name of an optimizer of its own; empty if it has none.
    optimizers: which of those that a suite may choose that one can be. trains_weights: whether it trains the model's own
    weights, which a quantised base cannot have.
    """

    name: str
    summary: str
    paper: str
    deviations: tuple[tuple[str, ...], ...]
    fields: dict[str, FieldInfo]
    about_fields: str
    path: Path
    factors: tuple[str, ...] = ()
    optimizer: str = ""
    optimizers: tuple[str, ...] = ("adamw",)
    trains_weights: bool = False


def methods(folder: Path = _REFERENCE) -> dict[str, MethodInfo]:
    """Read every Method in `folder`, sorted by name."""
    read = (_method(path, path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.py")))
    return {info.name: info for info in read if info is not None}


@cache  # a claim file asks once for each of its rows
def _method(path: Path, source: str) -> MethodInfo | None:
    module = ast.parse(source, filename=str(path))
    constants = {
        target.id: node.value
        for node in module.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    if "PAPER" not in constants:
        return None
    config = next((n for n in module.body if isinstance(n, ast.ClassDef) and n.name == "Config"), None)
    return MethodInfo(
        name=path.stem,
        summary=(ast.get_docstring(module) or "").partition("\n")[0],
        paper=ast.literal_eval(constants["PAPER"]),
        deviations=ast.literal_eval(constants["DEVIATIONS"]) if "DEVIATIONS" in constants else (),
        fields=dict(map(_field, _annotated(config))) if config else {},
        about_fields=(ast.get_docstring(config) or "").partition("\n")[2].strip() if config else "",
        path=path,
        factors=ast.literal_eval(constants["FACTORS"]) if "FACTORS" in constants else (),
        optimizer=ast.literal_eval(constants["OPTIMIZER"]) if "OPTIMIZER" in constants else "",
        optimizers=ast.literal_eval(constants["OPTIMIZERS"]) if "OPTIMIZERS" in constants else ("adamw",),
        trains_weights="TRAINS_WEIGHTS" in constants,
    )


def _annotated(config: ast.ClassDef) -> list[ast.AnnAssign]:
    return [node for node in config.body if isinstance(node, ast.AnnAssign)]


def _field(node: ast.AnnAssign) -> tuple[str, FieldInfo]:
    name, kind = ast.unparse(node.target), ast.unparse(node.annotation)
    if kind not in _TYPES:
        raise TypeError(f"Config.{name}: a suite cannot write a {kind}; use one of {', '.join(_TYPES)}")
    if node.value is None:
        raise TypeError(f"Config.{name}: needs a default, so that a suite may leave it out")
    if not isinstance(node.value, ast.Call):
        return name, FieldInfo(kind, ast.literal_eval(node.value))
    given = {keyword.arg: ast.literal_eval(keyword.value) for keyword in node.value.keywords}
    limits = given.get("metadata", {})
    choices = limits.get("choices")
    return name, FieldInfo(
        kind,
        given["default"],
        limits.get("least"),
        limits.get("most"),
        tuple(choices) if choices is not None else None,
        limits.get("later", False),
    )
