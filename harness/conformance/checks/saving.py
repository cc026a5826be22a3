"""Check of saving: what `tensors()`, `state()` and the model's state_dict hold."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from harness.conformance.case import Case
from harness.conformance.checks import States, check
from harness.conformance.checks.merging import layer_inputs, layer_outputs
from harness.conformance.comparison.call_forms import owns
from harness.conformance.comparison.check_results import from_problems, judged, prefix_tensor, skipped
from harness.conformance.comparison.inputs import inputs
from harness.conformance.comparison.observations import observe
from harness.conformance.comparison.tolerance_policies import Judgement, exact, worst_of
from harness.conformance.subject import DTYPES, Subject, load
from harness.methods.module_copy import copied
from harness.methods.spec import method_info
from harness.records.record import CheckResult

_PACKED = (torch.uint8, torch.int8)
_REFUSALS = RuntimeError, ValueError, TypeError, LookupError, AttributeError
"""Exceptions of a library that does not load packed weights by `load_state_dict`."""


@check(States.WARM, depends_on_sizes=False)
def check_save(subject: Subject, case: Case) -> CheckResult:
    """`tensors()` and `state()` are the whole state of an adapter; the model's state_dict has every changing value.

    A freshly attached model into which `tensors()` and `state()` are copied gives the same outputs and gradients, to
    the last bit. This holds even if this model has already run with another state. `state()` returns the adapter's own
    tensors, not copies, so that a program can load values by writing to them.

    The state_dict of the whole model is also loaded into a model that had other base weights when the adapter was
    attached. Afterwards both models give the same outputs and the same `state()`, and `requires_grad` of every parameter
    is as before. If the model assigns new parameters (`assign=True`), `tensors()`, `parameters()` and `state()` have
    those. If hooks hold all tensors, so that none is a parameter of the model, they are copied separately. If the given
    model already had packed layers, or `load_state_dict` refuses packed weights, the state_dict must hold every tensor of
    `state()`, under any name.
    """
    fresh = case.attach_again()
    if fresh is None:
        return skipped(subject, case, "save", "the case cannot attach again")
    saved, places = ({*s.adapted.tensors(), *s.state()} for s in (subject, fresh))
    if saved != places:
        names = [f"only one of the two adapters has {name}" for name in sorted(saved ^ places)]
        return from_problems(subject, case, "save", names)
    load(fresh.adapted, subject.adapted.tensors())
    state = {name: t.detach().clone() for name, t in subject.state().items()}
    # The fresh adapter starts with the same state. Load another one first; otherwise loading this one shows nothing.
    other = {name: (t == 0).to(t.dtype) for name, t in state.items()}
    found = []
    for values in (other, state) if state else ():
        load(fresh.adapted, {}, values)
        found.append(exact(fresh.state(), values))
        if values is other:
            with torch.no_grad():
                # What an adapter keeps of this state must not outlive it.
                layer_outputs(fresh, layer_inputs(fresh, case))
    for index, (path, layer) in enumerate(subject.adapted.layers.items()):
        x, dy = inputs(subject.original_base(path), case.tokens, DTYPES[subject.dtype], case.generator(index))
        before = observe(layer, subject.tensors_of(path), x, dy)
        loaded = observe(fresh.adapted.layers[path], fresh.tensors_of(path), x, dy)
        found.append(prefix_tensor(path, exact(loaded, before)))  # `gradient` judges NaN
    found += _by_state_dict(subject, fresh, other, case)
    return judged(subject, case, "save", worst_of(found, "exact"))


def _by_state_dict(subject: Subject, fresh: Subject, changed: Mapping[str, Tensor], case: Case) -> Iterator[Judgement]:
    """Attach to a model with other base weights, let the model load two state_dicts in turn, and judge it after each.

    The first state_dict is that of `fresh`, whose `state()` has been given the values `changed`. The second is that of
    `subject`. Nothing is judged if the model was too large to be copied. If weights are packed (8-bit integers), the model
    loads only the second. If the model was packed before the case began, it loads neither.
    """
    saved = subject.model.state_dict()
    if subject.original.model is None:
        return
    model = copied(subject.original.model if subject.unpacked is None else subject.unpacked)
    if not all(parameter.is_floating_point() for parameter in model.parameters()):
        yield from _of_constants(subject, saved)
        yield from _after_assigning(fresh, saved)
        return
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(-0.5)
    other = case.attach_again(model=model)
    assert other is not None  # noqa: S101  # it was attached before
    # Training mode first, so that a weight that a layer keeps in eval mode is still there when the state_dict is loaded.
    _outputs(other, case, modes=(True, False))
    trained = _trainable(other)
    if any(getattr(t, "dtype", None) in _PACKED for t in saved.values()):
        try:
            other.model.load_state_dict(saved)
        except _REFUSALS:
            yield from _of_constants(subject, saved)
        else:
            yield from _alike(subject, other, trained, case)
        yield from _after_assigning(fresh, saved)
        return
    constants = method_info(subject.method).spec.start_from_config
    names = [name for name in changed if name.rpartition(".")[2] not in constants]
    if names:
        load(fresh.adapted, {}, changed)
        other.model.load_state_dict(fresh.model.state_dict())
        both = ({name: state[name] for name in names} for state in (other.state(), changed))
        yield prefix_tensor("after load_state_dict", exact(*both))
    other.model.load_state_dict(saved)
    yield from _alike(subject, other, trained, case)
    yield from _after_assigning(other, saved)


def _of_constants(subject: Subject, saved: Mapping[str, Tensor]) -> Iterator[Judgement]:
    """Yield a failure for each tensor of `state()` that is not in the state_dict `saved`, under any name."""
    values = [t for t in saved.values() if isinstance(t, Tensor)]
    for name, t in subject.state().items():
        # A library may save a 0-d tensor as a number among its settings.
        if t.dim() and not any(_is_same(t, value) for value in values):
            yield Judgement(False, None, None, name, "not in the model's state_dict", "exact", 0)


def _alike(subject: Subject, other: Subject, trained: set[str], case: Case) -> Iterator[Judgement]:
    """Yield judgements of `other`, whose model has loaded the state_dict of the subject's model.

    trained: names of the parameters of `other` that required gradients before.
    """
    if changes := sorted(trained ^ _trainable(other)):
        yield Judgement(False, None, None, "requires_grad after load_state_dict", f"{changes[0]} changed", "exact", 0)
    tensors = subject.adapted.tensors()
    own = {id(p) for p in subject.model.parameters()}
    if outside := [name for name, t in tensors.items() if id(t) not in own]:  # hooks may hold them
        lost = [name for name in outside if not torch.equal(other.adapted.tensors()[name], tensors[name])]
        if lost and len(outside) < len(tensors):
            why = "the state_dict does not restore it, but restores other tensors of the adapter"
            yield Judgement(False, None, None, lost[0], why, "exact", 0)
        load(other.adapted, tensors)
    loaded = _outputs(other, case)
    for name, seen in _outputs(subject, case).items():
        yield prefix_tensor(f"after load_state_dict, {name}", exact(loaded[name], seen))


def _outputs(subject: Subject, case: Case, modes: Sequence[bool] = (False, True)) -> dict[str, dict[str, Tensor]]:
    """Run every layer in eval mode and, if it has no dropout, in training mode. Return outputs and gradients by name.

    modes: the order of the modes; True is training.
    """
    found = {}
    for index, (path, layer) in enumerate(subject.adapted.layers.items()):
        x, dy = inputs(subject.original_base(path), case.tokens, DTYPES[subject.dtype], case.generator(index))
        for training in modes:
            if subject.trains_plainly or not training:
                name = f"{path} in training" if training else path
                found[name] = observe(layer, subject.tensors_of(path), x, dy, training=training)
    return found


def _after_assigning(subject: Subject, saved: Mapping[str, Tensor]) -> Iterator[Judgement]:
    """Let the model load the adapter's tensors of `saved` as new Parameters, and yield a failure if some are not listed.

    Then do the same with the tensors of `state()`.
    """
    tensors = subject.adapted.tensors()
    if not owns(subject.model, tensors):
        return
    own = {id(t) for t in [*tensors.values(), *subject.adapted.parameters()]}
    named = subject.model.named_parameters(remove_duplicate=False)
    trained = {name: saved[name] for name, p in named if id(p) in own and name in saved}
    regularized = subject.adapted.regularizer() is not None
    subject.model.load_state_dict(trained, strict=False, assign=True)
    held = {id(p) for p in subject.model.parameters()}
    stale = {id(t) for t in [*subject.adapted.tensors().values(), *subject.adapted.parameters()]} - held
    if stale:
        form = "the tensors to train after load_state_dict(assign=True)"
        yield Judgement(False, None, None, form, f"{len(stale)} are not the model's any more", "exact", 0)
    now, term = [*subject.adapted.tensors().values()], subject.adapted.regularizer() if regularized else None
    if term is not None and all(g is None for g in torch.autograd.grad(term, now, allow_unused=True)):
        form = "the regularizer after load_state_dict(assign=True)"
        yield Judgement(False, None, None, form, "it does not depend on the model's tensors", "exact", 0)
    yield from _after_assigning_state(subject, saved)


def _after_assigning_state(subject: Subject, saved: Mapping[str, Tensor]) -> Iterator[Judgement]:
    """Let the model load the tensors of `state()` as new tensors, and yield a failure for each that stays the old one."""
    before, state = _owned(subject.model), {name: t for name, t in subject.state().items() if t.numel()}
    places = {name: [n for n, own in before.items() if own.data_ptr() == t.data_ptr()] for name, t in state.items()}
    new = {place: saved[place].clone() for some in places.values() for place in some if place in saved}
    try:
        subject.model.load_state_dict(new, strict=False, assign=True)
    except _REFUSALS:
        return
    now = _owned(subject.model)
    for name, some in places.items():
        right = [now[place].data_ptr() for place in some if place in new]
        if right and subject.state()[name].data_ptr() not in right:
            why = "state() does not have the model's tensor after load_state_dict(assign=True)"
            yield Judgement(False, None, None, name, why, "exact", 0)


def _owned(model: nn.Module) -> dict[str, Tensor]:
    """Return the model's parameters and buffers by each of their names.

    A library's own kind of tensor, such as bitsandbytes' 4-bit weight, needs more than its numbers. It is left out.
    """
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: t for name, t in named if type(t) in (Tensor, nn.Parameter)}


def _is_same(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors share memory, or have equal values in one order."""
    if one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr():
        return True
    alike = one.device == other.device and one.numel() == other.numel()
    return alike and torch.equal(one.detach().flatten(), other.detach().flatten())


def _trainable(subject: Subject) -> set[str]:
    return {name for name, parameter in subject.model.named_parameters() if parameter.requires_grad}
