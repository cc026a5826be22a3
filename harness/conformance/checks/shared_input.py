"""Check of adapted layers that get the same input, as q, k and v of an attention block do."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from harness.conformance.case import Case
from harness.conformance.checks import States, check
from harness.conformance.comparison.check_results import from_problems, judged, named_if_raised, prefix_tensor, skipped
from harness.conformance.comparison.inputs import HALF, inputs
from harness.conformance.comparison.layer_comparison import reference_runs
from harness.conformance.comparison.observations import observe, preserved_state
from harness.conformance.comparison.tolerance_policies import Judgement, noise_floor, worst_of
from harness.conformance.subject import DTYPES, Subject, warm
from harness.errors import Unsupported
from harness.records.record import CheckResult
from reference.shared.layers import features_in_out

_NAMES = ("q_proj", "k_proj", "v_proj")
_TOKENS = 5
_DROPOUT = 0.5
_SMALL = 0.05
"""Distance of an output from the reference's in eval mode, relative to the update, below which it has no dropout."""


@check(States.WARM, depends_on_sizes=False, only_wide=True, also_in_typical_case=True)
def check_shared_input(subject: Subject, case: Case) -> CheckResult:
    """Layers with one input compute the same as each layer alone, however a program calls them.

    The layers are `q_proj`, `k_proj` and `v_proj` of one block. Programs often compute such layers together, or keep the
    outputs until the next layer is called. The check calls them with one input and with several, changes the input or the
    adapter between two calls, runs one backward pass for all layers or one after each call, and uses only one of the
    outputs: the other layers then get no gradient. Layers with dropout run in eval mode, because outputs in training
    mode are random. In training mode with dropout, no layer may return its output without dropout.
    """
    if not hasattr(subject.config, "targets") or case.attach_fresh is None:
        return skipped(subject, case, "shared_input", "the config has no targets, or the case cannot attach again")
    base = subject.original_base(next(iter(subject.bases)))
    if not isinstance(base, nn.Linear) or not subject.added():
        return skipped(subject, case, "shared_input", "only adapters of linear layers are tried")

    def model_of() -> nn.Module:
        model = _Block(*features_in_out(base))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=base.in_features**-0.5, generator=case.generator(salt=740))
        return model.to(subject.own[0].device, DTYPES[subject.dtype])

    fresh = case.attach_again(model=model_of(), targets=_NAMES)
    if fresh is None or set(fresh.adapted.layers) != set(fresh.bases):
        return skipped(subject, case, "shared_input", "not all of these layers are adapted")
    warm(fresh.added(), case.generator(salt=741))
    found = list(_judgements(_Siblings.of(fresh, case), case.factor("shared_input")))
    # The first form is the plainest, so it tells more about the cause than the form with the largest error.
    failed = next((one for one in found if not one.passed), None)
    if failed is None and (problems := _without_dropout(subject, case, model_of)):
        return from_problems(subject, case, "shared_input", problems)
    return judged(subject, case, "shared_input", failed or worst_of(found, found[0].policy))


def _without_dropout(subject: Subject, case: Case, model_of: Callable[[], nn.Module]) -> list[str]:
    """Attach with dropout, and call the layers in training mode. Return a message for each layer that drops nothing.

    Return [] if the Method has no dropout, or if the implementation does not support it.
    """
    if not hasattr(subject.config, "dropout"):
        return []
    try:
        fresh = case.attach_again(model=model_of(), targets=_NAMES, dropout=_DROPOUT)
    except Unsupported:
        return []
    assert fresh is not None  # noqa: S101
    warm(fresh.added(), case.generator(salt=741))
    siblings = _Siblings.of(fresh, case)
    trained, x = dict[str, Tensor](), siblings.leaf()
    for path, layer in siblings.layers.items():
        with preserved_state(layer, fresh.tensors_of(path), training=True):
            trained[path] = layer(x).detach().clone()
    text = f"in training mode with dropout {_DROPOUT}, the output is that of the reference without dropout"
    return [f"{path}: {text}" for path, y in trained.items() if _is_plain(siblings, path, y)]


def _is_plain(siblings: _Siblings, path: str, y: Tensor) -> bool:
    """Return whether y is nearly the output of the reference in eval mode.

    The reference in training mode shows how far dropout moves an output.
    """
    x, layer = siblings.x.double(), siblings.subject.reference(path, "float64").layer
    right, dropped = layer.eval()(x), layer.train()(x)
    return bool((y.double() - right).norm() < _SMALL * (dropped - right).norm())


class _Block(nn.Module):
    """Three linear layers with the names of an attention block's."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.attention = nn.ModuleDict({name: nn.Linear(inputs, outputs) for name in _NAMES})


@dataclass
class _Seen:
    """The results of one call of a layer, and the facts that determine the expected results."""

    results: dict[str, Tensor]
    """The output `y` and the gradients, by name."""
    x: Tensor
    """The input of the call, shape (_TOKENS, D)."""
    shows: Literal["all", "without grad x", "y"] = "y"
    """The names that `results` should have: all that the reference gives, all without the input's gradient, or `y`."""
    is_halved: bool = False
    """True if the trained tensors of the layer were halved before the call."""


@dataclass
class _Siblings:
    """Adapted layers with one input x, and the gradients of their outputs."""

    subject: Subject
    x: Tensor
    """The input, shape (_TOKENS, D)."""
    other: Tensor
    """Another input, shape (_TOKENS, D)."""
    dys: list[Tensor]
    """Gradient of each layer's output, shape (_TOKENS, E)."""

    @classmethod
    def of(cls, subject: Subject, case: Case) -> _Siblings:
        """Draw the inputs and the gradients for the layers of `subject`."""
        dtype = DTYPES[subject.dtype]
        drawn = [inputs(base, _TOKENS, dtype, case.generator(750 + n)) for n, base in enumerate(subject.bases.values())]
        return cls(subject, drawn[0][0], drawn[1][0], [dy for _, dy in drawn])

    @property
    def layers(self) -> dict[str, nn.Module]:
        """The layers by their paths, in the order in which they are called."""
        return {path: self.subject.adapted.layers[path] for path in self.subject.bases}

    def gradients(self, path: str) -> dict[str, Tensor]:
        """Return copies of the gradients that the tensors of the layer at `path` have, by `grad <name>`."""
        named = self.subject.tensors_of(path).items()
        return {f"grad {name}": t.grad.detach().clone() for name, t in named if t.grad is not None}

    def leaf(self) -> Tensor:
        """Return a copy of x that requires a gradient."""
        return self.x.clone().requires_grad_(True)

    def call_all(self, x: Tensor, other: Tensor) -> dict[str, Tensor]:
        """Call the layers, the second one with `other` and the others with `x`. Return the outputs by path."""
        return {path: layer(other if n == 1 else x) for n, (path, layer) in enumerate(self.layers.items())}

    def backward(self, ys: Mapping[str, Tensor], other: Tensor, unused: Collection[str] = ()) -> dict[str, _Seen]:
        """Run one backward pass from all outputs `ys` that are not in `unused`, and return what every layer gave.

        other: the input of the second layer.
        """
        used = [(y, dy) for (path, y), dy in zip(ys.items(), self.dys, strict=True) if path not in unused]
        used = [(y, dy) for y, dy in used if y.requires_grad and y.shape == dy.shape]
        torch.autograd.backward([y for y, _ in used], [dy for _, dy in used])
        return {
            path: _Seen(
                {"y": y.detach().clone()} | self.gradients(path),
                other if n == 1 else self.x,
                "y" if path in unused else "without grad x",
            )
            for n, (path, y) in enumerate(ys.items())
        }

    @contextmanager
    def halved(self, path: str) -> Iterator[None]:
        """Halve the trained tensors of the layer at `path` in place inside this context."""
        tensors = self.subject.tensors_of(path).values()
        with torch.no_grad():
            for tensor in tensors:
                tensor.mul_(HALF)
        try:
            yield
        finally:
            with torch.no_grad():
                for tensor in tensors:
                    tensor.div_(HALF)


def _in_one_backward_pass(of: _Siblings) -> dict[str, _Seen]:
    x = of.leaf()
    return of.backward(of.call_all(x, x), of.x)


def _with_a_backward_pass_after_each_call(of: _Siblings) -> dict[str, _Seen]:
    x, seen = of.leaf(), dict[str, _Seen]()
    for (path, layer), dy in zip(of.layers.items(), of.dys, strict=True):
        x.grad = None
        y = layer(x)
        if y.requires_grad and y.shape == dy.shape:
            y.backward(dy)
        results = {"y": y.detach().clone()} | of.gradients(path)
        if x.grad is not None:
            results["grad x"] = x.grad.clone()
        seen[path] = _Seen(results, of.x, "all")
    return seen


def _with_one_output_used(of: _Siblings) -> dict[str, _Seen]:
    x = of.leaf()
    *unused, _ = of.layers
    return of.backward(of.call_all(x, x), of.x, unused)


def _with_two_inputs(of: _Siblings) -> dict[str, _Seen]:
    return of.backward(of.call_all(of.leaf(), of.other), of.other)


def _with_the_first_under_checkpointing(of: _Siblings) -> dict[str, _Seen]:
    x, (first, *rest) = of.leaf(), of.layers.items()
    ys = {first[0]: checkpoint(first[1], x, use_reentrant=False)} | {path: layer(x) for path, layer in rest}
    return of.backward(ys, of.x)


@torch.inference_mode()
def _under_inference_mode(of: _Siblings) -> dict[str, _Seen]:
    x = of.x.clone()
    return {path: _Seen({"y": y.clone()}, of.x) for path, y in of.call_all(x, x).items()}


@torch.no_grad()
def _with_an_input_that_changes(of: _Siblings) -> dict[str, _Seen]:
    """Halve the input in place after each call."""
    x, seen = of.x.clone(), {}
    for path, layer in of.layers.items():
        seen[path] = _Seen({"y": layer(x).clone()}, x.clone())
        x.mul_(HALF)
    return seen


@torch.no_grad()
def _with_tensors_that_change(of: _Siblings) -> dict[str, _Seen]:
    """Halve each layer's tensors before it is called, except those of the first layer."""
    (first, layer), *rest = of.layers.items()
    seen = {first: _Seen({"y": layer(of.x).clone()}, of.x)}
    for path, layer in rest:
        with of.halved(path):
            seen[path] = _Seen({"y": layer(of.x).clone()}, of.x, is_halved=True)
    return seen


_FORMS: Mapping[str, Callable[[_Siblings], dict[str, _Seen]]] = {
    "in one backward pass": _in_one_backward_pass,
    "with a backward pass after each call": _with_a_backward_pass_after_each_call,
    "with one output used": _with_one_output_used,
    "with two inputs": _with_two_inputs,
    "with the first under activation checkpointing": _with_the_first_under_checkpointing,
    "under inference_mode": _under_inference_mode,
    "with an input that changes between the calls": _with_an_input_that_changes,
    "with tensors that change between the calls": _with_tensors_that_change,
}
"""Name -> function that calls the layers one after the other, and returns what each gave, by its path."""


def _judgements(of: _Siblings, factor: float) -> Iterator[Judgement]:
    """Call the layers in every form, and yield a judgement of each layer in each form."""
    subject, training = of.subject, of.subject.trains_plainly
    for name, form in _FORMS.items():
        with ExitStack() as preserved, named_if_raised(", ".join(of.layers), name):
            for path, layer in of.layers.items():
                preserved.enter_context(preserved_state(layer, subject.tensors_of(path), training))
            seen = form(of)
        for (path, one), dy in zip(seen.items(), of.dys, strict=True):
            with of.halved(path) if one.is_halved else nullcontext():
                truth, draws = reference_runs(subject, path, one.x, dy, run=partial(observe, training=training))
            hidden = {"all": (), "without grad x": ("grad x",), "y": truth.keys() - {"y"}}[one.shows]
            known = ({n: t for n, t in draw.items() if n not in hidden} for draw in draws)
            expected = {n: t for n, t in truth.items() if n not in hidden}
            yield prefix_tensor(f"{path} {name}", noise_floor(one.results, expected, known, subject.dtype, factor))
