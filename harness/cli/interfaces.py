"""Describe, for `explain`, how an implementation is called and what it returns. The facts come from example calls.

Imports torch. `topics` imports this module only to explain a Method or an Operation.
"""

from __future__ import annotations

import importlib
import inspect
import textwrap
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from harness.conformance import checks, operations, parity_suite
from harness.conformance.case_selection import FEW
from harness.conformance.comparison.operation_call import flatten
from harness.conformance.drawing import sample
from harness.conformance.drawing.factors import Factor
from harness.conformance.execution import suite_run
from harness.conformance.operation import Arguments, Operation, cloned
from harness.conformance.parity_suite import MethodSuite, OperationSuite
from harness.conformance.subject import DTYPES
from harness.methods.registry import discover, optional_features
from harness.methods.spec import Adapted, in_digits, method_info, methods
from reference.shared.adapted import AdaptedLayer, AdaptedModel
from reference.shared.layers import KINDS, LINEAR, kind_of
from reference.spec import ReferenceSpec

_STARTS = ("reference.shared.lora_start", "reference.lora_experts")
"""Modules with functions that draw start values."""


def of_operation(name: str) -> Iterator[str]:
    """Yield lines of text about the arguments, the outputs, the gradients and the settings of an Operation."""
    operation, plan = operations.every()[name], parity_suite.load_operation(name)
    case = parity_suite.OperationCase(max(plan.values, key=lambda values: len(str(values))), "float32")
    arguments = operation.arguments(DTYPES[case.dtype], torch.Generator().manual_seed(0), **case.values)
    yield from _wrapped_doc(operation.arguments, "what a case draws")
    yield f"an implementation is called with keywords, for example in {case.dtype} and the case {case}:"
    yield from (f"  {key}: {_form(value)}" for key, value in arguments.items())
    drawn = [operation.arguments(DTYPES[case.dtype], torch.Generator(), **values) for values in plan.values]
    absent = [key for one in drawn for key, value in one.items() if value is None]
    absent += [
        f"an item of {k}"
        for one in drawn
        for k, v in one.items()
        if isinstance(v, list) and any(item is None for item in v)
    ]
    if absent:
        yield f"  may be None: {', '.join(dict.fromkeys(absent))}"
    yield from _returned(operation, arguments)
    if operation.differentiable:
        yield f"compared gradients: of {', '.join(operation.differentiable)}"
        if "calls" in plan.checks:
            yield "a second derivative, also by the incoming gradient, is right, or computing it raises RuntimeError"
    elif "calls" in plan.checks:
        graphs = _graphs(operation, arguments)
        yield f"no gradients are compared; outputs{f' other than {graphs}' if graphs else ''} must have no graph"
    else:
        yield "no gradients are compared"
    if "calls" in plan.checks:
        yield "floating-point arguments may require gradients"
    yield "arguments may have any strides; no call changes its arguments or what an earlier call returned"
    yield "arguments may change in place between two calls, without a change of `_version`, as in a fused optimizer step"
    yield "no result depends on torch's default dtype; repeated calls do not make memory grow"
    if operation.differentiable and "calls" in plan.checks:
        yield "under autocast, the outputs may stay in float32, but have the same dtype for one row of x as for several"
    yield from _arithmetic(name)
    yield from ("", *_examples(plan), "")
    yield from _settings(plan)


def of_method(name: str) -> Iterator[str]:
    """Yield lines of text about the tensors, the state and the optional functions of a Method's reference."""
    plan = parity_suite.load(name)
    reference = discover(only=["reference"]).find("method", name, "reference")
    config = next((config for config in plan.configs if 1 < config.get("rank", 0) < 32), plan.configs[0])
    shape = next((shape for shape in plan.shapes if shape.inputs != shape.outputs), plan.shapes[0])
    subject, _ = suite_run.attach(reference, plan, parity_suite.MethodCase(config, plan.layers[0], shape, "float32"))
    sides = f"{shape.inputs} inputs and {shape.outputs} outputs"
    yield f"after `attach` with {parity_suite.in_words(config) or 'the defaults'}, a layer `first` with {sides} has:"
    adapted = subject.adapted
    constants = method_info(plan.method).spec.start_from_config
    doc = " ".join((inspect.getdoc(importlib.import_module(f"reference.{name}").attach) or "").split())
    yield f"  attach: {doc}"
    named = [(key, value, "trained") for key, value in adapted.tensors().items()]
    for key, value in adapted.state().items():
        kept = "" if key.rpartition(".")[2] in constants else " and in the model's state_dict"
        named.append((key, value, f"in `state()`{kept}"))
    there = [one for one in named if one[0].startswith("first")]
    yield from (f"  {key}: {_form(value)}, {_start(value)}; {title}" for key, value, title in there)
    if adapted.tensors() and hasattr(subject.config, "targets") and not subject.added():
        yield "  a weight that two targets share has an entry in `tensors()` under each of its names"
    yield from _work(adapted)
    yield from _optimizer_state(adapted)
    yield from _parts(name)
    yield from ("", *_layers(plan), "", *_differences(method_info(plan.method).spec), "", *_examples(plan), "")
    yield from _settings(plan)


def _parts(name: str) -> Iterator[str]:
    """Yield the docstrings of the layers in a Method's reference, and of the functions that draw their start values."""
    found = vars(importlib.import_module(f"reference.{name}")).values()
    layers: list[Any] = [one for one in found if inspect.isclass(one) and AdaptedLayer in one.__mro__[1:]]
    starts = [one for one in found if inspect.isfunction(one) and one.__module__ in _STARTS]
    if layers:
        yield "  layers and start values in its reference:"
    for part in dict.fromkeys((*layers, *starts)):
        yield f"    {part.__name__}: {' '.join((inspect.getdoc(part) or '').split())}"


def _optimizer_state(adapted: Adapted) -> Iterator[str]:
    """Yield lines about the state of the Method's own optimizer after a step: the name and form of each entry.

    If the Method has no optimizer of its own, yield nothing.
    """
    if (optimizer := adapted.optimizer(1e-3, 0.0)) is None:
        return
    for parameter in adapted.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for name, tensor in adapted.tensors().items():
        if name.startswith("first"):
            yield f"  {name}: after a step, the state of its optimizer in the reference has"
            yield from (f"    {key}: {_form(value)}" for key, value in optimizer.state[tensor].items())


def _layers(plan: MethodSuite) -> Iterator[str]:
    """Yield the kinds of layers in the Cases, and rules that every implementation must follow."""
    yield f"kinds of layers in its cases: {', '.join(plan.layers)}"
    if opt_in := [*optional_features(plan.method)]:
        yield f"tried only if the implementation names them in `offers`: {', '.join(opt_in)}"
    if set(plan.layers) - {*LINEAR}:
        _, kinds, text = (inspect.getdoc(kind_of) or "").partition("linear:")
        yield f"  {' '.join((kinds + text.partition('Other subclasses')[0]).split())}"
    if "targets" in plan.checks:
        yield "targets: a model without `base_model_prefix` has no head; it need not have `get_output_embeddings`"
        yield "  `attention` and `all-linear` also select Conv1D, and raise ValueError if the Method does not adapt it"
        yield "  a name that matches no layer which the Method adapts raises ValueError; so does a name that also matches"
        yield f"  a layer of one of these kinds that the Method does not adapt: {', '.join(KINDS)}"
        yield "  other modules that a name matches, e.g. norms, are ignored"
    yield "rules that the checks test:"
    yield from (f"  {rule}" for rule in _rules(plan))


def _rules(plan: MethodSuite) -> Iterator[str]:
    if "targets" in plan.checks:
        yield "targets: " + " ".join(checks.docstrings()["targets"].split()).partition(". ")[2]
        yield "the trunk is the submodule that the model's `base_model_prefix` names; what is beside it is a head"
        yield "the layer that computes logits is the one that the model's `get_output_embeddings()` returns"
    yield "the checks copy layers and models by copy.deepcopy, so an implementation must allow that; a copy shares no tensor"
    yield "fused AdamW, bitsandbytes and `.data` do not increment the `_version` of what they change: no cache may use it"
    yield "if a base weight requires a gradient, the layer computes this gradient, or raises RuntimeError or ValueError"
    yield "an input that requires a gradient gets one, even if nothing in the layer is trained"
    if "calls" in plan.checks:
        yield "a backward pass under autocast gives the gradients, or raises RuntimeError"
    if "shared_input" in plan.checks:
        yield "layers that get the same input compute the same as alone; a layer whose output is unused gets no gradient"
    if "closure" in plan.checks:
        yield "if the optimizer raises for a gradient, the tensor and its state do not change, and the step is not counted"
    if "refresh" in plan.checks:
        yield "the tensors of the optimizer's state keep at most twice their bytes in memory: clone a slice of a larger one"
    if "save" in plan.checks:
        yield "after load_state_dict(assign=True), `tensors()` and `parameters()` return the new parameters"


def _returned(operation: Operation, arguments: Arguments) -> Iterator[str]:
    yield f"and returns {'a tensor' if len(operation.outputs) == 1 else 'a tuple of tensors, in this order'}:"
    outputs = operation.named(operation.reference(**arguments))
    yield from (f"  {key}: {_form(value)}" for key, value in outputs.items())
    yield from _wrapped_doc(operation.reference, "the reference")


def _graphs(operation: Operation, arguments: Arguments) -> str:
    """Return the names of the outputs that have a graph if the arguments require gradients, with commas between them."""
    given = cloned(arguments)
    for tensor in flatten(given).values():
        tensor.requires_grad_(tensor.is_floating_point())
    outputs = operation.named(operation.reference(**given))
    return ", ".join(name for name, tensor in outputs.items() if tensor.requires_grad)


def _arithmetic(name: str) -> Iterator[str]:
    """Yield the docstrings of the reference code that an Operation uses, and the Methods whose arithmetic it shares.

    This code is in the files of reference/operations/ from which the module of the Operation imports.
    """
    used = vars(importlib.import_module(f"{operations.__name__}.{name}")).values()
    found = {one.__name__ if inspect.ismodule(one) else getattr(one, "__module__", "") for one in used}
    shared = sorted(one for one in methods() if f"reference.{one}" in found)
    yield from (f"its arithmetic is that of the Method {one}: `peft-harness explain {one}`" for one in shared)
    for file in sorted(one for one in found if one.startswith("reference.operations.")):
        module = importlib.import_module(file)
        yield from ("", f"{file.replace('.', '/')}.py:")
        yield from (f"  {line}" for line in (inspect.getdoc(module) or "").splitlines())
        if spec := getattr(module, "SPEC", None):
            yield from (f"  {line}" for line in _differences(spec))
        for key, function in vars(module).items():
            if inspect.isfunction(function) and function.__module__ == file and not key.startswith("_"):
                yield f"  {key}({', '.join(inspect.signature(function).parameters)})"
                yield from (f"    {line}" for line in (inspect.getdoc(function) or "").splitlines())


def _differences(spec: ReferenceSpec) -> Iterator[str]:
    """Yield lines about where a reference differs from its paper, or decides what the paper leaves open."""
    if spec.deviations:
        yield "differences from the paper, and what it leaves open:"
    for one in spec.deviations:
        yield f"  {one.topic}"
        for label, text in (("paper", one.paper), ("here", one.here), ("why", one.why)):
            yield from textwrap.wrap(text, 100, initial_indent=f"    {label + ':':<7}", subsequent_indent=" " * 11)


def _work(adapted: Adapted) -> Iterator[str]:
    """Yield a line for each optional function of the Method's reference, such as `regularizer`."""
    for name in ("regularizer", "optimizer", "after_step", "merge", "unmerge"):
        function = getattr(type(adapted), name)
        if function is not getattr(AdaptedModel, name):
            doc = " ".join((inspect.getdoc(function) or "").split())
            yield f"  {name}: {doc}"


def _examples(plan: MethodSuite | OperationSuite) -> Iterator[str]:
    """Yield the cases that `check` tries by default, each with its dtypes.

    Brief cases are left out, except those with large tensors. `_settings` lists their values.
    """
    dtypes: dict[str, list[str]] = {}
    listed = (case for case in sample.fixed(plan, FEW, plan.dtypes) if case.is_large or not case.is_brief)
    for case in listed:
        dtypes.setdefault(str(case), []).append(case.dtype)
    shape = ", with rows x inputs x outputs" if isinstance(plan, MethodSuite) else ""
    yield f"cases that `check` tries without an option{shape}"
    rest = "of each kind of layer" if isinstance(plan, MethodSuite) else "with each value of a switch"
    yield f"(most checks run in the typical case, in one of 16 bits, and in one {rest}):"
    yield from (f"  {case} ({', '.join(sorted(tried))})" for case, tried in dtypes.items())
    further = "  and, with the fewest checks, every further value below once"
    if isinstance(plan, MethodSuite):
        yield f"{further}, except those of {', '.join(sample.LEFT_OUT[:-1])} and {sample.LEFT_OUT[-1]}"
    else:
        yield f"{further}, and pairs of values: all words and switches, the first and last of the numbers"


_MEANINGS = {
    "sides": "input and output features of the first layer; the second one maps back",
    "model": "plain: two layers to adapt. wide: also a larger layer that stays as it is and, if "
    "linear, q_proj, k_proj and v_proj with the same input. deep: ten layers to adapt. tied: "
    "two of them share a weight",
    "magnitude": "the input. large, huge: multiplied by a power of two. small, tiny: divided by one. outlier: one feature "
    "is 64 times as large. zero-rows: every second row is 0. constant: all 1. positive: no signs",
    "weights": "size of the base weights, likewise",
}


def _settings(plan: MethodSuite | OperationSuite) -> Iterator[str]:
    yield "settings, with their values and the bounds of --drawn:"
    for name, factor in sample.factors(plan, plan.dtypes).items():
        levels = ", ".join(map(_shown, (*factor.levels, *factor.extremes)))
        yield f"  {name}: {levels}{_bounds(factor)}"
        if name in _MEANINGS:
            yield f"    {_MEANINGS[name]}"


def _bounds(factor: Factor) -> str:
    if factor.dimensions and factor.least is None:
        return "; drawn: other sizes"
    if factor.least is None or factor.most is None:
        return ""
    return f"; drawn: {in_digits(factor.least)} to {in_digits(factor.most)}{' each' if factor.dimensions else ''}"


def _shown(value: Any) -> str:
    return f"[{', '.join(map(str, value))}]" if isinstance(value, tuple) else str(value)


def _form(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {_shown(tuple(value.shape))}"
    if isinstance(value, list | tuple) and value and isinstance(value[0], Tensor | list | tuple):
        return f"a list of {len(value)}: {'; '.join(map(_form, value))}"
    if isinstance(value, dict):
        return f"a dict of {len(value)}: {'; '.join(f'{key!r}: {_form(one)}' for key, one in value.items())}"
    return str(value)


def _start(tensor: Tensor) -> str:
    values = tensor.detach().double()
    if not tensor.is_floating_point():
        return "integers"
    if bool((values == values.flatten()[0]).all()):
        return f"all {float(values.flatten()[0]):g} at the start"
    return f"root mean square {float(values.square().mean().sqrt()):.3g} at the start"


def _wrapped_doc(function: object, subject: str) -> Iterator[str]:
    doc = inspect.getdoc(function)
    if doc:
        yield f"{subject}: {' '.join(doc.split())}"
