"""The checks: each names one property that an implementation can violate, and returns numbers.

A check is a function `check_<name>(subject, case) -> CheckResult`; `peft-harness explain <name>` prints its docstring.
Every check leaves the subject as it found it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from harness.conformance import whole_model
from harness.conformance.observe import observe
from harness.conformance.subject import DTYPES, Subject, initial_tensors, load
from harness.conformance.tolerance import Judgement, exact, noise_floor, worst_of
from harness.records import CheckResult, Outcome
from reference import nf4
from reference.layers import replace as put_back

LARGEST_COPY = 300_000_000
"""Parameters; a float64 copy of more would not fit beside the model on a small machine."""


@dataclass(frozen=True)
class Case:
    """One seeded input for the checks.

    state: `init` (as attached) or `warm` (random adapter tensors; the subject is in it already). inputs: a function that
    runs the whole model on fixed inputs and returns its output. base_output: the same before attaching. forward: runs a
    given model on those inputs, differentiably.
    """

    state: str
    tokens: int = 16
    seed: int = 0
    inputs: Callable[[], Tensor] | None = None
    base_output: Tensor | None = None
    forward: Callable[[nn.Module], Tensor] | None = None

    def generator(self, salt: int = 0) -> torch.Generator:
        """Return a fresh generator of this case."""
        return torch.Generator().manual_seed(self.seed * 1_000_003 + salt)


Check = Callable[[Subject, Case], CheckResult]


def check_layers(subject: Subject, case: Case) -> CheckResult:
    """The adapter sits on exactly the layers that the config's targets name, and nothing else of the model trains.

    Sits means: the model runs, at that path, the very layer that the implementation says it adapted.
    """
    wanted = set(subject.bases)
    have = set(subject.adapted.layers)
    trains = {id(t) for t in subject.adapted.tensors().values()}
    stray = [n for n, p in subject.model.named_parameters() if p.requires_grad and id(p) not in trains]
    idle = [n for n, t in subject.adapted.tensors().items() if not t.requires_grad]
    runs = dict(subject.model.named_modules())
    odd = [
        *(f"{path} is not adapted" for path in sorted(wanted - have)),
        *(f"{p} of the model is another layer" for p in sorted(have) if runs.get(p) is not subject.adapted.layers[p]),
        *(f"{path} should not be adapted" for path in sorted(have - wanted)),
        *(f"{name} trains but is not the adapter's" for name in stray),
        *(f"{name} does not train" for name in idle),
    ]
    detail = "; ".join(odd[:5]) or f"{len(have)} layers"
    return _plain(subject, case, "layers", not odd, len(odd), detail)


def check_parameters(subject: Subject, case: Case) -> CheckResult:
    """The number of trainable scalars is the reference's."""
    reference = initial_tensors(subject.method, subject.bases, subject.config, case.generator())
    want = {n: tuple(t.shape) for n, t in reference.items()}
    have = {n: tuple(t.shape) for n, t in subject.added().items()}
    odd = [
        f"{n}: {have.get(n, 'absent')}, should be {want.get(n, 'absent')}"
        for n in sorted(want.keys() | have.keys())
        if want.get(n) != have.get(n)
    ]
    total = sum(t.numel() for t in subject.added().values())
    return _plain(subject, case, "parameters", not odd, len(odd), "; ".join(odd[:3]) or f"{total:,} scalars")


def check_identity(subject: Subject, case: Case) -> CheckResult:
    """At its start the adapted model computes what the base model computes, to the last bit (paper: B = 0)."""
    if case.inputs is None or case.base_output is None:
        return _skipped(subject, case, "identity", "no whole-model input in this case")
    return _judged(subject, case, "identity", exact({"logits": case.inputs()}, {"logits": case.base_output}))


def check_forward(subject: Subject, case: Case) -> CheckResult:
    """The output of every adapted layer is the reference's, on the layer's own weights and a random input."""
    return _judged(subject, case, "forward", _compare_layers(subject, case, lambda name: name == "y"))


def check_gradient(subject: Subject, case: Case) -> CheckResult:
    """The gradients of every adapted layer, of its input and of each of its trainable tensors, are the reference's."""
    return _judged(subject, case, "gradient", _compare_layers(subject, case, lambda name: name != "y"))


def check_model(subject: Subject, case: Case) -> CheckResult:
    """The whole model gives the logits, and every trainable tensor the gradient, of a float64 copy of the model that
    carries the reference's layers.
    """
    if case.forward is None:
        return _skipped(subject, case, "model", "no whole-model input in this case")
    if subject.dtype == "float64":
        return _skipped(subject, case, "model", "some models round to float32 inside, whatever their dtype")
    if sum(p.numel() for p in subject.model.parameters()) > LARGEST_COPY:
        return _skipped(subject, case, "model", f"a float64 copy is made up to {LARGEST_COPY:,} parameters")
    mine = whole_model.observe(subject.model, subject.adapted.tensors(), subject, case.forward)
    truth = whole_model.observe(*whole_model.reference(subject, "float64"), subject, case.forward)
    rounded = whole_model.observe(*whole_model.reference(subject, subject.dtype), subject, case.forward)
    return _judged(subject, case, "model", noise_floor(mine, truth, rounded, subject.dtype))


def check_deterministic(subject: Subject, case: Case) -> CheckResult:
    """Two runs on the same input give the same output and gradients, to the last bit."""
    judged = []
    for index, path in enumerate(subject.adapted.layers):
        x, dy = _inputs(subject, case, path, index)
        tensors = subject.tensors_of(path)
        first = observe(subject.adapted.layers[path], tensors, x, dy)
        judged.append(_at(path, exact(observe(subject.adapted.layers[path], tensors, x, dy), first)))
    return _judged(subject, case, "deterministic", worst_of(judged, "exact"))


def check_inputs(subject: Subject, case: Case) -> CheckResult:
    """Forward and backward change neither the input nor the incoming gradient nor any weight, also not the base's."""
    judged = []
    for index, path in enumerate(subject.adapted.layers):
        layer = subject.adapted.layers[path]
        x, dy = _inputs(subject, case, path, index)
        held = {"x": x, "dy": dy} | {f"weight {n}": t for n, t in layer.state_dict().items() if torch.is_tensor(t)}
        before = {name: t.detach().clone() for name, t in held.items()}
        leaf = x.requires_grad_(True)
        y = layer(leaf)
        if y.requires_grad and y.shape == dy.shape:  # otherwise forward and gradient say so
            y.backward(dy)
        for tensor in subject.tensors_of(path).values():
            tensor.grad = None
        judged.append(_at(path, exact({n: t.detach() for n, t in held.items()}, before)))
    return _judged(subject, case, "inputs", worst_of(judged, "exact"))


def check_step(subject: Subject, case: Case) -> CheckResult:
    """One AdamW step from an identical state moves every trainable tensor as the reference moves it."""
    judged = []
    for index, path in enumerate(subject.adapted.layers):
        x, dy = _inputs(subject, case, path, index)
        runs = [(subject.adapted.layers[path], subject.tensors_of(path), subject.dtype)]
        runs += [(*subject.reference(path, dtype), dtype) for dtype in ("float64", subject.dtype)]
        moved = []
        for layer, tensors, dtype in runs:
            before = {n: t.detach().clone() for n, t in tensors.items()}
            gradients = observe(layer, tensors, x.to(DTYPES[dtype]), dy.to(DTYPES[dtype]))
            for name, tensor in tensors.items():
                tensor.grad = gradients.get(f"grad {name}")
            if before:
                # The usual eps of 1e-8 is zero in float16, and the step of a zero gradient then 0/0.
                torch.optim.AdamW(list(tensors.values()), lr=1e-2, weight_decay=0.1, eps=1e-4).step()
            moved.append({n: t.detach().clone() for n, t in tensors.items()})
            with torch.no_grad():
                for name, tensor in tensors.items():
                    tensor.copy_(before[name])
                    tensor.grad = None
        mine, truth, rounded = moved
        if truth:
            judged.append(_at(path, noise_floor(mine, truth, rounded, subject.dtype)))
    if not judged:
        return _skipped(subject, case, "step", "nothing trains")
    return _judged(subject, case, "step", worst_of(judged, judged[0].policy))


def check_merge(subject: Subject, case: Case) -> CheckResult:
    """The merged layers compute what the float64 reference computes, whatever then becomes of the adapter; so do the
    layers after unmerging; and detaching puts the very base layers back.
    """
    if not subject.adapted.can_merge:
        return _skipped(subject, case, "merge", "this Method has nothing to merge")
    layers = dict(subject.adapted.layers)
    inputs = {path: _inputs(subject, case, path, index)[0] for index, path in enumerate(layers)}

    def outputs() -> dict[str, Tensor]:
        return {path: subject.model.get_submodule(path)(x) for path, x in inputs.items()}

    added = subject.added()
    held = {name: t.detach().clone() for name, t in added.items()}
    with torch.no_grad():
        truth = {path: subject.reference(path, "float64")[0](x.double()) for path, x in inputs.items()}
        rounded = {path: subject.reference(path, subject.dtype)[0](x) for path, x in inputs.items()}
        subject.adapted.merge()
        for tensor in added.values():
            tensor.mul_(-3).add_(1)  # a merged layer no longer looks at its adapter
        merged = outputs()
        load(subject.adapted, held)
        subject.adapted.unmerge()
        after = outputs()
        subject.adapted.detach()
        strange = [path for path, base in subject.bases.items() if subject.model.get_submodule(path) is not base]
        for path, layer in layers.items():
            put_back(subject.model, path, layer)
    if strange:
        detail = f"{', '.join(strange[:3])} is not the base layer after detaching"
        return _plain(subject, case, "merge", False, len(strange), detail)
    verdict = noise_floor(merged, truth, rounded, subject.dtype)
    if verdict.passed:
        verdict = noise_floor(after, truth, rounded, subject.dtype)
    return _judged(subject, case, "merge", verdict)


def check_initial(subject: Subject, case: Case) -> CheckResult:
    """The implementation's own start has the distribution that the reference states: B zero, A uniform in +-1/sqrt(in).

    A is judged by its largest magnitude, which may not pass the bound, and its mean square, which must be 1/(3 in) within
    five standard errors of that many draws.
    """
    odd = []
    for name, tensor in subject.added().items():
        if name.endswith(".B") and bool(tensor.any()):
            odd.append(f"{name} is not zero")
        if name.endswith(".A"):
            D, count = tensor.shape[-1], tensor.numel()
            scaled = tensor.detach().double().square() * D  # in [0, 1], mean 1/3, variance 4/45 for the uniform
            if float(scaled.max()) > 1.01 or abs(float(scaled.mean()) - 1 / 3) > 5 * (4 / 45 / count) ** 0.5:
                odd.append(f"{name}: mean square times in is {float(scaled.mean()):.4g}, should be 1/3")
    return _plain(subject, case, "initial", not odd, len(odd), "; ".join(odd[:3]))


def check_codes(subject: Subject, case: Case) -> CheckResult:
    """The packed base holds the reference's NF4 codes and absmax of the original weights, and the original biases.

    A code may be one level off only where the element lies within two float32 units of the middle of two levels: there
    dividing by absmax and multiplying by its reciprocal, both in use, may part. In a block of zeros any code with an
    absmax that makes it zero will do: bitsandbytes' back ends differ there.
    """
    if not subject.packed:
        return _skipped(subject, case, "codes", "the base is not quantised")
    judged, ties = [], 0
    for path, form in subject.packed.items():
        want = subject.expected_codes[path]
        codes = nf4.unpack(form.data, want.codes.numel())
        tied = want.near_tie & ((codes.int() - want.codes.int()).abs() == 1)
        ties += int(tied.sum())
        zero = (want.absmax == 0) & (form.absmax.abs() <= torch.finfo(torch.float32).tiny)
        excused = tied | zero.repeat_interleave(form.block)[: codes.numel()]
        have = {
            "codes": torch.where(excused, want.codes, codes),
            "absmax": torch.where(zero, want.absmax, form.absmax),
        }
        expected = {"codes": want.codes, "absmax": want.absmax}
        if want.bias is not None:
            bias = subject.bases[path].bias
            expected["bias"] = want.bias
            have |= {} if bias is None else {"bias": bias.detach()}
        judged.append(_at(path, exact(have, expected)))
    result = _judged(subject, case, "codes", worst_of(judged, "exact"))
    return result.model_copy(update={"detail": f"{ties} codes on the other side of a tie"})


def _inputs(subject: Subject, case: Case, path: str, index: int) -> tuple[Tensor, Tensor]:
    """Return x (T, D) and dy (T, E) in the subject's dtype, drawn in float64 so that all dtypes see the same numbers."""
    base = subject.bases[path]
    generator = case.generator(index)
    x = torch.randn(case.tokens, base.in_features, generator=generator, dtype=torch.float64)
    dy = torch.randn(case.tokens, base.out_features, generator=generator, dtype=torch.float64)
    device = next(base.parameters()).device
    return x.to(device, DTYPES[subject.dtype]), dy.to(device, DTYPES[subject.dtype])


def _compare_layers(subject: Subject, case: Case, wanted: Callable[[str], bool]) -> Judgement:
    judged = []
    for index, path in enumerate(subject.adapted.layers):
        x, dy = (t.view(2, -1, t.shape[-1]) if len(t) % 2 == 0 else t for t in _inputs(subject, case, path, index))
        runs = [observe(subject.adapted.layers[path], subject.tensors_of(path), x, dy, training=subject.trains_plainly)]
        for dtype in ("float64", subject.dtype):
            layer, tensors = subject.reference(path, dtype)
            runs.append(observe(layer, tensors, x.to(DTYPES[dtype]), dy.to(DTYPES[dtype])))
        mine, truth, rounded = ({name: t for name, t in run.items() if wanted(name)} for run in runs)
        judged.append(_at(path, noise_floor(mine, truth, rounded, subject.dtype)))
    return worst_of(judged, judged[0].policy if judged else "noise-floor")


def _at(path: str, judgement: Judgement) -> Judgement:
    return replace(judgement, tensor=f"{path}: {judgement.tensor}")


def _id(subject: Subject, case: Case, name: str) -> str:
    return f"{subject.method}/{name}/{subject.dtype}/{case.state}"


def _judged(subject: Subject, case: Case, name: str, judgement: Judgement) -> CheckResult:
    return CheckResult(
        check=_id(subject, case, name),
        outcome=Outcome.PASS if judgement.passed else Outcome.FAIL,
        error=judgement.error,
        allowed=judgement.allowed,
        tensor=judgement.tensor,
        worst=judgement.worst,
        policy=judgement.policy,
        nonfinite=judgement.nonfinite,
    )


def _plain(subject: Subject, case: Case, name: str, passed: bool, error: float, detail: str) -> CheckResult:
    return CheckResult(
        check=_id(subject, case, name),
        outcome=Outcome.PASS if passed else Outcome.FAIL,
        error=float(error),
        allowed=0.0,
        policy="exact",
        detail=detail,
    )


def _skipped(subject: Subject, case: Case, name: str, because: str) -> CheckResult:
    return CheckResult(check=_id(subject, case, name), outcome=Outcome.SKIPPED, detail=because)
