"""Checks of DoRA: magnitudes, and rows of zeros."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from harness.conformance.case import Case
from harness.conformance.checks import check
from harness.conformance.comparison.check_results import from_problems, judged, prefix_tensor, skipped
from harness.conformance.comparison.inputs import inputs
from harness.conformance.comparison.layer_comparison import observe_with_reference
from harness.conformance.comparison.tolerance_policies import noise_floor, worst_of
from harness.conformance.subject import DTYPES, Subject, load
from harness.methods.module_copy import copied
from harness.records.record import CheckResult
from reference.dora import norms
from reference.shared.layers import Convolution, as_stored, device_of, features_in_out, floating_dtype


@check()
def check_norm(subject: Subject, case: Case) -> CheckResult:
    """Every row of DoRA's merged weight has the norm |m|, and m starts as the row norms of the base weight.

    W' = m (W0 + s B A) / ||W0 + s B A||  (DoRA, eq. 5). If the config asks for one magnitude per input, the same holds
    for columns in place of rows.
    """
    fresh = case.attach_again()
    if fresh is None or not fresh.adapted.can_merge:
        return skipped(subject, case, "norm", "the case cannot attach again and merge")
    per, found = subject.config.per, []
    bases = {path: fresh.original_base(path) for path in fresh.adapted.layers}
    for path, base in bases.items():
        W0 = base.weight.flatten(1) if isinstance(base, Convolution) else fresh.original_weight(path)
        magnitudes = fresh.tensors_of(path)["m"].detach().flatten(), norms(W0.double(), per), norms(W0, per)
        start, truth, rounded = ({"m at the start": m} for m in magnitudes)
        found.append(prefix_tensor(path, noise_floor(start, truth, rounded, subject.dtype, case.factor("norm"))))
    load(fresh.adapted, subject.adapted.tensors(), subject.state())
    twins = {path: subject.reference(path, subject.dtype) for path in fresh.adapted.layers}
    fresh.adapted.merge()
    for path, twin in twins.items():
        twin.adapted.merge()
        merged, right = fresh.model.get_submodule(path), twin.adapted.model.get_submodule("layer")
        have, want = _matrix(merged, bases[path]), _matrix(right, bases[path])
        if have is None or want is None:
            continue  # the check `merge` compares its outputs
        mine, rounded = ({"merged norm": norms(W.double(), per)} for W in (have, want))
        truth = {"merged norm": subject.tensors_of(path)["m"].detach().flatten().double().abs()}
        found.append(prefix_tensor(path, noise_floor(mine, truth, rounded, subject.dtype, case.factor("norm"))))
    return judged(subject, case, "norm", worst_of(found, found[0].policy))


@check(depends_on_sizes=False)
def check_zero_rows(subject: Subject, case: Case) -> CheckResult:
    """A row of zeros in DoRA's base weight gives a row of zeros in W', and its row of B gets no gradient.

    Pruned models have such rows. If the config asks for one magnitude per input, the check tries a column of zeros. A
    row of zeros has no direction: at the start its norm and its m are 0. First, outputs and gradients must be finite.
    Then they must equal the reference's, within the noise floor.
    """
    if case.attach_fresh is None or subject.original.model is None:
        return skipped(subject, case, "zero_rows", "the case cannot attach again")
    pruned, problems, found = copied(subject.original.model), [], []
    with torch.no_grad():
        for base in map(pruned.get_submodule, subject.adapted.layers):
            weight = as_stored(base, base.get_parameter("weight"))  # a view (E, D)
            weight.select(0 if subject.config.per == "output" else 1, 0).zero_()
    fresh = case.attach_fresh(model=pruned)
    for index, (path, layer) in enumerate(fresh.adapted.layers.items()):
        with torch.no_grad():
            fresh.tensors_of(path)["m"].flatten()[0] = 0
        x, dy = inputs(fresh.original_base(path), case.tokens, DTYPES[fresh.dtype], case.generator(index))
        mine, truth, draws = observe_with_reference(fresh, path, layer, x, dy)
        problems += [f"{path}: {name} is not finite" for name, t in mine.items() if not bool(t.isfinite().all())]
        found.append(prefix_tensor(path, noise_floor(mine, truth, draws, fresh.dtype, case.factor("zero_rows"))))
    if problems:
        return from_problems(subject, case, "zero_rows", problems)
    return judged(subject, case, "zero_rows", worst_of(found, found[0].policy))


@torch.no_grad()
def _matrix(layer: nn.Module, base: Any) -> Tensor | None:
    """Return the weight matrix (E, D) that a merged layer applies, computed from its outputs for the unit vectors.

    base: the layer that was adapted. For an embedding, the matrix is the transposed table. For a convolution of torch.nn, it
    is the kernel with one row per output channel. If `layer` is another convolution, return None, because outputs do not
    show its kernel.
    """
    layer.eval()
    if isinstance(base, Convolution):
        return layer.weight.detach().flatten(1) if isinstance(layer, Convolution) else None
    if isinstance(base, nn.Embedding):
        table: Tensor = layer(torch.arange(base.num_embeddings, device=base.weight.device))
        return table.T / getattr(base, "embed_scale", 1.0)
    unit = torch.eye(features_in_out(base)[0], dtype=floating_dtype(layer), device=device_of(layer))
    outputs: Tensor = layer(unit) - layer(torch.zeros_like(unit[:1]))
    return outputs.T
