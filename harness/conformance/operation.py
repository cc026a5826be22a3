"""An Operation, and an implementation of it as the subject of a check."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from harness.conformance.comparison.tolerance_policies import Judgement
from harness.conformance.normal_noise import normal_noise
from harness.errors import plural

if TYPE_CHECKING:
    from harness.conformance.case import Case

_T = TypeVar("_T")
_KEPT = 4
"""Number of judgements that a KnownResults keeps. It drops older ones."""
Arguments = dict[str, Any]
"""Keyword arguments of a call: tensors, numbers, dtypes, and lists of them."""
Judge = Callable[[Mapping[str, Tensor], Arguments], tuple[Judgement, str]]


@dataclass(frozen=True)
class Operation:
    """A kernel-level function such as `nf4_dequantize`, with its reference and the rules to draw arguments and judge
    outputs.
    """

    name: str
    outputs: tuple[str, ...]
    """Names of the outputs, in order."""
    arguments: Callable[..., Arguments]
    """Function that draws the arguments of one case: (dtype, generator, **case) -> keyword arguments of a call."""
    reference: Callable[..., object]
    """The correct function. The harness calls it in the case's dtype, and also with float64 instead of that dtype."""
    differentiable: tuple[str, ...] = ()
    """Names of the arguments whose gradients are compared."""
    inputs: tuple[str, ...] = ()
    """Names of the arguments that are also tried at other magnitudes; see `comparison.magnitudes`."""
    rounded_once: tuple[str, ...] = ()
    """Names of the outputs that are computed in float32 and rounded once; the check `rounded_once` judges them."""
    rounded_once_in_16_bits: tuple[str, ...] = ()
    """Names of further outputs that `rounded_once` judges in 16 bits only. In float32, each operation of theirs rounds."""
    never_zero: tuple[str, ...] = ()
    """Names of the arguments that are never zero beside the other arguments of a case, e.g. a basis of orthonormal columns.
    The check `calls` makes any other argument zero."""
    without_norm: Callable[..., object] | None = None
    """For a step that is scaled by the norm of a whole tensor: a function with the same arguments and outputs, but without
    the norm. An implementation may use 1 in the place of a norm that is NaN, so `nonfinite` requires a NaN only where this
    function returns one. None: where the reference returns one."""
    unscaled: Callable[..., object] | None = None
    """For outputs with a factor per feature, such as DoRA's gain: a function with the same arguments and outputs, but
    without this factor. A program may multiply last, so an output may be infinite where this function overflows."""
    judge: Judge | None = None
    """Function that judges the outputs: (outputs of the subject, arguments) -> Judgement and a text with details.

    If None, every output must be as close to the float64 reference as the policy `noise-floor` demands.
    """
    codes: Judge | None = None
    """Function like `judge` that judges only the outputs that hold quantisation codes, for the check `output_codes`.
    None if the Operation has no such outputs."""

    def named(self, returned: object) -> dict[str, Tensor]:
        """Map the names of the outputs to the tensors that a call returned.

        A single output is returned alone. Raises TypeError for a tuple around a single output, for a wrong number of
        outputs, and for an output that is not a tensor.
        """
        several = (returned,) if len(self.outputs) == 1 else returned
        if not isinstance(several, tuple | list) or len(several) != len(self.outputs):
            got = plural(len(several), "output") if isinstance(several, tuple | list) else type(several).__name__
            raise TypeError(f"{self.name} should return {', '.join(self.outputs)}; got {got}")
        for name, one in zip(self.outputs, several, strict=True):
            if not isinstance(one, Tensor):
                raise TypeError(f"{self.name}: {name} should be a tensor; got {type(one).__name__}")
        return dict(zip(self.outputs, several, strict=True))


class KnownResults:
    """Cache for the arguments of one case. It holds the reference's results and judgements, which several checks need.

    The implementation never gets the cached tensors or the original arguments. It is called with copies.
    """

    def __init__(self) -> None:
        self._of_reference: dict[Hashable, dict[str, Tensor]] = {}
        self._judged: deque[tuple[str, Case, dict[str, Tensor], tuple[Judgement, str]]] = deque(maxlen=_KEPT)

    def once(self, name: Hashable, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Return the reference's result that is cached under `name`. The first call gets it from `compute`."""
        if name not in self._of_reference:
            self._of_reference[name] = compute()
        return self._of_reference[name]

    def judgement(
        self, rule: str, case: Case, outputs: dict[str, Tensor], judge: Callable[[], tuple[Judgement, str]]
    ) -> tuple[Judgement, str]:
        """Return the judgement of `outputs` by `rule`.

        If this rule has judged outputs with the same bits in the same case, return the earlier judgement. Otherwise,
        call `judge`.
        """
        for known_rule, known_case, known, verdict in self._judged:
            if known_rule == rule and known_case is case and _same_bits(outputs, known):
                return verdict
        verdict = judge()
        self._judged.append((rule, case, {name: t.detach().clone() for name, t in outputs.items()}, verdict))
        return verdict


def _same_bits(some: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> bool:
    return some.keys() == others.keys() and all(
        (one.dtype, one.shape, one.device) == (other.dtype, other.shape, other.device)
        and torch.equal(*(_bytes(t) for t in (one, other)))
        for one, other in ((some[name], others[name]) for name in some)
    )


def _bytes(tensor: Tensor) -> Tensor:
    # A tensor of one element is contiguous whatever its stride, but only a stride of 1 can be viewed as bytes.
    flat = tensor.detach().clone(memory_format=torch.contiguous_format).flatten()
    return flat.view(torch.uint8)


@dataclass(frozen=True)
class OperationSubject:
    """An implementation of an Operation, and the arguments of one case."""

    operation: Operation
    function: Callable[..., object]
    dtype: str
    arguments: Arguments
    another: Callable[[], Arguments]
    """Function that draws arguments with the same shapes but other values."""
    known: KnownResults = field(default_factory=KnownResults, init=False, repr=False, compare=False)
    """Cache of results for these arguments. A copy made by `dataclasses.replace` starts with an empty cache."""

    @property
    def method(self) -> str:
        """The Operation's name. Check ids contain it in the place of a Method's name."""
        return self.operation.name

    @property
    def device(self) -> torch.device:
        """The device of the arguments."""
        return next(one.device for one in tree_leaves(self.arguments) if isinstance(one, Tensor))

    def call(self, **changed: Any) -> dict[str, Tensor]:
        """Call the implementation on clones of the arguments, and map the names of the outputs to the results.

        changed: arguments that replace those of the case.
        """
        return self.operation.named(self.function(**{**cloned(self.arguments), **changed}))


def cloned(value: _T, dtypes: Mapping[torch.dtype, torch.dtype] | None = None) -> _T:
    """Return a copy of the arguments in which every tensor is cloned.

    dtypes: maps a dtype to its replacement, for tensors and for arguments that are dtypes. Tensors of other dtypes keep
    their dtype. For example, in a bfloat16 case the absmax stays float32, because an absmax is float32 by definition.
    """
    become = dtypes or {}

    def clone(one: object) -> object:
        if isinstance(one, torch.dtype):
            return become.get(one, one)
        if not isinstance(one, Tensor):
            return one
        copy = one.detach().clone(memory_format=torch.preserve_format)
        return copy.to(become.get(copy.dtype, copy.dtype))

    return mapped(value, clone)


def mapped(value: _T, change: Callable[[object], object]) -> _T:
    """Return a copy of nested dicts, lists and tuples, with `change` applied to each item that is none of these.

    A tensor that occurs several times is changed once, and the copy has the result at all of its places.
    """
    return cast("_T", _mapped(value, change, {}))


def _mapped(value: object, change: Callable[[object], object], known: dict[int, object]) -> object:
    # No closure that calls itself: such a cycle would keep the tensors until Python collects garbage.
    if isinstance(value, dict):
        return {key: _mapped(one, change, known) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_mapped(one, change, known) for one in value)
    if not isinstance(value, Tensor):
        return change(value)
    if id(value) not in known:
        known[id(value)] = change(value)
    return known[id(value)]


def moved(value: _T, device: torch.device) -> _T:
    """Return a copy of nested dicts, lists and tuples, with every tensor moved to `device`."""
    return mapped(value, lambda one: one.to(device) if isinstance(one, Tensor) else one)


def draw(generator: torch.Generator, dtype: torch.dtype, *shape: int, spread: float = 1.0) -> Tensor:
    """Return normal noise of this shape, with standard deviation `spread`. Every dtype sees the same numbers."""
    return normal_noise(shape, generator).mul_(spread).to(dtype)
