"""Whether a layer, and the model, compute what the reference computes."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from harness.conformance import whole_model
from harness.conformance.case import Case
from harness.conformance.drawn import cast, inputs, takes_rows
from harness.conformance.observe import observe
from harness.conformance.results import at, judged, listed, skipped
from harness.conformance.subject import DTYPES, LARGEST_COPY, Subject
from harness.conformance.tolerance import Judgement, carried_noise, exact, noise_floor, perturbed, rows_within, worst_of
from harness.records import CheckResult
from harness.tolerances import CARRIED_FACTOR, DROPOUT_SIGMAS, PERTURBED_DRAWS

FEATURES = 32
"""Of so many features at least one is dropped and one kept in any token, but for one in some thousands."""


def check_identity(subject: Subject, case: Case) -> CheckResult:
    """At its start the adapted model computes what the base model computes.

    To the last bit, as where the update is exactly zero (LoRA: B = 0) and the base's own product is left alone; or within
    the noise floor around the base model in float64, since a kernel may sum in another order, and some starts cancel in
    exact arithmetic only (PiSSA: residual + s B A = W).
    """
    if case.inputs is None or case.base_output is None:
        return skipped(subject, case, "identity", "no whole-model input in this case")
    mine, base = {"logits": case.inputs()}, {"logits": case.base_output}
    if (same := exact(mine, base)).passed:
        return judged(subject, case, "identity", same, "to the last bit")
    if subject.original.model is None or case.forward is None:
        return skipped(
            subject, case, "identity", "not to the last bit, and the model was too large to be copied to float64"
        )
    with torch.no_grad():
        truth = {"logits": case.forward(whole_model.base(subject, "float64"))}
        # A start in this dtype may lose what the base loses in it, or what the reference's own start loses.
        start = {"logits": case.forward(whole_model.start(subject, subject.dtype))}
    verdict = noise_floor(mine, truth, [base, start], subject.dtype, case.factor("identity"))
    return judged(subject, case, "identity", verdict)


def check_forward(subject: Subject, case: Case) -> CheckResult:
    """The output of every adapted layer is the reference's, on the layer's own weights and a random input."""
    forward, gradient = _compare(subject, case)
    subject.beside = (case, gradient)
    return judged(subject, case, "forward", forward)


def check_gradient(subject: Subject, case: Case) -> CheckResult:
    """The gradients of every adapted layer, of its input and of each of its trainable tensors, are the reference's."""
    of, gradient = subject.beside or (None, None)
    subject.beside = None
    if gradient is None or of is not case:
        gradient = _compare(subject, case)[1]
    return judged(subject, case, "gradient", gradient)


def check_strides(subject: Subject, case: Case) -> CheckResult:
    """Output and gradients are the reference's also for an input that is a transposed view, a gradient that is one row
    expanded (as `y.sum(0)` sends it), and an input of no tokens at all.
    """
    found = []
    for index, (path, layer) in enumerate(subject.adapted.layers.items()):
        base = subject.original_base(path)
        if not takes_rows(base):
            continue
        x, dy = inputs(base, case.tokens, DTYPES[subject.dtype], case.generator(index))
        x, dy = x.T.contiguous().T, dy[:1].expand(dy.shape)
        for rows in (slice(None), slice(0, 0)):
            runs = _three(subject, path, layer, x[rows], dy[rows])
            found.append(at(path, noise_floor(*runs, subject.dtype, case.factor("strides"))))
    if not found:
        return skipped(subject, case, "strides", "the layers do not map rows to rows")
    return judged(subject, case, "strides", worst_of(found, found[0].policy))


def check_vector(subject: Subject, case: Case) -> CheckResult:
    """For a single vector (D,) the output is the reference's, of shape (E,), and so are the gradients."""
    found = []
    for index, (path, layer) in enumerate(subject.adapted.layers.items()):
        base = subject.original_base(path)
        if takes_rows(base):
            x, dy = inputs(base, 1, DTYPES[subject.dtype], case.generator(index))
            runs = _three(subject, path, layer, x[0], dy[0])
            found.append(at(path, noise_floor(*runs, subject.dtype, case.factor("vector"))))
    if not found:
        return skipped(subject, case, "vector", "the layers do not map rows to rows")
    return judged(subject, case, "vector", worst_of(found, found[0].policy))


def check_dropout(subject: Subject, case: Case) -> CheckResult:
    """In training mode each feature of the adapter's input is dropped with probability p, or scaled by 1/(1-p); the base
    sees all of it, and the backward pass uses the forward pass's mask. In eval mode nothing is dropped.

    Every token has one feature only, so its output must be one of two: the reference's with that feature kept, or with it
    dropped. That tells the mask, with which the reference's gradients are computed. How many are dropped is judged by the
    binomial distribution. Tokens of many features must not be dropped whole. No random numbers need agree.
    """
    p = getattr(subject.config, "dropout", 0.0)
    if not p:
        return skipped(subject, case, "dropout", "the config drops nothing")
    odd: list[str] = []
    dropped = total = 0
    for index, (path, layer) in enumerate(subject.adapted.layers.items()):
        base = subject.original_base(path)
        if not takes_rows(base):
            continue
        x, dy = inputs(base, max(case.tokens, 64), DTYPES[subject.dtype], case.generator(index))
        only = torch.zeros_like(x)
        rows = torch.arange(len(x), device=x.device)
        where = torch.randint(0, x.shape[-1], (len(x),), generator=case.generator(index + 1)).to(x.device)
        only[rows, where] = 1 + x.abs().amax(-1)
        mine = observe(layer, subject.tensors_of(path), only, dy, training=True)
        is_kept, is_dropped = (_rows_as(subject, path, mine["y"], only, mask) for mask in (1 / (1 - p), 0.0))
        if neither := int((~(is_kept | is_dropped)).sum()):
            odd.append(f"{path}: {neither} of {len(x)} outputs are those of neither a kept nor a dropped feature")
            continue
        total += int((is_kept ^ is_dropped).sum())
        dropped += int((is_dropped & ~is_kept).sum())
        if bool((is_kept ^ is_dropped).all()):
            mask = is_kept.double()[:, None] / (1 - p)
            truth, rounded = (_masked(subject, path, dtype, only, dy, mask) for dtype in ("float64", subject.dtype))
            for seen in (mine, truth, rounded):
                seen["grad x"] = seen["grad x"][rows, where]  # of the other features the mask is not known
            verdict = noise_floor(mine, truth, rounded, subject.dtype, case.factor("gradient"))
            if not verdict.passed:
                odd.append(f"{path}: with the forward pass's mask {verdict.tensor} is off by {verdict.error}")
            if x.shape[-1] >= FEATURES and (whole := _whole_tokens(subject, path, layer, x, dy, p)) > len(x) // 2:
                odd.append(f"{path}: {whole} of {len(x)} tokens are kept or dropped as a whole, not by the feature")
        again = noise_floor(*_three(subject, path, layer, x, dy), subject.dtype, case.factor("forward"))
        if not again.passed:
            odd.append(f"{path}: in eval mode {again.tensor} is off by {again.error} of {again.allowed}")
    spread = DROPOUT_SIGMAS * (total * p * (1 - p)) ** 0.5
    if not total and not odd:
        return skipped(subject, case, "dropout", "at this state the adapter adds nothing")
    if not odd and abs(dropped - p * total) > spread + 1:
        odd.append(f"{dropped} of {total} features were dropped, should be {p * total:.0f} +- {spread:.0f}")
    return listed(subject, case, "dropout", odd, f"{dropped} of {total} features dropped at p = {p:g}")


def check_step(subject: Subject, case: Case) -> CheckResult:
    """One optimizer step from an identical state moves every trainable tensor as the reference moves it.

    The optimizer is the Method's own, or AdamW with weight decay.
    """
    found = []
    for index, path in enumerate(subject.adapted.layers):
        x, dy = inputs(subject.original_base(path), case.tokens, DTYPES[subject.dtype], case.generator(index))
        runs = [(subject.adapted.layers[path], subject.tensors_of(path), subject.adapted, subject.dtype)]
        for dtype in ("float64", subject.dtype):
            twin = subject.reference(path, dtype)
            runs.append((twin.layer, twin.tensors, twin.adapted, dtype))
        moved = []
        for layer, tensors, adapted, dtype in runs:
            before = {n: t.detach().clone() for n, t in tensors.items()}
            gradients = observe(layer, tensors, cast(x, dtype), dy.to(DTYPES[dtype]))
            for name, tensor in tensors.items():
                tensor.grad = gradients.get(f"grad {name}")
            if before:
                # lr g / (|g| + eps): with a small eps the few elements whose gradient is near zero hold all of the
                # error, and two right programs may differ by any factor. (And 1e-8, the usual, is zero in float16.)
                optimizer = adapted.optimizer(1e-2, 0.1) or torch.optim.AdamW(
                    list(tensors.values()), lr=1e-2, weight_decay=0.1, eps=1.0
                )
                optimizer.step()
            moved.append({n: t.detach().clone() for n, t in tensors.items()})
            with torch.no_grad():
                for name, tensor in tensors.items():
                    tensor.copy_(before[name])
                    tensor.grad = None
        mine, truth, rounded = moved
        if truth:
            found.append(at(path, noise_floor(mine, truth, rounded, subject.dtype, case.factor("step"))))
    if not found:
        return skipped(subject, case, "step", "nothing trains")
    return judged(subject, case, "step", worst_of(found, found[0].policy))


def check_model(subject: Subject, case: Case) -> CheckResult:
    """The whole model gives the logits, and every trainable tensor the gradient, of a float64 copy of the model of before
    attaching that carries the reference's layers.
    """
    if case.forward is None:
        return skipped(subject, case, "model", "no whole-model input in this case")
    if subject.dtype == "float64":
        return skipped(subject, case, "model", "some models round to float32 inside, whatever their dtype")
    if subject.original.model is None:
        return skipped(subject, case, "model", f"a float64 copy is made up to {LARGEST_COPY:,} parameters")
    mine = whole_model.observe(subject.model, subject.adapted.tensors(), subject, case.forward)
    truth = whole_model.observe(*whole_model.reference(subject, "float64"), subject, case.forward)
    rounded = whole_model.observe(*whole_model.reference(subject, subject.dtype), subject, case.forward)
    factor = case.factors.get("model", CARRIED_FACTOR)
    return judged(subject, case, "model", carried_noise(mine, truth, rounded, subject.dtype, factor))


def _compare(subject: Subject, case: Case) -> tuple[Judgement, Judgement]:
    """Judge the outputs, and the gradients, of every layer; they are observed in one pass, as they are in training."""
    outputs: list[Judgement] = []
    gradients: list[Judgement] = []
    for index, (path, layer) in enumerate(subject.adapted.layers.items()):
        base = subject.original_base(path)
        x, dy = inputs(base, case.tokens, DTYPES[subject.dtype], case.generator(index))
        if takes_rows(base) and len(x) % 2 == 0:
            x, dy = (t.view(2, -1, t.shape[-1]) for t in (x, dy))  # a batch of sequences, as models send it
        runs = _three(subject, path, layer, x, dy, training=subject.trains_plainly)
        for found, check, wanted in ((outputs, "forward", True), (gradients, "gradient", False)):
            mine, truth, *draws = (
                {n: t for n, t in run.items() if (n == "y") == wanted} for run in (runs[0], runs[1], *runs[2])
            )
            if truth or mine:
                found.append(at(path, noise_floor(mine, truth, draws, subject.dtype, case.factor(check))))
        if runs[0]["y"].dtype != runs[2][0]["y"].dtype:
            kinds = f"{runs[0]['y'].dtype}, should be {runs[2][0]['y'].dtype}"
            outputs.append(Judgement(False, None, None, f"{path}: y", kinds, outputs[-1].policy, 0))
    forward, gradient = (worst_of(found, found[0].policy if found else "noise-floor") for found in (outputs, gradients))
    return forward, gradient


def _three(
    subject: Subject, path: str, layer: nn.Module, x: Tensor, dy: Tensor, *, training: bool = False
) -> tuple[dict[str, Tensor], dict[str, Tensor], list[dict[str, Tensor]]]:
    """Observe the subject's layer, the reference in float64, and draws of what a program in the subject's dtype loses.

    One draw is the reference in that dtype. It may happen to round to almost nothing, so there are others: the reference in
    float64 with every number that goes in moved by up to half a unit in the last place of the dtype, as rounding might.
    """
    mine = observe(layer, subject.tensors_of(path), x, dy, training=training)
    twin = subject.reference(path, "float64")
    wide = cast(x, "float64"), dy.double()
    truth = observe(twin.layer, twin.tensors, *wide)
    own = subject.reference(path, subject.dtype)
    draws = [observe(own.layer, own.tensors, x, dy)]
    for seed in range(PERTURBED_DRAWS):
        generator = torch.Generator().manual_seed(seed)
        moved, tensors = copy.deepcopy((twin.layer, twin.tensors))
        with torch.no_grad():
            for tensor in [*moved.parameters(), *moved.buffers()]:
                if tensor.is_floating_point():
                    tensor.copy_(perturbed(tensor, subject.dtype, generator))
        draws.append(observe(moved, tensors, *(perturbed(t, subject.dtype, generator) for t in wide)))
    return mine, truth, draws


def _rows_as(subject: Subject, path: str, y: Tensor, x: Tensor, mask: float) -> Tensor:
    """Return which rows of `y` are the reference's output with `mask` in the place of its dropout."""
    truth, rounded = (_masked(subject, path, dtype, x, None, mask)["y"] for dtype in ("float64", subject.dtype))
    return rows_within(y, truth, rounded, subject.dtype)


def _whole_tokens(subject: Subject, path: str, layer: nn.Module, x: Tensor, dy: Tensor, p: float) -> int:
    """Count the tokens of many features that training mode keeps or drops as a whole."""
    y = observe(layer, {}, x, dy, training=True)["y"]
    return int((_rows_as(subject, path, y, x, 1 / (1 - p)) | _rows_as(subject, path, y, x, 0.0)).sum())


def _masked(
    subject: Subject, path: str, dtype: str, x: Tensor, dy: Tensor | None, mask: Tensor | float
) -> dict[str, Tensor]:
    """Observe the reference in training mode with a product by `mask` (T, 1) in the place of its dropout."""
    twin = subject.reference(path, dtype)
    for name, child in list(twin.layer.named_modules()):
        if isinstance(child, nn.Dropout):
            parent, _, last = name.rpartition(".")
            setattr(twin.layer.get_submodule(parent), last, _Times(mask))
    if dy is not None:
        return observe(twin.layer, twin.tensors, cast(x, dtype), dy.to(DTYPES[dtype]), training=True)
    with torch.no_grad():
        return {"y": twin.layer.train()(cast(x, dtype))}


class _Times(nn.Module):
    """Multiply by a mask: dropout of which the mask is known."""

    def __init__(self, mask: Tensor | float) -> None:
        super().__init__()
        self.p, self.mask = 0.5, mask

    def forward(self, x: Tensor) -> Tensor:
        return x * (self.mask.to(x.dtype) if isinstance(self.mask, Tensor) else self.mask)
