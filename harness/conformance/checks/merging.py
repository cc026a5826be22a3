"""Checks of merging, unmerging and detaching.

Merging adds the adapter's update to the base weight. Unmerging undoes this. Detaching removes the adapter from the
model.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Collection, Iterator, Mapping
from itertools import islice

import torch
from torch import Tensor, nn

from harness.conformance.case import Case
from harness.conformance.checks import CellStage, States, check
from harness.conformance.comparison import whole_model
from harness.conformance.comparison.call_histories import is_packed
from harness.conformance.comparison.check_results import from_problems, judged, prefix_tensor, skipped
from harness.conformance.comparison.inputs import HALF, inputs
from harness.conformance.comparison.merged_layers import expected_outputs
from harness.conformance.comparison.observations import observe
from harness.conformance.comparison.tolerance_policies import Judgement, exact, noise_floor, unchanged, worst_of
from harness.conformance.subject import DTYPES, Subject, load, warm
from harness.methods.module_copy import copied
from harness.methods.spec import method_info
from harness.records.record import CheckResult

_OTHER_SEED = 77
_UNMERGED = "after unmerging without merging"
_MERGED = "after merging"
_CHANGED = "unmerged twice, with another adapter"
_AGAIN = "after merging again, in training mode"


@check(States.WARM, in_cell=[CellStage.TRAINED], in_brief_cases=True)
def check_merge(subject: Subject, case: Case) -> CheckResult:
    """Merged layers, and layers that are unmerged again, compute what the float64 reference computes.

    If merging quantises the sum of weight and update (LoRA over 8 bits), the reference of a merged layer is merged, too.
    A merged layer no longer depends on its adapter; an unmerged layer follows its adapter again, and trains as before.
    This also holds if the adapter is changed and merged again, in training mode and while gradients are recorded. Merging
    includes every lambda that is not zero, whatever AdaLoRA's mask says.
    Unmerging a layer that is not merged changes nothing. Merging makes no frozen parameter of the model trainable, and does
    not change the table of an embedding: an output layer that is tied to it must compute what it did. Merging and
    unmerging leave every module of the model in training or eval mode, as it was; if a merged model is put into eval mode,
    its layers are in eval mode after unmerging. The merged model's state_dict holds its weights.
    """
    if not subject.adapted.can_merge:
        return skipped(subject, case, "merge", "this adapter cannot be merged")
    # Merging must use the loaded state: with another seed, a randomised SVD leaves another residual.
    if (fresh := case.attach_again(seed=_OTHER_SEED)) is not None:
        # Some libraries merge into the base weight and unmerge by subtracting, which leaves a rounding error.
        masks = {n: torch.zeros_like(t) for n, t in subject.state().items() if n.endswith(".mask")}
        load(fresh.adapted, subject.adapted.tensors(), subject.state() | masks)
        subject = fresh
    xs = layer_inputs(subject, case)
    added = subject.added()
    values = {name: t.detach().clone() for name, t in added.items()}
    trained = {name for name, tensor in subject.adapted.tensors().items() if tensor.requires_grad}
    trainable = {id(p) for p in subject.model.parameters() if p.requires_grad}
    tables = {path: base.weight for path, base in subject.bases.items() if isinstance(base, nn.Embedding)}
    before = {path: table.detach().clone() for path, table in tables.items()}
    modes = {path: layer.training for path, layer in subject.adapted.layers.items()}
    outputs = {}
    with torch.no_grad():
        for layer in subject.adapted.layers.values():
            layer.eval()
        # Built before merging: the references use the model's own base weights, and must show if merging damages these.
        expected = {path: expected_outputs(subject, path, x) for path, x in xs.items()}
        subject.adapted.unmerge()
        outputs[_UNMERGED] = layer_outputs(subject, xs)
        eval_modes = {module: module.training for module in subject.model.modules()}
        modules = {path: subject.model.get_submodule(path) for path in subject.adapted.layers}
        subject.adapted.merge()
        lacking = _lacking_weights(subject)
        made_trainable = _trainable_beside(subject, trainable)
        changed = [path for path, table in tables.items() if not torch.equal(table, before[path])]
        for tensor in added.values():
            tensor.mul_(-3).add_(1)  # a merged layer no longer depends on its adapter
        subject.adapted.merge()  # what is merged already stays as it is
        outputs[_MERGED] = _merged_outputs(subject, xs)
        load(subject.adapted, values)
        subject.adapted.unmerge()
        outputs["after unmerging"] = layer_outputs(subject, xs)
        left = [path for path, module in modules.items() if subject.model.get_submodule(path) is not module]
        switched = _switched(eval_modes)
        now = {name for name, tensor in subject.adapted.tensors().items() if tensor.requires_grad}
        subject.adapted.unmerge()
        for tensor in added.values():
            tensor.mul_(HALF)
        outputs[_CHANGED] = layer_outputs(subject, xs)
        if fresh is not None:
            outputs[_AGAIN] = _merged_in_training(subject, xs, switched)
        load(subject.adapted, values)
    for path, training in modes.items():
        subject.adapted.layers[path].train(training)
    quantises = method_info(subject.method).spec.merge_quantises
    verdicts: dict[str, Judgement] = {}
    for when, ys in outputs.items():
        found = []
        for path, y in ys.items():
            is_merged, is_halved = when in (_MERGED, _AGAIN), when in (_CHANGED, _AGAIN)
            truth, draws = expected[path][is_merged, is_halved]
            if not (is_merged or quantises or y.isfinite().all()):
                # The first result comes from a merged layer, which may be finite where this layer overflows.
                draws = islice(draws, 1, None)
            verdict = noise_floor(
                {"y": y}, truth, draws, subject.dtype, case.factor("merge"), jumps=quantises and is_merged
            )
            found.append(prefix_tensor(path, verdict))
        verdicts[when] = worst_of(found, found[0].policy if found else "noise-floor")
    failures = [when for when, verdict in verdicts.items() if verdict.decided and not verdict.passed]
    odd = [f"{name} does not train any more after unmerging" for name in sorted(trained - now)]
    odd += [f"{name} trains after merging, and did not before" for name in sorted(made_trainable)]
    odd += sorted(switched)
    odd += [f"the state_dict of the merged {path} lacks its weight" for path in lacking]
    odd += [f"after merging twice and unmerging once, {path} of the model is still merged" for path in left]
    if odd:
        return from_problems(subject, case, "merge", odd)
    if failures:
        # What comes after the first unmerging depends on it, so it is reported only if all before it is right.
        first = [when for when in failures if when in (_UNMERGED, _MERGED)]
        worst = max(first, key=lambda when: verdicts[when].ratio) if first else failures[0]
        return judged(subject, case, "merge", verdicts[worst], worst)
    if changed:
        problems = [f"{path}: merging changes the table itself, and so the output layer tied to it" for path in changed]
        return from_problems(subject, case, "merge", problems)
    return judged(subject, case, "merge", worst_of([*verdicts.values()], verdicts[_CHANGED].policy))


def _trainable_beside(subject: Subject, known: Collection[int]) -> set[str]:
    """Return the names of the model's parameters that require a gradient and whose `id` is not in `known`."""
    return {name for name, p in subject.model.named_parameters() if p.requires_grad and id(p) not in known}


def _switched(modes: Mapping[nn.Module, bool]) -> set[str]:
    """Return a message for each module that is not in the mode `modes`: True for training mode, False for eval mode."""
    names = {True: "training", False: "eval"}
    return {
        f"merging or unmerging puts a {type(module).__name__} into {names[module.training]} mode"
        for module, training in modes.items()
        if module.training is not training
    }


def _lacking_weights(subject: Subject) -> list[str]:
    """Return the paths of merged layers whose state_dict has fewer numbers than that of the base layer before packing.

    A merged layer that is packed is left out."""

    def size(layer: nn.Module) -> int:
        return sum(t.numel() for t in layer.state_dict().values() if isinstance(t, Tensor))

    layers = {path: subject.model.get_submodule(path) for path in subject.adapted.layers}
    dense = {path: layer for path, layer in layers.items() if not is_packed(layer)}
    dtype = DTYPES[subject.dtype]
    return [path for path, layer in dense.items() if size(layer) < size(subject.dense_base(path, dtype))]


def _merged_in_training(subject: Subject, xs: dict[str, Tensor], switched: set[str]) -> dict[str, Tensor]:
    """Merge in training mode while gradients are recorded, and return the outputs of the merged layers in eval mode.

    Then unmerge. switched: set to which a message is added for each module whose mode merging changes, and for each one that
    is in training mode after the model was put into eval mode and unmerged.
    """
    was_training = subject.model.training
    subject.model.eval()
    stubborn = {module for module in subject.model.modules() if module.training}  # whose `train()` does nothing
    subject.model.train()
    modes = {module: module.training for module in subject.model.modules()}
    with torch.enable_grad():
        subject.adapted.merge()
    switched |= _switched(modes)
    subject.model.eval()
    outputs = _merged_outputs(subject, xs)
    subject.adapted.unmerge()
    switched |= _switched(dict.fromkeys({*subject.model.modules()} - stubborn, False))
    subject.model.train(was_training)
    return outputs


def _merged_outputs(subject: Subject, xs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the outputs of the merged layers in eval mode."""
    for path in xs:
        subject.model.get_submodule(path).eval()  # not chained: not every library's `eval` returns the module
    return layer_outputs(subject, xs)


@check(States.WARM, depends_on_sizes=False, only_wide=True)
def check_unmerge(subject: Subject, case: Case) -> CheckResult:
    """Merging and unmerging restores every parameter and buffer of the model, to the last bit.

    A library that adds the update to the weight and subtracts it again loses low bits each time. On a server that
    changes adapters by merging, the weights would drift. A second merge, or a second unmerge, changes nothing.
    """
    if not subject.adapted.can_merge:
        return skipped(subject, case, "unmerge", "this adapter cannot be merged")
    fresh = case.attach_again()
    if fresh is None:
        return skipped(subject, case, "unmerge", "the case cannot attach again")
    load(fresh.adapted, subject.adapted.tensors(), subject.state())

    def copied() -> dict[str, Tensor]:
        return {name: t.detach().clone() for name, t in whole_model.tensors(fresh.model).items()}

    before = copied()
    fresh.adapted.merge()
    merged = copied()
    fresh.adapted.merge()
    twice = unchanged(whole_model.tensors(fresh.model), merged)
    if not twice.passed:
        return judged(subject, case, "unmerge", twice, "after merging twice")
    for _ in range(2):
        fresh.adapted.unmerge()
    return judged(subject, case, "unmerge", unchanged(whole_model.tensors(fresh.model), before))


@check(States.INIT, depends_on_sizes=False)
def check_detach(subject: Subject, case: Case) -> CheckResult:
    """Detaching restores the original base layers and their outputs, and every parameter and buffer of the model.

    This also holds after the adapted layers were used. Detaching freezes no parameter; parameters that the Method froze
    may stay frozen. No hook that attaching registered stays. Then the weights of the model are changed in place, and a
    second adapter is attached. It starts and computes like an adapter on a fresh copy of the changed model, also when
    both are merged. Detaching a merged adapter brings back the base layers, too; the check `unmerge` judges their
    values. No second adapter is attached to a quantised base, because its layers cannot be packed twice. Nothing keeps
    a detached layer in memory. Attaching leaves every module outside the adapted layers in training or eval mode, as it
    was.
    """
    fresh = case.attach_again()
    if fresh is None or fresh.original.model is None:
        return skipped(subject, case, "detach", "the case cannot attach again")
    xs = layer_inputs(fresh, case)
    trained = {id(p) for p in fresh.model.parameters() if p.requires_grad}
    _used(fresh, case)
    fresh.adapted.detach()
    odd = [f"{p} is not the base layer" for p, b in fresh.bases.items() if fresh.model.get_submodule(p) is not b]
    odd += [f"{n} is frozen" for n, p in fresh.model.named_parameters() if id(p) in trained and not p.requires_grad]
    odd += _left_hooks(fresh.model, fresh.original.model)
    odd += [] if fresh.packed else _other_modes(fresh.original.model, case)
    if odd:
        return from_problems(subject, case, "detach", odd)
    with torch.no_grad():
        outputs = exact(layer_outputs(fresh, xs), {path: fresh.original_base(path)(x) for path, x in xs.items()})
    weights = unchanged(whole_model.tensors(fresh.model), whole_model.tensors(fresh.original.model))
    found = [outputs, weights]
    if not fresh.packed and all(one.passed for one in found):
        models = fresh.model, copied(fresh.original.model)
        for parameter in (p for model in models for p in model.parameters()):
            parameter.data.mul_(-0.5)
        again, other = (case.attach_again(model=model) for model in models)
        mine, expected = (_start(one) | _used(one, case) for one in (again, other))
        found.append(prefix_tensor("attached again", exact(mine, expected)))
        if again is not None and other is not None and again.adapted.can_merge:
            for one in (again, other):  # both are merged now, so a flag that they share would show
                one.adapted.merge()
            with torch.no_grad():
                merged = (_merged_outputs(one, xs) for one in (again, other))
                found.append(prefix_tensor("merged while another model is merged", exact(*merged)))
            again.adapted.detach()
            odd = [path for path, base in again.bases.items() if again.model.get_submodule(path) is not base]
            if odd:
                problems = [f"detached while merged, {path} is not the base layer" for path in odd]
                return from_problems(subject, case, "detach", problems)
    layers = {path: weakref.ref(layer) for path, layer in fresh.adapted.layers.items()}
    bases = {id(base) for base in fresh.bases.values()}
    del fresh
    if not all(one.passed for one in found):
        return judged(subject, case, "detach", worst_of(found, "exact"))

    def kept_layers() -> list[str]:
        return [path for path, layer in layers.items() if (it := layer()) is not None and id(it) not in bases]

    if kept_layers():
        gc.collect()
    if kept := kept_layers():
        problems = [f"the adapted {path} stays in memory after it was detached and dropped" for path in kept]
        return from_problems(subject, case, "detach", problems)
    return judged(subject, case, "detach", worst_of(found, "exact"))


def _other_modes(model: nn.Module, case: Case) -> Iterator[str]:
    """Attach to a copy of the model in training mode and to one in eval mode. Yield a message if that switches a mode."""
    for training, name in ((True, "training"), (False, "eval")):
        modules = copied(model).train(training)
        before = {path: module for path, module in modules.named_modules() if not [*module.children()] or not path}
        if (attached := case.attach_again(model=modules)) is None:
            return
        layers = {id(one) for base in attached.bases.values() for one in base.modules()}
        if other := [path for path, one in before.items() if id(one) not in layers and one.training is not training]:
            yield f"attaching to a model in {name} mode switches the mode of {other[0] or 'the model'}"


def _left_hooks(model: nn.Module, original: nn.Module) -> list[str]:
    """Return a message for each module of `model` that differs from the same module of `original`.

    It may have more hooks on itself or on its parameters, another class, or a function in the place of its `forward`.
    """

    def hooks(module: nn.Module) -> int:
        found = [value for name, value in vars(module).items() if name.endswith("_hooks")]
        for parameter in module.parameters(recurse=False):
            found += [parameter._backward_hooks, getattr(parameter, "_post_accumulate_grad_hooks", None)]
        return sum(len(one) for one in found if isinstance(one, dict))

    def replaced(module: nn.Module) -> bool:
        own = vars(module).get("forward")
        return own is not None and getattr(own, "__func__", own) is not type(module).forward

    before, odd = dict(original.named_modules()), []
    for path, module in model.named_modules():
        if (other := before.get(path)) is None:
            continue
        where = path or "the model"
        odd += [f"{where} still has a hook that attaching registered"] if hooks(module) > hooks(other) else []
        odd += [f"{where} still has a forward of the adapter"] if replaced(module) and not replaced(other) else []
        odd += [f"{where} is a {type(module).__name__} now"] if type(module) is not type(other) else []
    return odd


def _start(subject: Subject | None) -> dict[str, Tensor]:
    """Return copies of the tensors that the Method added. Without a subject, return an empty dict."""
    return {} if subject is None else {name: t.detach().clone() for name, t in subject.added().items()}


def _used(subject: Subject | None, case: Case) -> dict[str, Tensor]:
    """Fill the added tensors with noise, run every layer forward and backward, and return outputs and gradients."""
    if subject is None:
        return {}
    warm(subject.added(), case.generator(salt=1))
    seen: dict[str, Tensor] = {}
    for index, (path, layer) in enumerate(subject.adapted.layers.items()):
        x, dy = inputs(subject.original_base(path), case.tokens, DTYPES[subject.dtype], case.generator(index))
        layer_seen = observe(layer, subject.tensors_of(path), x, dy, training=subject.trains_plainly)
        seen |= {f"{path}: {name}": tensor for name, tensor in layer_seen.items()}
    return seen


def layer_outputs(subject: Subject, xs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Run the model's layer at each path on its input in `xs`, and return the outputs by path."""
    return {path: subject.model.get_submodule(path)(x) for path, x in xs.items()}


def layer_inputs(subject: Subject, case: Case) -> dict[str, Tensor]:
    """Draw an input for each adapted layer, and return the inputs by path."""
    return {
        path: inputs(subject.original_base(path), case.tokens, DTYPES[subject.dtype], case.generator(index))[0]
        for index, path in enumerate(subject.adapted.layers)
    }
