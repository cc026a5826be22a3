"""Judgement of a copy of an adapted layer in another dtype, and of layers beside one that has another dtype."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from harness.conformance.case import Case
from harness.conformance.comparison.call_forms import ROWS, owns, tensors_of_copy
from harness.conformance.comparison.check_results import named_if_raised
from harness.conformance.comparison.inputs import cast, inputs
from harness.conformance.comparison.layer_comparison import reference_runs
from harness.conformance.comparison.moved_numbers import perturbed
from harness.conformance.comparison.observations import observe
from harness.conformance.comparison.tolerance_policies import ROUNDED_SUMS, Judgement, exact, noise_floor, unchanged
from harness.conformance.subject import DTYPES, Subject, load
from harness.conformance.tolerance_constants import PERTURBED_DRAWS
from harness.errors import Unsupported
from harness.methods.module_copy import copied
from harness.methods.spec import method_info
from reference.shared.layers import floating_dtype

OTHER_DTYPE = {"float64": "float32", "float32": "bfloat16", "bfloat16": "float32", "float16": "float32"}
"""dtype of a layer -> dtype to which a copy of the layer is cast."""
_CODES = (torch.uint8, torch.int8)
"""dtypes of the codes of packed weights."""
COPY, BESIDE = "by a copy in {}", "beside a layer in {}"
"""Names of the two forms. `{}` stands for the name of the other dtype."""


def judge_copy(subject: Subject, case: Case) -> Iterator[tuple[str, str, Judgement]]:
    """Yield the path, the form's name and a judgement of a copy of the first layer that was cast to another dtype.

    Nothing is judged if the layer is packed, or if its tensors have several dtypes: an adapter may stay in float32.
    """
    path = next(iter(subject.adapted.layers), None)
    if path is None:
        return
    layer, tensors = subject.adapted.layers[path], subject.tensors_of(path)
    x, dy = inputs(subject.original_base(path), ROWS, DTYPES[subject.dtype], case.generator(720))
    own = subject.reference(path, subject.dtype)
    rounded_alike = all(t.dtype == DTYPES[subject.dtype] for t in tensors.values())
    if path in subject.packed or not rounded_alike or not owns(layer, tensors):
        return
    other = OTHER_DTYPE[subject.dtype]
    x_other, dy_other = cast(x, other), dy.to(DTYPES[other])

    def cast_copy(
        of: nn.Module, named: Mapping[str, Tensor], dtype: str, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """Round a copy of the layer `of` to the dtype `other`, run it in `dtype`, and return output and gradients.

        generator: draws a move within the last place of `other` for each number of the layer and of its input.
        """
        made = copy.deepcopy(of).to(DTYPES[other])
        rounded = [t.dtype == DTYPES[other] for t in (*made.parameters(), *made.buffers())]
        made.to(DTYPES[dtype])
        named, given = tensors_of_copy(of, made, named), [cast(x_other, dtype), dy_other.to(DTYPES[dtype])]
        if generator is not None:
            with torch.no_grad():
                for tensor, is_rounded in zip((*made.parameters(), *made.buffers()), rounded, strict=True):
                    tensor.copy_(perturbed(tensor, other, generator) if is_rounded else tensor)
            given = [perturbed(t, other, generator) for t in given]
        return observe(made, named, *given, training=subject.trains_plainly)

    def draws() -> Iterator[dict[str, Tensor]]:
        yield cast_copy(own.layer, own.tensors, other)
        for seed in range(PERTURBED_DRAWS):  # in 16 bits, sums are not rounded
            dtype = other if other in ROUNDED_SUMS else "float64"
            yield cast_copy(own.layer, own.tensors, dtype, torch.Generator().manual_seed(seed))

    truth = cast_copy(own.layer, own.tensors, "float64")
    with named_if_raised(path, COPY.format(other)):
        mine = cast_copy(layer, tensors, other)
    verdict = noise_floor(mine, truth, draws(), other, case.factor("calls", other))
    yield path, COPY.format(other), verdict


def judge_constants(subject: Subject, case: Case) -> Iterator[tuple[str, str, Judgement]]:
    """Cast a freshly adapted model to another dtype. Yield a judgement of the tensors in its state that keep their dtype.

    These are the tensors that keep their dtype in the reference, such as the float32 constants of a packed weight: they keep
    their values, too. Yield the form's name as well; the path is empty.
    """
    fresh = case.attach_again() if any(t.dtype in _CODES for t in subject.state().values()) else None
    if fresh is None:
        return
    other = "float16" if subject.dtype == "bfloat16" else "bfloat16"
    truth = fresh.fresh_reference(fresh.dtype)
    truth.model.to(DTYPES[other])
    own, dtypes = fresh.state(), {name: t.dtype for name, t in truth.state().items() if t.is_floating_point()}
    before = {name: own[name].clone() for name in own.keys() & dtypes.keys() if dtypes[name] != DTYPES[other]}
    if not before:
        return
    with named_if_raised("", COPY.format(other)):
        fresh.model.to(DTYPES[other])
    yield "", COPY.format(other), unchanged({name: fresh.state()[name] for name in before}, before)


def judge_beside_another_dtype(subject: Subject, case: Case) -> Iterator[tuple[str, str, Judgement]]:
    """Attach to a model whose first adapted layer has another dtype, and judge the other layers.

    Yield the path, the form's name and a judgement of each. With the same tensors, these layers compute the same as in
    the subject, up to rounding: a program may compute neighbouring layers together if they have one dtype. Tensors that
    follow from the config alone, such as VeRA's A and B, are not copied from the subject. Packed weights are left out.
    """
    if subject.original.model is None or subject.packed:
        return
    model, other = copied(subject.original.model), OTHER_DTYPE[subject.dtype]
    model.get_submodule(next(iter(subject.bases))).to(DTYPES[other])
    try:
        mixed = case.attach_again(model=model)
    except Unsupported:
        return
    if mixed is None:
        return
    constants = method_info(subject.method).spec.start_from_config
    for index, path in enumerate(mixed.bases):
        if path not in subject.adapted.layers or floating_dtype(mixed.original_base(path)) != DTYPES[subject.dtype]:
            continue
        state = {n: t for n, t in subject.state().items() if n.rpartition(".")[2] not in constants}
        values = ({n: t for n, t in named.items() if n.startswith(f"{path}.")} for named in (subject.added(), state))
        load(mixed.adapted, *values)
        x, dy = inputs(subject.original_base(path), ROWS, DTYPES[subject.dtype], case.generator(index + 730))
        with named_if_raised(path, BESIDE.format(other)):
            mine, expected = (
                observe(one.adapted.layers[path], one.tensors_of(path), x, dy) for one in (mixed, subject)
            )
        verdict = exact(mine, expected)
        if not verdict.passed:
            truth, draws = reference_runs(subject, path, x, dy)
            verdict = noise_floor(mine, truth, draws, subject.dtype, case.factor("calls", subject.dtype))
        yield path, BESIDE.format(other), verdict
