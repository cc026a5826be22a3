"""Check of the ways (forms) to call an implementation: modes of torch, layouts of the input, copies and repetition."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import partial
from itertools import chain, islice

import torch
from torch import Tensor, nn

from harness.conformance.case import Case
from harness.conformance.checks import States, check
from harness.conformance.comparison.base_layer import (
    TRAINED,
    judge_with_trained_base,
)
from harness.conformance.comparison.call_forms import (
    IMAGE_LAYOUTS,
    LAYOUTS,
    LONG_FORMS,
    LONG_RUN_FORM,
    MODES,
    REPEATED_FORM,
    ROWS,
    Call,
    Form,
    forms_without_gradients,
    layouts_with_gradients,
    same,
)
from harness.conformance.comparison.call_histories import HISTORIES, NEW_VALUES, NEW_VALUES_UNDER_AUTOCAST, is_packed
from harness.conformance.comparison.call_programs import PROGRAMS
from harness.conformance.comparison.check_results import judged, named_if_raised, prefix_tensor, skipped
from harness.conformance.comparison.derivatives import by_functorch, second_order
from harness.conformance.comparison.distant_weights import on_distant_weights
from harness.conformance.comparison.inputs import HALF, inputs, is_large
from harness.conformance.comparison.kept_memory import describe_leak, kept_after_backward
from harness.conformance.comparison.layer_autocast import (
    BACKWARD_UNDER_AUTOCAST,
    UNDER_AUTOCAST,
    UNDER_AUTOCAST_AFTER_CHANGE,
    judge_under_autocast,
    rounded_by_autocast,
)
from harness.conformance.comparison.layer_comparison import PlausibleResults, reference_runs, runs_of
from harness.conformance.comparison.observations import observe
from harness.conformance.comparison.operation_call import flatten
from harness.conformance.comparison.operation_forms import OperationForm, of_operation
from harness.conformance.comparison.other_dtypes import (
    BESIDE,
    COPY,
    judge_beside_another_dtype,
    judge_constants,
    judge_copy,
)
from harness.conformance.comparison.tolerance_policies import Judgement, noise_floor, worst_of
from harness.conformance.operation import OperationSubject
from harness.conformance.subject import DTYPES, ReferenceLayer, Subject, load
from harness.records.record import CheckResult
from reference.shared.layers import kind_of

TINY = 2.0**-13
"""Factor that makes a tensor of an adapter tiny. The adapter's update still exceeds the rounding errors of float32."""
LAYERS = 2
"""Largest number of adapted layers that `check_calls` calls."""


class LayerForm(StrEnum):
    """Names of the forms that this module adds to the tables of `call_forms` and `call_histories`.

    `{}` stands for the name of a tensor or a dtype.
    """

    ONE_TRAINED = "with only {} trained"
    ONE_ROW = "one row expanded"
    NO_TOKENS = "no tokens"
    AUTOCAST = UNDER_AUTOCAST
    AUTOCAST_AFTER = UNDER_AUTOCAST_AFTER_CHANGE
    BACKWARD_UNDER_AUTOCAST = BACKWARD_UNDER_AUTOCAST
    TINY = "with a tiny {}"
    SECOND_ORDER = "the gradient of a gradient"
    FUNCTORCH = "by torch.func"
    OTHER_DTYPE = COPY
    TWO_DTYPES = BESIDE
    TRAINED_BASE = TRAINED
    DROPPED = OperationForm.DROPPED.value


def forms() -> dict[str, list[str]]:
    """Return the names of all forms that the check `calls` tries, grouped by what is called."""
    return {
        "a layer, in layouts of its input": [*LAYOUTS, *IMAGE_LAYOUTS],
        "a layer": [*MODES, *HISTORIES, *PROGRAMS, *NEW_VALUES, *NEW_VALUES_UNDER_AUTOCAST, *LayerForm, *LONG_FORMS],
        "a layer without gradients; also in each layout": [*forms_without_gradients({})],
        "an Operation": [*OperationForm],
    }


_MOST_TENSORS = 60
"""Number of tensors among an Operation's arguments above which `calls` skips a case. 40 adapters have 80 tensors, and
would take minutes."""


@check(States.WARM, only_wide=True, also_in_representative_cases=True)
def check_calls(subject: Subject | OperationSubject, case: Case) -> CheckResult:
    """Every way to call an implementation gives what the reference gives for the same numbers.

    The ways are modes of torch, shapes and layouts of the input, earlier calls, copies, threads and more. A way that
    does not apply is left out: token numbers, for example, are not changed in place. copy.deepcopy must copy a layer.
    pickle may refuse a layer, but a pickled layer must compute the same as the original. No call may make memory grow, and
    after the backward pass a layer keeps neither its input nor its output.

    The gradients of the input and of the adapter's tensors can be differentiated again. If the first layer of a model
    has another dtype, the other layers compute the same as before, to the last bit. A layer does not change what its base
    layer returned.

    If an Operation compares no gradients, an output has no graph (`grad_fn`), unless that of the reference has one.
    """
    if isinstance(subject, OperationSubject):
        if len(flatten(subject.arguments)) > _MOST_TENSORS:
            return skipped(
                subject, case, "calls", f"more than {_MOST_TENSORS} tensors; only smaller cases try other ways to call"
            )
        found = [*of_operation(subject, case), *on_distant_weights(subject, case)]
    else:
        found = list(_of_layers(subject, case))
    if not found:
        return skipped(subject, case, "calls", "there is no layer to call")
    return judged(subject, case, "calls", worst_of(found, found[0].policy))


@dataclass
class _LayerJudge:
    """Judge of calls of one layer on one input."""

    subject: Subject
    case: Case
    path: str
    truth: dict[str, Tensor]
    """Output and gradients of the float64 reference."""
    draws: Iterable[Mapping[str, Tensor]]
    """Outputs and gradients that correct programs may compute."""
    passed: list[dict[str, Tensor]] = field(default_factory=list)
    """Outputs and gradients of the calls that passed. A later call passes at once if its results equal one of these bit
    for bit."""

    def __call__(
        self,
        name: str,
        mine: dict[str, Tensor],
        wanted: Collection[str],
        further: Iterable[Mapping[str, Tensor]] = (),
    ) -> Judgement:
        """Judge the output and the gradients `mine` of a call in the form `name`.

        wanted: names of the tensors that `mine` must have. further: results that correct programs may give in this
        form, in addition to those in `draws`.
        """
        expected = {n: t for n, t in self.truth.items() if n in wanted}
        known = ({n: one[n] for n in expected} for one in self.passed if expected.keys() <= one.keys())
        if mine.keys() == expected.keys() and any(same(mine, one) for one in known):
            return _named(self.path, name, Judgement(True, 0.0, 0.0, "y", "", "noise-floor", 0))
        draws = iter(self.draws)
        own = ({n: draw[n] for n in expected} for draw in chain(islice(draws, 1), further, draws))
        verdict = noise_floor(mine, expected, own, self.subject.dtype, self.case.factor("calls"))
        if verdict.passed and verdict.decided:
            self.passed.append(mine)
        return _named(self.path, name, verdict)


def _of_layers(subject: Subject, case: Case) -> Iterator[Judgement]:
    for index, path in enumerate(_called(subject, case)):
        base, layer = subject.original_base(path), subject.adapted.layers[path]
        generator = case.generator(index + 700)
        x, dy = inputs(base, ROWS, DTYPES[subject.dtype], generator, case.magnitude)
        tensors = subject.tensors_of(path)
        state = [tensor for name, tensor in subject.state().items() if name.startswith(f"{path}.")]
        numbers = [*tensors.values(), *state, *subject.bases[path].parameters()]
        packed = path in subject.packed or is_packed(layer)
        call = Call(layer, tensors, x, dy, subject.trains_plainly, numbers, packed)
        judge = _LayerJudge(subject, case, path, *reference_runs(subject, path, x, dy))
        # transformers' Conv1D itself takes no strided input.
        rows, images = isinstance(base, nn.Linear), isinstance(base, nn.Conv2d)
        layouts = LAYOUTS if rows else IMAGE_LAYOUTS if images else {}
        long = {} if index or case.is_brief else LONG_FORMS
        if case.is_drawn:
            left_out = [LONG_RUN_FORM, *([REPEATED_FORM] if is_large(numbers) else [])]
            long = {name: form for name, form in long.items() if name not in left_out}
        # The fixed choice of stacked experts depends on the number of rows, and so does the frequency of a token.
        whole = kind_of(base) == "experts" or getattr(base, "scale_grad_by_freq", False)
        apart = ("in micro-batches", "token by token") if whole else ()
        tried = layouts_with_gradients(layouts) | MODES | HISTORIES | PROGRAMS | long | forms_without_gradients(layouts)
        for name, form in tried.items():
            with named_if_raised(path, name):
                seen = None if name.endswith(apart) else form.run(call)
            if seen is not None:
                yield judge(name, seen, form.shown(judge.truth), _by_reference(subject, path, call, form))
        for name in call.tensors if len(call.tensors) > 1 else ():
            with named_if_raised(path, LayerForm.ONE_TRAINED.format(name)), _only_trained(call.tensors, name):
                seen = call.observe(call.x, call.dy)
            yield judge(LayerForm.ONE_TRAINED.format(name), seen, ["y", "grad x", f"grad {name}"])
        if kept := describe_leak(partial(call.observe, call.x, call.dy)):
            yield Judgement(False, None, None, path, f"memory grows with every call: {kept}", "exact", 0)
        if held := kept_after_backward(layer, tensors, x, dy, training=call.training):
            yield Judgement(False, None, None, f"{path} {', '.join(held)}", LayerForm.DROPPED, "exact", 0)
        yield from _with_new_values(subject, case, path, call)
        yield from (_named(path, TRAINED, one) for one in judge_with_trained_base(subject, case, path, call))
        if rows:
            yield from _with_other_rows(subject, case, path, call)
        if subject.dtype == "float32":
            yield from (_named(path, *one) for one in judge_under_autocast(subject, case, path, call))
            yield from _untrained(subject, case, path, call)
    yield from _derivatives(subject, case)
    by_dtype = judge_copy(subject, case), judge_constants(subject, case), judge_beside_another_dtype(subject, case)
    yield from (_named(*one) for one in chain.from_iterable(by_dtype))


def _called(subject: Subject, case: Case) -> list[str]:
    """Return the paths of the layers to call: the first two. In a brief case, return only the first if both are linear."""
    paths = list(subject.adapted.layers)[:LAYERS]
    alike = all(kind_of(subject.original_base(path)) in ("linear", "Conv1D") for path in paths)
    return paths[:1] if case.is_brief and alike else paths


def _by_reference(subject: Subject, path: str, call: Call, form: Form) -> Iterator[dict[str, Tensor]]:
    """Yield the result of the reference's layer in `form`, if a correct layer rounds differently in this form."""
    if form.rounds_differently:
        own = subject.reference(path, subject.dtype)
        seen = form.run(replace(call, layer=own.layer, tensors=own.tensors, numbers=()))
        if seen is not None:
            yield seen


def _with_new_values(subject: Subject, case: Case, path: str, call: Call) -> Iterator[Judgement]:
    """Yield judgements of copies of the layer whose tensors were halved between two calls. The second call is judged."""
    autocast = NEW_VALUES_UNDER_AUTOCAST if subject.dtype == "float32" else {}
    found = dict[str, dict[str, Tensor]]()
    for name, form in (NEW_VALUES | autocast).items():
        with named_if_raised(path, name):
            if (seen := form.run(call)) is not None:
                found[name] = seen
    if not found:
        return

    def halved(dtype: str) -> ReferenceLayer:
        reference = subject.reference(path, dtype)
        layer = reference.layer
        with torch.no_grad():
            for tensor in {id(t): t for t in (*layer.parameters(), *layer.buffers())}.values():
                if tensor.is_floating_point():
                    tensor.mul_(HALF)
        return reference

    wide, own = halved("float64"), halved(subject.dtype)
    runs = runs_of(wide, own, subject.dtype, call.x, call.dy, narrow=partial(halved, "float32"))
    judge = _LayerJudge(subject, case, path, *runs)
    rounded = PlausibleResults({"y": draw["y"]} for draw in rounded_by_autocast(own, call, "bfloat16"))
    for name, one in found.items():
        if name in autocast:
            verdict = noise_floor(one, {"y": judge.truth["y"]}, rounded, "bfloat16", case.factor("calls", "bfloat16"))
            yield _named(path, name, verdict)
        else:
            yield judge(name, one, NEW_VALUES[name].shown(judge.truth))


def _with_other_rows(subject: Subject, case: Case, path: str, call: Call) -> Iterator[Judgement]:
    """Yield judgements of calls with other rows: one row expanded to several, and an input (2, 0, D) without rows."""
    D, E = call.x.shape[-1], call.dy.shape[-1]
    for name, x, dy in (
        (LayerForm.ONE_ROW, call.x[:1].expand(ROWS, D), call.dy[:1].expand(ROWS, E)),
        (LayerForm.NO_TOKENS, call.x[:0].view(2, 0, D), call.dy[:0].view(2, 0, E)),
    ):
        with named_if_raised(path, name):
            mine = observe(call.layer, call.tensors, x, dy, training=call.training)
        truth, draws = reference_runs(subject, path, x, dy)
        yield _named(path, name, noise_floor(mine, truth, draws, subject.dtype, case.factor("calls")))


def _untrained(subject: Subject, case: Case, path: str, call: Call) -> Iterator[Judgement]:
    """Yield judgements of the output while one adapter tensor is tiny, as after the first steps of training.

    The layer runs in eval mode and without gradients. Some tensors are left out, such as DoRA's m: if m is tiny, the
    update cancels nearly all of the base layer's output, and rounding errors dominate the small remainder.
    """
    before = float(call.output(training=False)["y"].double().norm())
    for name, tensor in call.tensors.items():
        held = tensor.detach().clone()
        try:
            with torch.no_grad():
                tensor.mul_(TINY)
                seen = call.output(training=False)
            truth, draws = reference_runs(subject, path, call.x, call.dy[:0])
            if float(truth["y"].norm()) > TINY**0.5 * before:
                verdict = noise_floor(seen, truth, draws, subject.dtype, case.factor("calls"))
                yield _named(path, LayerForm.TINY.format(name), verdict)
        finally:
            load(subject.adapted, {f"{path}.{name}": held})


@contextmanager
def _only_trained(tensors: Mapping[str, Tensor], name: str) -> Iterator[None]:
    """Let only the tensor `name` require a gradient inside this context. LoRA-FA, for example, trains one factor."""
    others = [tensor for key, tensor in tensors.items() if key != name]
    for tensor in others:
        tensor.requires_grad_(False)
    try:
        yield
    finally:
        for tensor in others:
            tensor.requires_grad_(True)


def _derivatives(subject: Subject, case: Case) -> Iterator[Judgement]:
    """Yield judgements of the second derivatives of the first layer, and of its derivatives by torch.func."""
    path = next(iter(subject.adapted.layers), None)
    if path is None:
        return
    layer, tensors = subject.adapted.layers[path], subject.tensors_of(path)
    x, dy = inputs(subject.original_base(path), ROWS, DTYPES[subject.dtype], case.generator(720))
    own, factor = subject.reference(path, subject.dtype), case.factor("calls")
    if x.is_floating_point() and second_order(own.layer, own.tensors, x, dy):
        truth, draws = reference_runs(subject, path, x, dy, run=second_order)
        with named_if_raised(path, LayerForm.SECOND_ORDER):
            mine = second_order(layer, tensors, x, dy)
        verdict = noise_floor(mine, truth, draws, subject.dtype, factor)
        yield _named(path, LayerForm.SECOND_ORDER, verdict)
    with named_if_raised(path, LayerForm.FUNCTORCH):
        seen = by_functorch(layer, tensors, x, dy) if x.is_floating_point() else None
    if seen:
        truth, draws = reference_runs(subject, path, x, dy, run=by_functorch)
        known = ({n: t for n, t in draw.items() if n in seen} for draw in draws)
        expected = {n: t for n, t in truth.items() if n in seen}
        yield _named(path, LayerForm.FUNCTORCH, noise_floor(seen, expected, known, subject.dtype, factor))


def _named(path: str, form: str, judgement: Judgement) -> Judgement:
    return prefix_tensor(f"{path} {form}" if path else form, judgement)
