"""Judge an Operation under autocast."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import partial

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from harness.conformance.case import Case
from harness.conformance.comparison.moved_numbers import perturbed
from harness.conformance.comparison.operation_call import map_floats, reference_outputs, without_overflows
from harness.conformance.comparison.tolerance_policies import Judgement, exact, noise_floor
from harness.conformance.operation import Arguments, OperationSubject, cloned
from harness.conformance.subject import DTYPES
from harness.conformance.tolerance_constants import PERTURBED_DRAWS

_PER_ROW = {"ids", "chosen", "weights"}
"""Names of arguments with one item per sequence or per row of `x`."""


def under_autocast(
    subject: OperationSubject, plain: Mapping[str, Tensor], case: Case
) -> Iterator[tuple[str, Judgement]]:
    """Yield each dtype of autocast in which the outputs differ from those without autocast, and a judgement of the outputs.

    A float32 Operation that has a gradient may compute products in 16 bits, or in float32 as before. It may also refuse
    arguments that autocast leaves in several dtypes. Wrong results fail. An output must have the same dtype for the first
    row of `x` alone as for all rows, because a model that generates tokens one by one would otherwise mix two dtypes.
    This is also tried with the other value of each switch, such as `training`. A dtype is left out if a row of an argument
    would overflow in it, or become subnormal. plain: the outputs without autocast.
    """
    if subject.dtype != "float32" or not subject.operation.differentiable:
        return
    truth, row = reference_outputs(subject, torch.float64), _first_row(subject.arguments)
    switched = [{name: not value} for name, value in subject.arguments.items() if isinstance(value, bool) and row]
    for dtype in ("bfloat16", "float16"):
        if not _fits(subject.arguments, DTYPES[dtype]):
            continue
        with torch.autocast(subject.device.type, DTYPES[dtype]):
            try:
                seen = subject.call()
                pairs = [(subject.call(**row), seen)] if row else []
            except RuntimeError:
                return
            for other in switched:
                with suppress(RuntimeError):  # another case judges what an implementation does with this value
                    pairs.append((subject.call(**other, **row), subject.call(**other)))
        yield from ((f"{dtype}, one row", one) for pair in pairs for one in _other_dtypes(*pair))
        if exact(seen, dict(plain)).passed:
            continue
        if case.magnitude != "normal" and any(not t.isfinite().all() for t in seen.values()):
            with torch.autocast(subject.device.type, DTYPES[dtype]):
                seen = without_overflows(subject, seen, truth)
        yield dtype, noise_floor(seen, truth, _plausible(subject, dtype), dtype, case.factor("calls", dtype))


def _fits(arguments: Arguments, dtype: torch.dtype) -> bool:
    """Return whether the largest number of each row is zero or normal in `dtype`, for every floating-point argument."""
    limits = torch.finfo(dtype)
    given = (t for t in tree_leaves(arguments) if isinstance(t, Tensor) and t.is_floating_point() and t.numel())
    largest = [t.detach().abs().amax(-1) if t.dim() else t.detach().abs() for t in given]
    return all(bool(((one == 0) | ((one >= limits.smallest_normal) & (one <= limits.max))).all()) for one in largest)


def _first_row(arguments: Arguments) -> Arguments:
    """Return the first row of the argument `x`, and of `mask` if there is one, as arguments with one row.

    Return {} if the Operation has no `x` with several rows, or if another argument may have an item per row.
    """
    x = arguments.get("x")
    if not isinstance(x, Tensor) or x.dim() < 2 or x[..., 0].numel() < 2 or arguments.keys() & _PER_ROW:
        return {}
    given = {"x": x, "mask": arguments.get("mask")}
    return {name: t.detach().flatten(0, -2)[:1].clone() for name, t in given.items() if t is not None}


def _other_dtypes(of_one: Mapping[str, Tensor], of_all: Mapping[str, Tensor]) -> Iterator[Judgement]:
    """Yield a failure for each output whose dtype for one row is not its dtype for all rows."""
    for name, y in of_one.items():
        if y.dtype != of_all[name].dtype:
            text = f"dtype {y.dtype}, should be {of_all[name].dtype} as for several rows"
            yield Judgement(False, None, None, name, text, "exact", 0)


def _plausible(subject: OperationSubject, dtype: str) -> Iterator[dict[str, Tensor]]:
    """Yield outputs that a correct program may give under autocast: those of the reference and, if they differ from its
    outputs without autocast, those for arguments that are moved by rounding errors of `dtype`.
    """

    def computed(arguments: Arguments) -> dict[str, Tensor]:
        with torch.autocast(subject.device.type, DTYPES[dtype]):
            return subject.operation.named(subject.operation.reference(**cloned(arguments)))

    rounded = computed(subject.arguments)
    yield rounded
    if not exact(rounded, reference_outputs(subject, torch.float32)).passed:
        for seed in range(PERTURBED_DRAWS):
            generator = torch.Generator().manual_seed(seed)
            yield computed(map_floats(subject.arguments, partial(perturbed, dtype=dtype, generator=generator)))
