"""Conformance tests for other projects: a decorator that makes pytest tests for a function, and helpers for layers.

    from harness.testing import conformance

    @conformance("nf4_dequantize", dtypes=["float32", "bfloat16"])
    def dequantize(packed, absmax, block, shape, dtype): ...

Each case of the parity suite becomes a test. The function need not be registered. Collecting the tests imports torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from harness.conformance import parity_suite
from harness.conformance.case_selection import FEW, CaseSelection
from harness.conformance.findings.outcomes import CheckOutcome, CheckStatus
from harness.conformance.findings.summary import failures
from harness.console import visible
from harness.errors import UsageError, did_you_mean
from harness.methods.registry import Implementation

if TYPE_CHECKING:
    from reference.shared.adapted import AdaptedLayers


@dataclass(frozen=True)
class Conforming:
    """A function under test. It implements a Method, an Operation or a quantisation of the base, or loads adapter files."""

    implementation: Implementation
    breadth: CaseSelection = FEW

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function, and return its result."""
        return self.implementation.function(*args, **kwargs)

    def cases(self) -> Iterator[tuple[str, Callable[[], list[CheckOutcome]]]]:
        """Yield pairs (name, run): one for each fixed case, and one for all randomly drawn cases together.

        `run` tests the case and returns the outcomes of its checks.
        """
        from harness.conformance.drawing import sample

        plan = parity_suite.load_plan(self.implementation.target)
        for case in sample.fixed(plan, self.breadth, self.implementation.dtypes):
            yield f"{case} {case.dtype}", partial(self._run, plan, case)
        if self.breadth.drawn:
            yield f"{self.breadth.drawn} drawn, seed {self.breadth.seed}", partial(self._search, plan)

    def _search(self, plan: parity_suite.ParitySuite) -> list[CheckOutcome]:
        from harness.conformance.drawing.search import search

        outcomes: list[CheckOutcome] = []
        search(plan, self.breadth, self.implementation.dtypes, lambda case: self._run(plan, case), outcomes.append)
        return outcomes

    def _run(self, plan: parity_suite.ParitySuite, case: parity_suite.AnyCase) -> list[CheckOutcome]:
        from harness.conformance.execution import suite_run

        return list(
            suite_run.run_case(self.implementation, plan, case, wide=self.breadth.is_wide, seed=self.breadth.seed)
        )


def verdict(tried: Iterable[CheckOutcome]) -> tuple[str, str]:
    """Return two texts: a line for each failed check, and the reason why no check passed or failed. Either may be empty."""
    every = list(tried)
    failed = [visible(line) for line in failures(every)]
    compared = any(one.status is CheckStatus.PASS for one in every)
    reasons = sorted({one.result.detail for one in every})
    return "\n".join(failed), "" if failed or compared else "; ".join(reasons)


def conformance(
    target: str,
    *,
    dtypes: Iterable[str] = ("float32", "bfloat16", "float16"),
    offers: Iterable[str] = (),
    full: bool = False,
    wide: bool = False,
    drawn: int = 0,
    seed: int = 0,
) -> Callable[[Callable[..., Any]], Conforming]:
    """Return a decorator that makes pytest tests for a function.

    target: the Method or Operation that the function implements, or `adapter_files`. For a Method, the function is its
    `attach`; for `adapter_files`, it returns a Loader (harness/methods/loader.py). offers: optional features of the
    Method that the function has, such as `lora_bias`; cases with other optional features are skipped. full: test every
    combination of config, shape and layer in the suite. By default, each config, shape and layer is tested at least
    once, most of them with fewer checks. wide: test all of them with all checks, and also a fixed sample of cases that
    covers pairs of settings. `wide` runs the check of call forms in every case instead of a few, and adds checks of
    unmerging, random sequences of calls and NaN. drawn: number of additional cases with random ranks and shapes. seed: seed
    of the additional cases.

    Raises UsageError if a name or dtype is unknown. Also raises it if the suite has no case in these dtypes, because a
    test without cases would always pass.
    """
    if not isinstance(target, str):
        raise UsageError("@conformance has no name", where="@conformance", hint='write @conformance("lora")')
    if not parity_suite.path_of(target).is_file():
        hint = did_you_mean(target, parity_suite.names())
        raise UsageError(f"no Method or Operation is called {target!r}", where="@conformance", hint=hint)
    kind, there = parity_suite.kind_of(target), parity_suite.load_plan(target).dtypes

    def wrap(function: Callable[..., Any]) -> Conforming:
        name = getattr(function, "__name__", "function").strip("<>")  # a lambda's is in brackets
        try:
            implementation = Implementation(name, kind, target, function, dtypes, offers=offers)  # type: ignore[arg-type]
        except (TypeError, ValueError) as error:
            raise UsageError(str(error), where="@conformance") from error
        if not set(implementation.dtypes) & set(there):
            what = f"the parity suite of {target} has no case in {', '.join(implementation.dtypes)}"
            raise UsageError(what, where="@conformance", hint=f"its dtypes are {', '.join(there)}")
        return Conforming(implementation, CaseSelection(full, drawn, seed, wide))

    return wrap


def wrap_layers(
    model: Any,
    config: Any,
    make_layer: Callable[[Any], Any],
    *,
    names: Mapping[str, str] | None = None,
    update: Callable[[Any], Any] | None = None,
) -> AdaptedLayers:
    """Freeze a model, replace every target layer, and return the adapted layers with named tensors.

    make_layer: function that takes the base nn.Linear and returns its replacement, a module with the trainable
    Parameters. names: maps the name of a tensor in the paper to an attribute of the replacement, e.g.
    `{"A": "lora_A"}`. By default, a tensor has the name of its Parameter. update: function that takes a replacement and
    returns the change of the base weight. Without it, the layers cannot be merged.

    The layers must implement every setting in `config`. For a config that they do not support, raise
    `harness.Unsupported`. This function raises it for a target that is not an nn.Linear (a Conv1D, an embedding, a
    convolution): to adapt these, return an `Adapted` (harness/methods/spec.py) instead. `state()` of the result is empty,
    so the checks compare no frozen tensors of the layers.
    """
    from harness.methods.wrap import wrap

    return wrap(model, config, make_layer, names, update)


def target_layers(model: Any, names: Iterable[str]) -> dict[str, Any]:
    """Map paths to the layers of a model that the `targets` of a config select, in the model's order.

    names: paths, ends of paths after a dot, `attention` or `all-linear`. A layer may also be a Conv1D, an embedding, a
    convolution or stacked experts: if your implementation does not adapt its kind, raise `harness.Unsupported`. Raises
    ValueError if a name matches no layer.
    """
    from reference.shared.layers import KINDS, targets

    return targets(model, [*names], KINDS)
