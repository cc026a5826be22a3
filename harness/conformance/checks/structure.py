"""Checks of the structure: adapted layers, trainable tensors, and everything that must not change."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn

from harness.conformance import process_settings
from harness.conformance.case import Case
from harness.conformance.checks import CellStage, Reference, States, check
from harness.conformance.comparison import whole_model
from harness.conformance.comparison.check_results import from_problems, judged, prefix_tensor, skipped
from harness.conformance.comparison.inputs import inputs
from harness.conformance.comparison.observations import observe, preserved_state
from harness.conformance.comparison.tolerance_policies import exact, unchanged, worst_of
from harness.conformance.poisoned_memory import poisoned_memory
from harness.conformance.subject import DTYPES, Subject, initial_shapes
from harness.errors import Unsupported
from harness.methods import checksums
from harness.methods.module_copy import copied
from harness.records.record import CheckResult
from reference.shared.layers import replace


@check(in_cell=[CellStage.ATTACHED], depends_on_sizes=False)
def check_layers(subject: Subject, case: Case) -> CheckResult:
    """Exactly the layers that the config's targets name are adapted, and nothing else of the model trains.

    At each of these paths, the layer in the model is the object that the implementation lists in `layers`.
    """
    odd = structure_problems(subject)
    return from_problems(subject, case, "layers", odd, f"{len(subject.adapted.layers)} layers")


def structure_problems(subject: Subject) -> list[str]:
    """Return a message for each layer that is adapted or not against the targets, and for each tensor that trains or
    does not train against the Method.
    """
    wanted, have = set(subject.bases), set(subject.adapted.layers)
    trains = {id(t) for t in subject.adapted.tensors().values()}
    stray = [n for n, p in subject.model.named_parameters() if p.requires_grad and id(p) not in trains]
    idle = [n for n, t in subject.adapted.tensors().items() if not t.requires_grad]
    runs = dict(subject.model.named_modules())
    return [
        *(f"{path} is not adapted" for path in sorted(wanted - have)),
        *(f"{p} of the model is another layer" for p in sorted(have) if runs.get(p) is not subject.adapted.layers[p]),
        *(f"{path} should not be adapted" for path in sorted(have - wanted)),
        *(f"{name} trains but is not the adapter's" for name in stray),
        *(f"{name} does not train" for name in idle),
    ]


@check(in_cell=[CellStage.ATTACHED])
def check_parameters(subject: Subject, case: Case) -> CheckResult:
    """The trainable tensors have the reference's names and shapes, and `parameters()` lists exactly these."""
    bases = {path: subject.original_base(path) for path in subject.bases}
    want = initial_shapes(subject.method, bases, subject.config, case.generator())
    of_the_model = {
        n: t for n, t in subject.adapted.tensors().items() if n in want
    }  # GaLore trains the weights themselves
    have = {n: tuple(t.shape) for n, t in (subject.added() | of_the_model).items()}
    named = {id(t) for t in subject.adapted.tensors().values()}
    counted = [id(p) for p in subject.adapted.parameters()]
    odd = [
        f"{n}: {have.get(n, 'absent')}, should be {want.get(n, 'absent')}"
        for n in sorted(want.keys() | have.keys())
        if want.get(n) != have.get(n)
    ]
    if set(counted) != named or len(counted) != len(named):
        odd.append(
            f"parameters() lists {len(counted)} tensors, tensors() names {len(named)}, and they are not the same"
        )
    total = sum(t.numel() for t in subject.added().values())
    return from_problems(subject, case, "parameters", odd, f"{total:,} scalars")


@check(States.INIT, in_cell=[CellStage.START], reference=Reference.UNUSED, depends_on_sizes=False)
def check_base(subject: Subject, case: Case) -> CheckResult:
    """Attaching does not change a single bit of the model's parameters and buffers.

    Quantising (packing) the base changes no tensor outside the packed layers; the check `codes` judges the packed
    layers. For `method: peft` the adapted weights are not compared if the method's start rewrites them (OLoRA, PiSSA,
    LoftQ).

    If attaching raises, no layer of the model is replaced. The check attaches to a model whose last target is a layer that
    most Methods refuse: an embedding with max_norm.
    """
    if subject.original.model is None and not subject.original.crc32:
        return skipped(subject, case, "base", "there is neither a copy nor a checksum of the model before attaching")
    if half := _left_by_failed_attach(subject, case):
        return from_problems(subject, case, "base", half)
    original, crc32 = subject.original.model, subject.original.crc32
    named = dict(original.named_parameters() if original else zip(crc32, subject.own, strict=False))
    before = [*named, *dict(original.named_buffers())] if original else [*crc32]
    # Compare parameters by identity, as an adapter may rename them, and likewise buffers of the adapted layers.
    now: dict[str, Tensor] = dict(zip(named, subject.own, strict=True))
    now |= checksums.quantisation_state(now) if original is None else {}
    for path, base in subject.bases.items():
        now |= {f"{path}.{name}": buffer for name, buffer in base.named_buffers()}
    buffers = dict(subject.model.named_buffers())
    now = {n: now[n] if n in now else buffers[n] for n in before if n in now or n in buffers}
    missing = [f"{name} is gone" for name in before if name not in now]
    if missing:
        return from_problems(subject, case, "base", missing)
    if getattr(subject.adapted, "rewrites_base", False):
        before = [name for name in before if name not in {f"{path}.weight" for path in subject.bases}]
    if original is None:
        changed = [f"{n} has changed" for n in before if checksums.crc32(now[n]) != crc32[n]]
        return from_problems(subject, case, "base", changed, f"{len(before)} tensors, by their checksums")
    then = whole_model.tensors(original)
    found = [unchanged({n: now[n].detach() for n in before}, {n: then[n] for n in before})]
    if subject.unpacked is not None:
        found.append(unchanged(_unpacked(subject, original), _unpacked(subject, subject.unpacked)))
    return judged(subject, case, "base", worst_of(found, "exact"))


def _left_by_failed_attach(subject: Subject, case: Case) -> list[str]:
    """Attach to a model whose last target is refused. Return a message for each module that the failed attaching replaces.

    If attaching succeeds or raises Unsupported, return no message.
    """
    if subject.original.model is None or subject.packed or not hasattr(subject.model, "targets"):
        return []
    model = copied(subject.original.model)
    model_of: Any = subject.model
    replace(model, model_of.targets[-1], nn.Embedding(1, 1, max_norm=1.0, device=subject.own[0].device))
    modules = dict(model.named_modules())
    try:
        case.attach_again(model=model)
    except Unsupported:
        return []
    except Exception:  # noqa: BLE001  # an implementation may refuse a layer by any exception
        now = dict(model.named_modules())
        return [
            f"attaching raised, and {name} is another layer" for name in modules if now.get(name) is not modules[name]
        ]
    return []


def _unpacked(subject: Subject, model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and buffers of `model` that lie outside the packed layers, by name."""
    packed = tuple(f"{path}." for path in subject.bases)
    return {name: tensor for name, tensor in whole_model.tensors(model).items() if not name.startswith(packed)}


@check(States.WARM, depends_on_sizes=False)
def check_inputs(subject: Subject, case: Case) -> CheckResult:
    """Forward and backward change neither the input, nor the incoming gradient, nor any weight, the base's included.

    The check also covers training mode with dropout, an input that needs no gradient, and calls without gradients.
    """
    found = []
    for index, (path, layer) in enumerate(subject.adapted.layers.items()):
        x, dy = inputs(subject.original_base(path), case.tokens, DTYPES[subject.dtype], case.generator(index))
        held = {"x": x, "dy": dy} | {f"weight {n}": t for n, t in layer.state_dict().items() if torch.is_tensor(t)}
        before = {name: t.detach().clone() for name, t in held.items()}
        for training, needed, recorded in itertools.product((False, True), (False, True), (False, True)):
            leaf = x.requires_grad_(needed and x.is_floating_point())
            with torch.set_grad_enabled(recorded), preserved_state(layer, subject.tensors_of(path), training):
                y = layer(leaf)
                if y.requires_grad and y.shape == dy.shape:  # else the checks `forward` and `gradient` report it
                    y.backward(dy)
            x.grad = None
        found.append(prefix_tensor(path, exact({n: t.detach() for n, t in held.items()}, before)))
    return judged(subject, case, "inputs", worst_of(found, "exact"))


@check(States.WARM, depends_on_sizes=False)
def check_deterministic(subject: Subject, case: Case) -> CheckResult:
    """Two runs on the same input give the same output and gradients, to the last bit.

    In eval mode, neither draws random numbers.
    """
    found, drawn = [], []
    for index, (path, layer) in enumerate(subject.adapted.layers.items()):
        x, dy = inputs(subject.original_base(path), case.tokens, DTYPES[subject.dtype], case.generator(index))
        before = process_settings.random_states(x.device)
        first = observe(layer, subject.tensors_of(path), x, dy)
        again = observe(layer, subject.tensors_of(path), x, dy)
        found.append(prefix_tensor(path, exact(again, first)))  # `gradient` judges NaN
        after = process_settings.random_states(x.device)
        if not all(torch.equal(*both) for both in zip(after, before, strict=True)):
            drawn.append(f"{path} draws random numbers in eval mode")
    if drawn:
        return from_problems(subject, case, "deterministic", drawn)
    return judged(subject, case, "deterministic", worst_of(found, "exact"))


@check(States.WARM, depends_on_sizes=False)
def check_poison(subject: Subject, case: Case) -> CheckResult:
    """No output and no gradient contains uninitialised memory.

    Memory that torch allocates is filled with NaN (`torch.utils.deterministic.fill_uninitialized_memory`). No result
    may contain NaN.
    """
    odd: list[str] = []
    for index, (path, layer) in enumerate(subject.adapted.layers.items()):
        x, dy = inputs(subject.original_base(path), case.tokens, DTYPES[subject.dtype], case.generator(index))
        tensors = subject.tensors_of(path)
        clean = observe(layer, tensors, x, dy)
        with poisoned_memory():
            poisoned = observe(layer, tensors, x, dy)
        odd += [f"{path}: {n} holds NaN" for n in clean if bool(poisoned[n].isnan().any() & ~clean[n].isnan().any())]
    return from_problems(subject, case, "poison", odd)
