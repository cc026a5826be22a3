"""The command `bench`: no speed without parity, samples, files, exports, and the compared implementations."""

from __future__ import annotations

import gc
import itertools
import json
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from random import Random
from types import MethodType
from typing import Any, ClassVar
from unittest.mock import MagicMock

import pytest
import torch

from harness.assets.environments.folder import MadeEnvironment
from harness.bench import (
    card,
    gpu,
    matrix_flops,
    operation_benchmark,
    planning,
    pytest_benchmark,
    results,
    step_benchmark,
    table,
    timed_call,
    timing,
)
from harness.bench import operations as timed_operations
from harness.bench import run as command
from harness.bench.adapted_llama import AdaptedLlama, StepSetting
from harness.bench.planning import BenchRequest, BenchTask
from harness.bench.results import BenchRow, Ceilings, Samples
from harness.bench.sizes import MOST_PRODUCTS, MOST_WEIGHTS, SHAPES, BenchSize, sizes
from harness.bench.steps import STEPS, Backbone
from harness.cli import main
from harness.conformance import operations, parity_suite
from harness.conformance.case import Case
from harness.conformance.findings.outcomes import CheckOutcome, DeviceLostError
from harness.errors import Exit, StoreError, Unsupported, UsageError
from harness.methods.implementations import torch_compile
from harness.methods.registry import Implementation, Registry, discover, implements
from harness.records.environment import describe
from harness.records.record import CheckResult, Outcome
from reference.galore import attach
from support import recorded_run

CPU = torch.device("cpu")
SMALL = BenchSize("tiny", 32, 48, 5, 4)
LITTLE = Backbone(layers=1, width=32, mlp=48, heads=2, kv_heads=1, vocabulary=64, batch=2, tokens=16, features=48)


@pytest.fixture(scope="module")
def registry() -> Registry:
    return discover()


@pytest.fixture(autouse=True)
def low_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure the rates with tiny sizes."""
    monkeypatch.setattr("harness.bench.ceilings.COPIED_B", {"cpu": 2**16})
    monkeypatch.setattr("harness.bench.ceilings.SIDE", {"cpu": 32})
    monkeypatch.setattr(timing, "LEAST_S", 1e-4)


def offered(name: str, target: str, function: Callable[..., Any], kind: Any = "operation") -> Implementation:
    return implements(target, name=name, kind=kind, dtypes=["float32"])(function)


def reference(target: str) -> Callable[..., Any]:
    return operations.every()[target].reference


def setting(name: str, registry: Registry, device: torch.device = CPU) -> StepSetting:
    return StepSetting(name, LITTLE, "float32", device, registry)


def benchmark_of(
    other: Implementation, registry: Registry, target: str = "lora_linear", pairs: int = 6
) -> operation_benchmark.OperationBenchmark:
    ours = registry.find("operation", target, "reference")
    return operation_benchmark.OperationBenchmark(target, ours, other, "float32", CPU, pairs, {"threads": 1})


def rows(other: Implementation, registry: Registry, target: str = "lora_linear", pairs: int = 6) -> list[BenchRow]:
    return list(benchmark_of(other, registry, target, pairs).rows(SMALL))


def row(**more: Any) -> BenchRow:
    check = CheckResult(check="lora_linear/outputs/float32/call", outcome=Outcome.PASS, error=0.1, allowed=0.4)
    tried = CheckOutcome(
        implementation="acme", kind="operation", target="lora_linear", dtype="float32", case="", result=check
    )
    given: dict[str, Any] = {
        "name": "lora_linear", "shape": "square 8x8, 2 tokens", "dtype": "float32", "device": "cpu", "ours": "fused",
        "other": "acme", "outcome": "measured", "parity": [tried], "bytes": 4e6, "flops": 1e6,
        "samples": Samples(
            ours=[0.001, 0.002, 0.001, 0.001, 0.004, 0.001], other=[0.002] * 6, first=["ours", "other"] * 3,
            calls={"ours": 5, "other": 3},
        ),
        "ceilings": Ceilings(copy_B_per_s=8e9, gemm_FLOP_per_s=1e11),
    }  # fmt: skip
    return BenchRow(**given | more)


# ---- no speed without parity


@pytest.mark.slow
def test_equal_implementations_are_timed_forward_and_backward(registry: Registry) -> None:
    forward, backward = rows(offered("acme", "lora_linear", reference("lora_linear")), registry)
    assert [forward.name, backward.name] == ["lora_linear", "lora_linear+backward"]
    for one in (forward, backward):
        assert one.outcome == "measured", one.because
        assert one.samples is not None
        assert len(one.samples.ours) == len(one.samples.other) == len(one.samples.first) == 6
        assert min(one.samples.ours + one.samples.other) > 0
        assert set(one.samples.warmup) == {"ours", "other"}
        assert one.ratio is not None
        assert one.share(one.samples.ours) is not None
    checks = {(t.implementation, t.result.check) for t in backward.parity}
    wanted = {f"lora_linear/{name}/float32/call" for name in ("outputs", "backward", "timed_call")}
    assert checks == {(who, check) for who in ("reference", "acme") for check in wanted}


@pytest.mark.slow
def test_the_first_side_alternates(registry: Registry) -> None:
    forward, _ = rows(offered("acme", "lora_linear", reference("lora_linear")), registry)
    assert forward.samples is not None
    first = forward.samples.first
    assert all(a != b for a, b in pairwise(first))


def test_a_wrong_output_gets_no_speed(registry: Registry) -> None:
    def wrong(**given: Any) -> Any:
        return reference("lora_linear")(**given) * 1.001

    for one in rows(offered("acme", "lora_linear", wrong), registry):
        assert (one.outcome, one.samples, one.has_unexplained_failure) == ("refused", None, True)
        assert "acme fails lora_linear/outputs/float32/call" in one.because
        assert "refused: no parity" in "\n".join(table.lines([one]))


@pytest.mark.slow
def test_a_wrong_gradient_gets_no_speed_of_training_but_one_of_the_call(registry: Registry) -> None:
    def wrong(**given: Any) -> Any:
        return reference("lora_linear")(**given | {"A": given["A"].detach()})

    forward, backward = rows(offered("acme", "lora_linear", wrong), registry)
    assert forward.outcome == "measured"
    assert (backward.outcome, backward.samples) == ("refused", None)
    assert "lora_linear/backward" in backward.because


def test_unwritten_codes_get_no_speed(registry: Registry) -> None:
    def lazy(**given: Any) -> Any:
        p, m, m_absmax, v, v_absmax = reference("adamw8bit_step")(**given)
        return p, torch.zeros_like(m), m_absmax, torch.zeros_like(v), v_absmax

    (one,) = rows(offered("acme", "adamw8bit_step", lazy), registry, "adamw8bit_step")
    assert (one.outcome, one.has_unexplained_failure) == ("refused", True)
    assert "output_codes" in one.because


def test_the_checks_before_a_step_of_galore_are_checks_of_its_suite() -> None:
    assert set(step_benchmark.JUDGED_CHECKS) <= set(parity_suite.load("galore").checks)


# The faults that leaderboards of kernels met. Each passes the checks of parity, and cheats in the timed call alone.
def _cached_by_tensor() -> Callable[..., Any]:
    kept: dict[int, tuple[Any, Any]] = {}

    def call(**given: Any) -> Any:
        key = given["x"].data_ptr()
        if key not in kept:
            kept[key] = given["x"], reference("lora_linear")(**given)
        return kept[key][1]

    return call


def _cached_by_version() -> Callable[..., Any]:
    kept: dict[Any, tuple[Any, Any]] = {}

    def call(**given: Any) -> Any:
        key = tuple((t.data_ptr(), t._version) for t in given.values() if isinstance(t, torch.Tensor))
        if key not in kept:
            kept[key] = given, reference("lora_linear")(**given)
        return kept[key][1]

    return call


def _cached_by_a_row() -> Callable[..., Any]:
    kept: dict[bytes, Any] = {}

    def call(**given: Any) -> Any:
        key = given["x"][..., 0, :].detach().numpy().tobytes()
        if key not in kept:
            kept[key] = reference("lora_linear")(**given)
        return kept[key]

    return call


def _cached_by_shape_once_warm() -> Callable[..., Any]:
    kept: list[Any] = []

    def call(**given: Any) -> Any:
        kept.append(reference("lora_linear")(**given) if len(kept) < WARM else kept[-1])
        return kept[-1]

    return call


def _zeros_once_warm() -> Callable[..., Any]:
    count = itertools.count()

    def call(**given: Any) -> Any:
        return reference("lora_linear")(**given) * (next(count) < WARM)

    return call


def _written_later() -> Callable[..., Any]:
    """Return an output which a thread fills in once the calls are warm."""
    count = itertools.count()

    def call(**given: Any) -> Any:
        if next(count) < WARM:
            return reference("lora_linear")(**given)
        into = torch.zeros(*given["x"].shape[:-1], given["W"].shape[0])
        threading.Timer(0.02, lambda: into.copy_(reference("lora_linear")(**given))).start()
        return into

    return call


class Lazy(torch.Tensor):
    """A tensor that could compute its values when they are read."""


def _lazy() -> Callable[..., Any]:
    return lambda **given: reference("lora_linear")(**given).as_subclass(Lazy)


def _lazy_in_some_calls() -> Callable[..., Any]:
    count = itertools.count()

    def call(**given: Any) -> Any:
        y = reference("lora_linear")(**given)
        return y.as_subclass(Lazy) if next(count) in range(WARM, WARM + 8) else y

    return call


WARM = 10
"""Number of calls after which these faults begin: more than the checks of parity take."""


TIMED_WRONG = "a result from the timing is wrong"


SAME = "it returns the same result"


@pytest.mark.parametrize(
    ("fault", "large", "why"),
    [
        (_cached_by_tensor, False, TIMED_WRONG),
        (_cached_by_tensor, True, TIMED_WRONG),
        (_cached_by_version, False, TIMED_WRONG),
        (_cached_by_version, True, TIMED_WRONG),
        (_cached_by_a_row, False, TIMED_WRONG),
        (_cached_by_shape_once_warm, False, TIMED_WRONG),
        (_cached_by_shape_once_warm, True, SAME),
        (_zeros_once_warm, False, TIMED_WRONG),
        (_zeros_once_warm, True, SAME),
        (_written_later, False, TIMED_WRONG),
        (_written_later, True, SAME),
        (_lazy, False, "y is a Lazy, no Tensor"),
        (_lazy_in_some_calls, False, "y is a Lazy, no Tensor"),
    ],
)
def test_a_call_that_is_right_only_outside_timing_gets_no_speed(
    registry: Registry, monkeypatch: pytest.MonkeyPatch, fault: Callable[[], Callable[..., Any]], large: bool, why: str
) -> None:
    """large: True for a size that is too large for the reference."""
    # With another seed, every kept result may come from a right call by chance.
    monkeypatch.setattr(timed_call, "Random", lambda: Random(0))
    if large:
        monkeypatch.setitem(MOST_PRODUCTS, "cpu", SMALL.weights)
    acme = offered("acme", "lora_linear", fault())
    forward = next(iter(benchmark_of(acme, registry).rows(SMALL)))
    assert (forward.outcome, forward.samples, forward.has_unexplained_failure) == ("refused", None, True)
    assert "acme fails lora_linear/timed_call/float32/call" in forward.because
    assert why in forward.because


def test_codes_that_are_decoded_only_once_get_no_speed(registry: Registry) -> None:
    kept: dict[Any, tuple[Any, Any]] = {}

    def cached(**given: Any) -> Any:
        packed, absmax = given["packed"], given["absmax"]
        key = packed.data_ptr(), int(packed.sum())
        if key not in kept:
            kept[key] = packed, reference("nf4_dequantize")(**given | {"absmax": torch.ones_like(absmax)})
        levels = kept[key][1]
        return (levels.view(len(absmax), -1) * absmax[:, None]).view(levels.shape)

    (one,) = rows(offered("acme", "nf4_dequantize", cached), registry, "nf4_dequantize")
    assert (one.outcome, one.samples, one.has_unexplained_failure) == ("refused", None, True)
    assert TIMED_WRONG in one.because


def test_a_known_defect_of_codes_does_not_prevent_timing(registry: Registry) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    (one,) = rows(registry.find("operation", "adamw8bit_step", "bitsandbytes"), registry, "adamw8bit_step")
    assert one.outcome == "measured", one.because
    assert {t.defect for t in one.parity if t.check == "output_codes"} == {"", "bitsandbytes-8bit-not-nearest"}


def test_a_cache_of_whole_contents_has_no_hit_in_the_timing(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed, kept, hits, pairs = [False], dict[bytes, Any](), [0, 0], timing.pairs

    def measured(*given: Any, **more: Any) -> results.Samples:
        timed[0] = True
        found = pairs(*given, **more)
        timed[0] = False
        return found

    def cached(**given: Any) -> Any:
        key = b"".join(t.detach().numpy().tobytes() for t in given.values() if isinstance(t, torch.Tensor))
        hits[timed[0]] += key in kept
        if key not in kept:
            kept[key] = reference("lora_linear")(**given)
        return kept[key]

    monkeypatch.setattr(timing, "pairs", measured)
    forward = next(iter(benchmark_of(offered("acme", "lora_linear", cached), registry).rows(SMALL)))
    assert forward.outcome == "measured", forward.because
    assert hits[False] > 0
    assert hits[True] == 0


def test_memory_that_runs_out_in_the_check_after_timing_leaves_the_time(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check after timing needs more tensors than the timed call, so it may run out of memory where the call does not."""
    timed, pairs = [], timing.pairs

    def measured(*given: Any, **more: Any) -> results.Samples:
        found = pairs(*given, **more)
        timed.append(True)
        return found

    def scarce(**given: Any) -> Any:
        if timed:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB")
        return reference("lora_linear")(**given)

    monkeypatch.setattr(timing, "pairs", measured)
    forward = next(iter(benchmark_of(offered("acme", "lora_linear", scarce), registry).rows(SMALL)))
    assert (forward.outcome, forward.has_unexplained_failure) == ("measured", False), forward.because
    assert forward.samples is not None
    text = "\n".join(table.lines([forward]))
    assert "the timed call was not checked once more" in text
    assert "acme: out of memory: CUDA out of memory. Tried to allocate 9.00 GiB" in text


def test_the_check_after_timing_frees_the_tensors_of_the_timed_call(registry: Registry) -> None:
    seen: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []

    def counting(**given: Any) -> Any:
        seen.append(weakref.ref(given["W"]))
        alive.append(len({id(one()) for one in seen if one() is not None}))
        return reference("lora_linear")(**given)

    bench = benchmark_of(offered("acme", "lora_linear", counting), registry)
    call = bench._call(bench.other, bench._arguments(SMALL), False)
    found = call.check("float32", bench._arguments(SMALL, 1), Case("call", seed=0))
    assert found.outcome is Outcome.PASS
    assert alive == [1] * len(alive)


@pytest.mark.parametrize("piece", [1, 7, 10**6])
def test_a_comparison_in_pieces_sees_every_element(monkeypatch: pytest.MonkeyPatch, piece: int) -> None:
    monkeypatch.setattr(timed_call, "PIECE", piece)
    made = torch.arange(15.0).reshape(5, 3).T
    for at in [(0, 0), (2, 4), (1, 2)]:
        other = made.clone()
        other[at] += 1
        assert timed_call._equal({"y": made}, {"y": made.clone()})
        assert not timed_call._equal({"y": made}, {"y": other})
        assert timed_call._digests({"y": made}) != timed_call._digests({"y": other})


def test_an_unsupported_case_is_not_run_and_no_failure(registry: Registry) -> None:
    from harness.errors import Unsupported

    def picky(**given: Any) -> Any:
        raise Unsupported("only on Sundays")

    for one in rows(offered("acme", "lora_linear", picky), registry):
        assert (one.outcome, one.has_unexplained_failure) == ("not-run", False)
        assert "only on Sundays" in one.because


@pytest.mark.slow
def test_a_step_with_a_slightly_wrong_update_gets_no_speed(registry: Registry) -> None:
    def wrong(model: Any, config: Any, generator: Any) -> Any:
        from reference.lora import attach

        adapted = attach(model, config, generator)
        for layer in adapted.layers.values():
            layer.scaling *= 1.01
        return adapted

    both = (registry.find("method", "lora", "reference"), offered("acme", "lora", wrong, "method"))
    one = step_benchmark.row(setting("lora", registry), both, ("", ""), 5, {})
    assert (one.outcome, one.samples, one.has_unexplained_failure) == ("refused", None, True)
    assert "no parity: acme fails lora/" in one.because


# ---- training steps


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lora-dropout", "adalora"])
def test_a_step_is_timed_with_the_frozen_pass(registry: Registry, name: str) -> None:
    step = STEPS[name]
    both = (registry.find("method", step.method, "reference"), registry.find("method", step.method, "hf-peft"))
    one = step_benchmark.row(setting(name, registry), both, ("", ""), 5, {})
    assert one.outcome == "measured", one.because
    assert one.samples is not None
    assert len(one.samples.limit) == 5
    assert one.limit_ratio is not None
    assert {len(losses) for losses in one.losses.values()} == {5 + timing.WARMUP}
    first = [losses[0] for losses in one.losses.values()]
    assert first[0] == pytest.approx(first[1])
    assert f"{step.method}/loss/float32/warm" in {t.result.check for t in one.parity}
    assert "x frozen pass" in "\n".join(table.lines([one]))
    assert one.products is not None
    # Forward and backward, r (D + E) products in addition to D E, and another for the gradient of the factors.
    assert one.products.other >= one.products.ours > one.products.frozen
    assert f"{one.products.ours / one.products.frozen:.2f} by FLOPs" in "\n".join(table.lines([one]))


def _computes_no_more(adapted: Any, name: str = "layers.0.self_attn.q_proj") -> None:
    """Let a module return the same output in all later steps."""
    (layer,) = (module for path, module in adapted.model.named_modules() if path.endswith(name))
    kept: list[torch.Tensor] = []

    def replay(_: Any, __: Any, y: torch.Tensor) -> torch.Tensor:
        kept.append(y.detach())
        return y + (kept[0] - y).detach()

    layer.register_forward_hook(replay)


def _updates_no_more(adapted: Any) -> None:
    for parameter in adapted.parameters():
        parameter.register_hook(torch.zeros_like)
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))


def _computes_no_more_logits(adapted: Any) -> None:
    _computes_no_more(adapted, "lm_head")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "dtype"),
    [(_computes_no_more, "float32"), (_updates_no_more, "float32"), (_computes_no_more_logits, "bfloat16")],
)
def test_steps_that_go_wrong_during_the_timing_get_no_speed(
    registry: Registry, fault: Callable[[Any], None], dtype: str
) -> None:
    def tired(model: Any, config: Any, generator: Any) -> Any:
        from reference.lora import attach

        adapted = attach(model, config, generator)

        def after_step(step: int) -> None:
            if step == timing.WARMUP + 1:
                fault(adapted)

        adapted.after_step = after_step
        return adapted

    acme = implements("lora", name="acme", kind="method", dtypes=[dtype])(tired)
    both = (registry.find("method", "lora", "reference"), acme)
    one = step_benchmark.row(StepSetting("lora", LITTLE, dtype, CPU, registry), both, ("", ""), 5, {})
    assert (one.outcome, one.samples, one.has_unexplained_failure) == ("refused", None, True)
    assert f"no parity: acme fails lora/timed_call/{dtype}/trained" in one.because


def test_every_form_of_a_product_is_counted() -> None:
    left, right, into = torch.randn(8, 4), torch.randn(4, 6), torch.zeros(8, 6)
    products = (
        lambda: left @ right,
        lambda: torch.addmm(into, left, right),
        lambda: into.addmm_(left, right),
    )
    assert [matrix_flops.flops(call) for call in products] == [2 * 8 * 4 * 6] * 3


def test_a_refresh_counts_once_in_two_hundred_steps() -> None:
    ordinary, refresh = 0.01, 2.0
    times = [ordinary] * 4 + [refresh] + [ordinary] * 6
    assert step_benchmark._per_step(times) == pytest.approx((199 * ordinary + refresh) / 200)


@pytest.mark.nightly
def test_a_galore_step_is_made_of_whole_cycles(registry: Registry) -> None:
    both = (registry.find("method", "galore", "reference"),) * 2
    one = step_benchmark.row(setting("galore", registry), both, ("", ""), 5, {})
    assert one.outcome == "measured", one.because
    assert one.samples is not None
    assert [len(cycle) for cycle in one.samples.parts["ours"]] == [step_benchmark.CYCLE] * 5
    assert len(one.samples.limit) == 5
    assert "x its two products" in "\n".join(table.lines([one]))
    assert one.judged


def _nothing(weight: torch.Tensor) -> None:
    """Leave the weight as it is."""


def _one_element(weight: torch.Tensor) -> None:
    weight.data[0, 0] += 1e-3


def _one_direction(weight: torch.Tensor) -> None:
    weight.data += 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("honest", "later"),
    [
        (0, _nothing),
        (step_benchmark.LATER_STEPS, _nothing),
        (step_benchmark.LATER_STEPS, _one_element),
        (step_benchmark.LATER_STEPS, _one_direction),
    ],
)
def test_a_galore_step_that_goes_wrong_during_the_timing_gets_no_speed(
    registry: Registry, monkeypatch: pytest.MonkeyPatch, honest: int, later: Callable[[torch.Tensor], None]
) -> None:
    """honest: number of right steps of each optimizer during and after the timing. later: replaces all later steps."""
    timed, cycles = list[bool](), step_benchmark._cycles

    def measured(*given: Any) -> results.Samples:
        timed.append(True)
        return cycles(*given)

    def tired(model: Any, config: Any, generator: Any) -> Any:
        adapted = attach(model, config, generator)
        make = adapted.optimizer

        def optimizer(lr: float, decay: float) -> torch.optim.Optimizer:
            made: torch.optim.Optimizer = make(lr, decay)
            step, count = made.step, itertools.count()

            def tiring(_: torch.optim.Optimizer, *given: Any) -> Any:
                weight = made.param_groups[0]["params"][0]
                return later(weight) if timed and next(count) >= honest else step(*given)

            made.step = MethodType(tiring, made)  # type: ignore[method-assign]  # a scheduler needs a method
            return made

        adapted.optimizer = optimizer
        return adapted

    monkeypatch.setattr(step_benchmark, "_cycles", measured)
    both = (registry.find("method", "galore", "reference"), offered("acme", "galore", tired, "method"))
    one = step_benchmark.row(setting("galore-exact", registry), both, ("", ""), 5, {})
    assert (one.outcome, one.samples, one.has_unexplained_failure) == ("refused", None, True)
    assert "no parity: acme fails galore/timed_call/float32/trained" in one.because


def test_memory_of_a_step_excludes_the_bare_process(registry: Registry) -> None:
    it = registry.find("method", "lora", "reference")
    taken = step_benchmark.memory(setting("lora", registry), it)
    assert taken["peak_B"] >= taken["rest_B"] > 0
    two = row(memory={"fused": {"peak_B": 300, "rest_B": 200, "bare_B": 100}, "acme": {"peak_B": 500, "bare_B": 100}})
    assert two.memory_ratio == 2


@pytest.mark.slow
def test_a_galore_step_is_judged_on_the_timed_device(registry: Registry) -> None:
    devices = []

    def spying(model: Any, config: Any, generator: Any) -> Any:
        devices.append({p.device.type for p in model.parameters()})
        return attach(model, config, generator)

    both = (offered("acme", "galore", spying, "method"),) * 2
    # On this device nothing passes, but the test shows on which device the checks ran.
    meta = torch.device("meta")
    one = step_benchmark.row(setting("galore-exact", registry, meta), both, ("", ""), 5, {})
    assert one.outcome == "refused"
    assert len(devices) > len(both)  # the timed layers and those of the parity suite
    assert all(seen == {"meta"} for seen in devices)


def test_a_galore_step_holds_its_weight_once_while_memory_is_measured(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def step(_: object) -> None:
        tensors = [t for t in gc.get_objects() if type(t) in (torch.Tensor, torch.nn.Parameter)]
        square = (LITTLE.features, LITTLE.features)
        seen.append(len({t.data_ptr() for t in tensors if t.shape == square}))

    monkeypatch.setattr(step_benchmark._Galore, "step", step)
    step_benchmark.memory(setting("galore", registry), registry.find("method", "galore", "reference"))
    assert seen == [1] * step_benchmark.MEASURED_STEPS


def test_training_frees_the_tensors_of_the_parity_gate(registry: Registry) -> None:
    trainee = AdaptedLlama(registry.find("method", "lora", "reference"), setting("lora", registry))
    trainee.parity()
    assert trainee.subject.original.model is not None
    saved = [*trainee.start.values(), trainee.base_output, *trainee.subject.original.model.parameters()]
    gone = [weakref.ref(one) for one in saved]
    del saved
    trainee.start_training()
    gc.collect()
    assert not [one for one in gone if one() is not None]
    trainee.step()


# ---- sizes and formulas


@pytest.mark.parametrize("name", timed_operations.every())
def test_every_operation_has_a_case_that_its_arguments_take_and_costs_that_grow(name: str) -> None:
    how, it = timed_operations.every()[name], operations.every()[name]
    given = it.arguments(torch.float32, torch.Generator().manual_seed(0), **how.case(BenchSize("t", 128, 128, 8, 4)))
    assert given
    assert (how.backward is not None) == bool(it.differentiable)
    for cost in filter(None, (how.forward, how.backward)):
        small, large = BenchSize("s", 512, 512, 64), BenchSize("l", 1024, 512, 64)
        assert 0 < cost.bytes(small, 2) < cost.bytes(large, 2)
        assert cost.bytes(small, 2) <= cost.bytes(small, 4)
        assert 0 < cost.flops(small) < cost.flops(large)


def test_the_bytes_of_a_call_are_those_of_its_arguments_and_outputs() -> None:
    size, generator = BenchSize("t", 96, 64, 8, 4), torch.Generator().manual_seed(0)
    for name in ("nf4_dequantize", "lora_linear", "lora_experts", "adamw8bit_step", "nf4_lora_linear", "galore_step"):
        how, it = timed_operations.every()[name], operations.every()[name]
        given = it.arguments(torch.float32, generator, **how.case(size))
        outputs = it.named(it.reference(**given)).values()
        read = [one for one in given.values() if isinstance(one, torch.Tensor)]
        moved = sum(t.numel() * t.element_size() for t in [*read, *outputs])
        assert how.forward.bytes(size, 4) == moved, name


@pytest.mark.slow
def test_a_new_operation_is_judged_and_timed_without_being_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    definition, costs = tmp_path / "definition", tmp_path / "costs"
    definition.mkdir()
    costs.mkdir()
    (definition / "doubled.py").write_text(
        "from harness.conformance.operation import Operation, draw\n"
        "def arguments(dtype, generator, *, size): return {'x': draw(generator, dtype, size)}\n"
        "def reference(x): return 2 * x\n"
        "OPERATION = Operation('doubled', ('y',), arguments, reference, differentiable=('x',))\n"
    )
    (costs / "doubling.py").write_text(
        "from harness.bench.costs import Cost, TimedOperation\n"
        "cost = Cost(lambda s, i: 2 * i * s.weights, lambda s: s.weights)\n"
        "TIMED = {'doubled': TimedOperation(lambda s: {'size': s.weights}, cost, cost)}\n"
    )
    (tmp_path / "doubled.yaml").write_text(
        "operation: doubled\nfollows: arithmetic\nchecks: [outputs, backward]\ncases: [{size: 8}]\ndtypes: [float32]\n"
    )
    monkeypatch.setattr(operations, "__path__", [*operations.__path__, str(definition)])
    monkeypatch.setattr(timed_operations, "__path__", [*timed_operations.__path__, str(costs)])
    monkeypatch.setattr(parity_suite, "path_of", lambda name: tmp_path / f"{name}.yaml")
    monkeypatch.setattr("harness.methods.registry._OPERATIONS", definition)
    monkeypatch.setattr(planning, "targets", planning.targets.__wrapped__)  # uncached, as below
    for package in (operations, timed_operations):
        monkeypatch.setattr(package, "every", package.every.__wrapped__)
    ours, other = (
        offered(name, "doubled", function) for name, function in (("a", lambda x: 2 * x), ("b", lambda x: x + x))
    )
    tasks, _ = planning.plan(
        BenchRequest(["doubled"], device="cpu", ours="a"), Registry((ours, other)), no_gpu="no GPU"
    )
    assert [(task.name, task.names) for task in tasks] == [("doubled", ("a", "b"))]
    forward, backward = operation_benchmark.OperationBenchmark("doubled", ours, other, "float32", CPU, 6, {}).rows(
        SMALL
    )
    assert (forward.outcome, backward.outcome) == ("measured", "measured"), forward.because + backward.because
    assert forward.bytes == 2 * 4 * SMALL.weights


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("shapes", SHAPES)
def test_the_judged_size_fits_the_reference(shapes: str, device: str) -> None:
    for size in sizes(shapes, per_token=True):
        judged = size.judged(device, per_token=True)
        assert judged.weights <= max(MOST_WEIGHTS[device], judged.D**2)
        assert judged.tokens * judged.weights <= max(MOST_PRODUCTS[device], judged.weights)
        assert (judged.E >= judged.D) == (size.E >= size.D)
    assert BenchSize("s", 512, 512, 128).judged(device, True) == BenchSize("s", 512, 512, 128)


def test_a_smaller_judged_size_is_noted() -> None:
    assert (
        "judged on a smaller size than was timed:\n  lora_linear square 8x8, 2 tokens: square 8x8, 1 token"
        in "\n".join(table.lines([row(judged="square 8x8, 1 token")]))
    )


# ---- numbers


def test_the_ratio_is_the_median_over_pairs() -> None:
    one = row()
    assert one.ratio is not None
    assert one.ratio.value == 2
    assert one.ratio.low == 0.5
    assert one.share([0.001]) == pytest.approx(0.5)  # 4 MB at 8 GB/s
    assert "2.00 [0.50, 2.00]" in "\n".join(table.lines([one]))
    assert "50% of roofline" in "\n".join(table.lines([one]))


class Noted(timing.FreshProgram):
    def __init__(self, seen: list[str]) -> None:
        self.seen = seen

    def expect(self, calls: int) -> None: ...

    def prepare(self) -> None:
        self.seen.append("prepare")

    def __call__(self) -> None:
        self.seen.append("call")

    def receive(self, returned: object) -> None:
        self.seen.append("receive")


def test_on_a_gpu_the_clock_starts_after_a_wait_while_the_host_queues_the_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = []

    class Event:
        def __init__(self, **_: Any) -> None: ...

        def record(self) -> None:
            seen.append("event")

        def elapsed_time(self, other: object) -> float:
            return 2.0

    class Flush:
        def zero_(self) -> None:
            seen.append("flush")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: seen.append("wait"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: seen.append("synchronize"))
    clock = timing.Clock(CPU)
    clock._flush = Flush()  # type: ignore[assignment]
    assert clock.sample(lambda: seen.append("call")) == 0.002
    assert seen == ["flush", "wait", "event", "call", "event", "synchronize"]
    seen.clear()
    assert clock.sample(Noted(seen)) == 0.002
    assert seen == ["prepare", "flush", "wait", "event", "call", "event", "receive", "synchronize"]
    assert len(clock.launch_s) == 2


def test_a_gpu_is_under_load_before_its_rates_are_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    clock = timing.Clock(CPU)
    clock.on_gpu, now = True, itertools.count()
    monkeypatch.setattr(timing, "perf_counter", lambda: next(now) / 10)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: seen.append("synchronize"))
    clock.warm_up(lambda: seen.append("call"), 0.35)
    assert seen == ["call", "synchronize"] * 3


@pytest.mark.parametrize(("MiB", "flushed"), [(50, 256), (192, 384)])
def test_the_flush_writes_more_than_the_l2_cache_of_the_card(
    MiB: int, flushed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = MagicMock(L2_cache_size=MiB * 2**20)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    assert timing._flush_bytes(torch.device("cuda")) == flushed * 2**20


@pytest.mark.parametrize(("launch", "bound"), [(0.0001, []), (0.0009, ["ours"]), (0.01, ["ours"])])
def test_a_call_that_the_host_launches_as_slowly_as_it_runs_is_marked(launch: float, bound: list[str]) -> None:
    samples = row().samples
    assert samples is not None
    one = row(device="cuda", samples=samples.model_copy(update={"launch": {"ours": launch, "other": 0.0001}}))
    assert one.host_bound == bound
    shown = "\n".join(table.lines([one]))
    assert ("1 ms h" in shown) == ("a faster kernel changes nothing" in shown) == bool(bound)


@pytest.mark.parametrize("option", ["--ceilings", "--crossovers"])
def test_rates_are_not_measured_under_the_interpreter(
    option: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert main(["bench", option, "--device", "cpu"]) == Exit.USAGE
    assert "TRITON_INTERPRET: Triton's interpreter is on" in capsys.readouterr().err


def test_crossovers_of_a_cpu_are_called_a_rehearsal() -> None:
    described: dict[str, Any] = {}
    rehearsed = card.CardReport("crossovers", "cpu", described)
    assert rehearsed.document()["is_rehearsal"]
    assert "these times mean nothing" in "\n".join(rehearsed.lines())
    measured = card.CardReport("crossovers", "cuda", described, card="NVIDIA H100")
    assert not measured.document()["is_rehearsal"]
    assert "mean nothing" not in "\n".join(measured.lines())


def test_a_step_on_a_gpu_has_a_note_about_launches() -> None:
    def shown(name: str, device: str, **more: Any) -> str:
        samples = row().samples
        assert samples is not None
        return "\n".join(table.lines([row(name=name, device=device, samples=samples.model_copy(update=more))]))

    assert "kernel launches by the host" in shown("step:lora", "cuda", limit=[0.001] * 6)
    assert "kernel launches by the host" not in shown("step:lora", "cpu", limit=[0.001] * 6)
    assert "kernel launches by the host" not in shown("lora_linear", "cuda")


def test_a_busy_machine_is_noted() -> None:
    assert "load up to 9.5" in "\n".join(table.lines([row(facts={"threads": 2, "load": 9.5})]))
    assert "load" not in "\n".join(table.lines([row(facts={"threads": 2, "load": 0.5})]))


def test_a_time_that_is_mostly_call_overhead_is_marked() -> None:
    samples = row().samples
    assert samples is not None
    one = row(samples=samples.model_copy(update={"overhead": {"ours": 1e-6, "other": 1e-3}}))
    assert one.mostly_call == ["other"]
    assert "2 ms *" in "\n".join(table.lines([one]))


def test_too_few_pairs_for_an_interval_are_explained() -> None:
    few = row(samples=Samples(ours=[0.001] * 5, other=[0.002] * 5, first=["ours"] * 5))
    assert "2.00 [too few]" in (shown := "\n".join(table.lines([few])))
    assert f"at least {len(row().samples.ours)} pairs" in shown  # type: ignore[union-attr]
    assert "too few" not in "\n".join(table.lines([row()]))


def test_a_step_without_measured_memory_is_shown_as_failed() -> None:
    class Workers:
        def events(self, module: str, words: dict[str, Any], patience: float) -> Any:
            yield {"begin": 0}
            if len(words["names"]) == 1:
                yield {"died": "the process died of SIGKILL"}
                return
            yield {"row": row().model_dump(mode="json")}
            yield {"end": 0}

    task = BenchTask("step:lora", "method", "lora", ("fused", "acme"), (), "float32", "cpu", step="lora")
    (one,) = command.TaskRunner(BenchRequest(), 1, Workers()).rows(task)  # type: ignore[arg-type]
    assert one.samples is not None
    assert "failed: timed, but the memory of fused could not be measured: the process died of SIGKILL" in "\n".join(
        table.lines([one])
    )
    assert not pytest_benchmark.document([one], describe())["benchmarks"]


@pytest.mark.parametrize(
    ("elapsed", "changing", "outcome"),
    [(0.06, 0.0, "measured"), (100.0, 0.0, "refused"), (0.5, 0.0, "refused"), (0.5, 0.4, "measured")],
)
def test_samples_far_shorter_than_the_time_that_passed_outside_are_refused(
    elapsed: float, changing: float, outcome: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Workers:
        stopped = False

        def events(self, *_: Any) -> Any:
            yield {"begin": 0}
            yield {"timing": "begin"}
            yield {"timing": "end"}
            yield {"timing": "changed"}
            yield {"row": row().model_dump(mode="json")}
            yield {"end": 0}

    clock = iter((1000.0, 1000.0 + elapsed, 1000.0 + elapsed + changing))
    monkeypatch.setattr(command, "monotonic", lambda: next(clock))
    task = BenchTask("lora_linear", "operation", "lora_linear", ("fused", "acme"), (), "float32", "cpu", (SMALL,))
    (one,) = command.TaskRunner(BenchRequest(), 1, Workers()).rows(task)  # type: ignore[arg-type]
    assert one.outcome == outcome
    assert one.has_unexplained_failure is (outcome == "refused")
    assert (one.samples is None) is (outcome == "refused")
    assert ("the timer of the measured process is wrong" in "\n".join(table.lines([one]))) is (outcome == "refused")


@pytest.mark.parametrize("exists", [True, False])
def test_a_library_that_is_not_installed_is_timed_in_its_environment(
    exists: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Here:
        stopped = False

        def events(self, *_: Any) -> Any:
            yield {"missing": "acme requires acme, which is not installed"}

    class There(Here):
        def events(self, *_: Any) -> Any:
            yield {"begin": 0}
            yield {"row": row().model_dump(mode="json")}
            yield {"end": 0}

    home = MadeEnvironment(Path("acme"), MagicMock(versions={"acme": "1.4"}))
    monkeypatch.setattr(command.homes, "of", lambda names: {"acme": home if exists else "acme"})
    monkeypatch.setattr(command, "WorkerPool", lambda python: There() if python == home.python else None)
    task = BenchTask("lora_linear", "operation", "lora_linear", ("fused", "acme"), (), "float32", "cpu", (SMALL,))
    runner = command.TaskRunner(BenchRequest(), 1, Here())  # type: ignore[arg-type]
    (one,) = runner.rows(task)
    if exists:
        assert one.outcome == "measured"
        assert [found.outcome for found in runner.rows(task)] == ["measured"]
    else:
        assert (one.outcome, one.because.endswith("`peft-harness env create acme` makes an environment that has it")) == (
            "not-run", True,
        )  # fmt: skip


# ---- files


@pytest.mark.slow
def test_the_export_has_what_pytest_benchmark_reads(tmp_path: Path) -> None:
    document = pytest_benchmark.document([row(), row(outcome="refused", samples=None)], describe())
    assert {"machine_info", "commit_info", "benchmarks", "datetime", "version"} <= set(document)
    ours, other = document["benchmarks"]
    assert ours["options"]["timer"] == "perf_counter"
    (on_gpu, _) = pytest_benchmark.document([row(device="cuda")], describe())["benchmarks"]
    assert on_gpu["options"]["timer"] == "torch.cuda.Event"
    assert ours["group"] == other["group"]
    assert ours["stats"]["data"] == row().samples.ours  # type: ignore[union-attr]
    assert ours["stats"]["rounds"] == 6
    stats = pytest.importorskip("pytest_benchmark.stats", reason="pytest-benchmark is not installed")
    theirs = stats.Stats()
    for one in ours["stats"]["data"]:
        theirs.update(one)
    assert set(theirs.as_dict()) <= set(ours["stats"])
    for name in ("min", "max", "mean", "stddev", "median", "ops", "total", "rounds"):
        assert ours["stats"][name] == pytest.approx(getattr(theirs, name)), name
    file = tmp_path / "0001_bench.json"
    file.write_text(json.dumps(document), encoding="utf-8")
    compare = [sys.executable, "-m", "pytest_benchmark", "compare", str(file), f"--csv={tmp_path / 'out.csv'}"]
    done = subprocess.run(compare, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "lora_linear[square 8x8, 2 tokens-float32-cpu-acme]" in (tmp_path / "out.csv").read_text()
    (saved,) = pytest_benchmark.read([file])  # and by our own reader
    assert saved.rounds[ours["fullname"]] == ours["stats"]["data"]
    assert {"cpu", "python", "torch"} <= set(saved.place)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use one tiny size."""
    monkeypatch.setattr(planning, "sizes", lambda shapes, per_token: [BenchSize("tiny", 64, 64, 4, 2)])


@pytest.mark.usefixtures("forks")
@pytest.mark.slow
def test_a_bench_writes_a_file_per_benchmark_with_raw_samples(
    tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "no_gpu", lambda: gpu.NO_GPU)
    requested = BenchRequest(["galore_step"], ["galore-torch"], pairs=6, ours="reference")
    out, export = tmp_path / "out", tmp_path / "export.json"
    assert command.bench(requested, False, out, export) is Exit.PASS
    shown = capsys.readouterr().out
    assert "galore_step/outputs/float32/call" in shown
    assert "not-run: no GPU" in shown
    measured, absent = (json.loads(file.read_text()) for file in sorted(out.iterdir()))
    assert (measured["outcome"], absent["outcome"]) == ("measured", "not-run")
    assert len(measured["samples"]["ours"]) == len(measured["samples"]["other"]) == 6
    assert measured["environment"]["software"]["torch"]
    assert measured["bytes"] > 0
    assert measured["flops"] > 0
    assert measured["ceilings"]["copy_B_per_s"] > 0
    assert {one["result"]["outcome"] for one in measured["parity"]} == {"pass"}
    assert len(json.loads(export.read_text())["benchmarks"]) == 2


def test_a_folder_that_holds_a_bench_is_refused(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command.worker_processes, "discover", lambda: registry)
    (tmp_path / "notes.json").touch()
    words = ["bench", "--op", "galore_step", "--device", "cuda", "--out", str(tmp_path)]
    monkeypatch.setattr(command, "no_gpu", lambda: gpu.NO_GPU)
    assert main(words) == Exit.INFRASTRUCTURE
    there = sorted(tmp_path.iterdir())
    capsys.readouterr()
    assert main(words) == Exit.USAGE
    assert f"--out {tmp_path}: already holds a bench\n  hint: name another folder" in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == there


@pytest.mark.parametrize(
    ("option", "place"),
    [
        ("--out", "file/out"),
        ("--export-pytest-benchmark", "nowhere/x.json"),
        ("--export-pytest-benchmark", "file/x.json"),
        ("--export-pytest-benchmark", "/dev/null"),
    ],
)
def test_a_place_that_cannot_be_written_is_refused_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], option: str, place: str
) -> None:
    def measure(*_: object) -> None:
        pytest.fail("something runs")

    monkeypatch.setattr(command, "measure", measure)
    (tmp_path / "file").touch()
    assert main(["bench", option, str(tmp_path / place)]) == Exit.USAGE
    output = capsys.readouterr().err
    assert f"{option} {tmp_path / place}: " in output
    assert "hint: name a" in output


class Fake:
    """Fake processes of an operation with two sizes; calls `after` after each row."""

    stopped = False
    after: Callable[[], object]

    def events(self, module: str, words: dict[str, Any], patience: float) -> Any:
        for number in range(2):
            yield {"begin": number}
            yield {"row": row(ours="reference", other=words["names"][-1]).model_dump(mode="json")}
            Fake.after()
            yield {"end": number}

    def stop(self) -> None:
        self.stopped = True


@pytest.fixture
def two_comparisons(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> BenchRequest:
    """Two processes of two rows each."""
    monkeypatch.setattr(planning, "sizes", lambda shapes, per_token: [BenchSize("one", 8, 8), BenchSize("two", 8, 8)])
    monkeypatch.setattr(command.worker_processes, "discover", lambda: registry)
    monkeypatch.setattr(command, "WorkerPool", Fake)
    monkeypatch.setattr(Fake, "after", lambda: None, raising=False)
    return BenchRequest(["nf4_quantize"], ["bitsandbytes", "torchao"], device="cpu", ours="reference")


def interrupt() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("as_json", [False, True])
def test_ctrl_c_keeps_the_measured_rows_and_lists_the_missing_ones(
    two_comparisons: BenchRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    as_json: bool,
) -> None:
    monkeypatch.setattr(Fake, "after", interrupt)
    assert command.bench(two_comparisons, as_json, tmp_path, None) is Exit.INFRASTRUCTURE
    shown = capsys.readouterr().out
    files = [json.loads(file.read_text()) for file in sorted(tmp_path.iterdir())]
    assert [one["because"] for one in files] == ["", "interrupted after the row above", "interrupted"]
    assert [one["cause"] for one in files] == [None, "interrupted", "interrupted"]
    assert [one["other"] for one in files] == ["bitsandbytes", "bitsandbytes", "torchao"]
    if as_json:
        document = json.loads(shown)
        assert document["interrupted"]
        assert [one["outcome"] for one in document["benchmarks"]] == ["measured", "not-run", "not-run"]
    else:
        assert "2.00 [0.50, 2.00]" in shown
        assert shown.splitlines()[-1].startswith("interrupted: 2 of these did not finish")


def test_a_row_is_written_as_soon_as_it_is_measured(
    two_comparisons: BenchRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = []
    monkeypatch.setattr(Fake, "after", lambda: there.append(len(list(tmp_path.iterdir()))))
    command.bench(two_comparisons, False, tmp_path, None)
    assert there == [1, 2, 3, 4]


def test_ctrl_c_while_memory_is_measured_keeps_the_times(monkeypatch: pytest.MonkeyPatch) -> None:
    class Workers(Fake):
        def events(self, module: str, words: dict[str, Any], patience: float) -> Any:
            if len(words["names"]) == 1:
                interrupt()
            yield {"row": row().model_dump(mode="json")}

    task = BenchTask("step:lora", "method", "lora", ("fused", "acme"), (), "float32", "cpu", step="lora")
    found = command.TaskRunner(BenchRequest(), 1, Workers()).rows(task)  # type: ignore[arg-type]
    assert next(found).samples is not None
    with pytest.raises(KeyboardInterrupt):
        next(found)


def test_a_deleted_folder_costs_neither_the_table_nor_later_rows(
    two_comparisons: BenchRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, export = tmp_path / "out", tmp_path / "export.json"

    def gone() -> None:
        for file in out.glob("*"):
            file.unlink()
        if out.exists():
            out.rmdir()

    monkeypatch.setattr(Fake, "after", gone)
    with pytest.raises(StoreError, match=r"cannot write.*\n.*hint") as error:
        command.bench(two_comparisons, False, out, export)
    assert error.value.exit_code is Exit.INFRASTRUCTURE
    output = capsys.readouterr()
    assert output.out.count("2.00 [0.50, 2.00]") == 4
    assert output.err.count("will be retried at the end") == 3
    assert len(json.loads(export.read_text())["benchmarks"]) == 8


def test_files_that_could_not_be_written_are_written_at_the_end(
    two_comparisons: BenchRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, away = tmp_path / "out", tmp_path / "away"
    moves = iter([lambda: out.rename(away), lambda: None, lambda: away.rename(out), lambda: None])
    monkeypatch.setattr(Fake, "after", lambda: next(moves)())
    assert command.bench(two_comparisons, False, out, None) is Exit.PASS
    assert len(list(out.iterdir())) == 4


@pytest.mark.usefixtures("forks")
@pytest.mark.slow
def test_a_step_without_a_supported_layer_is_not_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "no_gpu", lambda: gpu.NO_GPU)
    requested = BenchRequest(steps=["lora on nf4"], vs=["loralib"], pairs=5, backbone=LITTLE)
    assert command.bench(requested, False, None, None) is Exit.NOTHING_COMPARED
    assert "not-run: model.layers.0.self_attn.q_proj: loralib has no layer" in capsys.readouterr().out


# ---- planned and failed benchmarks


def test_steps_have_the_words_of_cells_and_the_former_name_is_taken(
    registry: Registry, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[BenchRequest] = []
    monkeypatch.setattr(command, "bench", lambda request, *_: asked.append(request) or Exit.PASS)
    for name in ("lora-nf4", "lora on nf4"):
        assert main(["bench", "--step", name]) == Exit.PASS
    assert capsys.readouterr().err == "--step lora-nf4: this step is now called `lora on nf4`\n"
    assert [list(request.steps) for request in asked] == [["lora on nf4"]] * 2
    cell = recorded_run.cells()["nf4"]
    assert all(word in cell.label.split() for word in ("lora", "on", "nf4"))
    for one in asked:
        tasks, later = planning.plan(one, registry, no_gpu="no GPU")
        assert {row.name for row in [*tasks, *later]} == {"step:lora on nf4"}


def test_the_compared_implementations_exclude_variants_and_usually_the_reference(
    registry: Registry,
) -> None:
    def rivals(name: str, ours: str = "reference", **more: Any) -> list[str]:
        tasks, later = planning.plan(BenchRequest([name], device="cpu", ours=ours, **more), registry, no_gpu="no GPU")
        return [task.names[1] for task in tasks] + [f"-{one.because}" for one in later]

    assert {"bitsandbytes", "torchao"} <= set(rivals("nf4_quantize"))
    assert not {"bitsandbytes-paged", "bitsandbytes-triton"} & set(rivals("adamw8bit_step"))
    assert rivals("adamw8bit_step", vs=["bitsandbytes-paged"]) == ["bitsandbytes-paged"]
    assert rivals("nf4_quantize", vs=["galore-torch"]) == ["-galore-torch does not offer nf4_quantize"]
    assert rivals("nf4_quantize", ours="galore-torch") == ["-galore-torch does not offer nf4_quantize"]
    assert not {"galore-torch-8bit", "reference"} & set(rivals("galore_step", ours="galore-torch"))
    assert rivals("paged_states")[0].startswith("-not timed")


def test_a_repeated_name_runs_once(registry: Registry) -> None:
    twice = BenchRequest(
        ["lora_linear"] * 2, ["fused"] * 2, ["lora"] * 2, dtypes=["float32"] * 2, device="cpu", ours="reference"
    )
    tasks, later = planning.plan(twice, registry, no_gpu="no GPU")
    assert [task.name for task in tasks] == ["lora_linear", "step:lora"]
    assert not later


@pytest.mark.parametrize(("there", "output"), [(["reference"], "reference"), ([], "only acme offers galore_step")])
def test_the_reference_is_compared_only_without_another_implementation(there: list[str], output: str) -> None:
    offering = [offered(name, "galore_step", reference("galore_step")) for name in ("acme", *there)]
    tasks, later = planning.plan(
        BenchRequest(["galore_step"], device="cpu", ours="acme"), Registry(tuple(offering)), no_gpu="no GPU"
    )
    assert [*(task.names[1] for task in tasks), *(one.because for one in later)] == [output]


def test_without_a_gpu_only_the_cpu_is_timed(registry: Registry) -> None:
    requested = BenchRequest(["galore_step"], ["galore-torch"], ours="reference")
    tasks, later = planning.plan(requested, registry, no_gpu="no GPU")
    assert [task.device for task in tasks] == ["cpu"]
    assert [(one.device, one.because, one.cause) for one in later] == [("cuda", "no GPU", "no-gpu")]
    tasks, later = planning.plan(requested, registry, no_gpu="")
    assert ([task.device for task in tasks], later) == (["cuda"], [])


@pytest.mark.parametrize(("device", "dtype"), [("cpu", "float32"), ("cuda", "bfloat16")])
def test_steps_and_operations_have_a_default_dtype_per_device(registry: Registry, device: Any, dtype: str) -> None:
    requested = BenchRequest(["lora_linear"], ["hf-peft", "torchao"], ["lora"], device=device)
    tasks, later = planning.plan(requested, registry, no_gpu="")
    assert {task.dtype for task in tasks} == {dtype}, later
    assert "step:lora" in {task.name for task in tasks}


@pytest.mark.nightly
@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch is built with CUDA")
def test_a_gpu_that_torch_cannot_use_is_not_used(
    registry: Registry, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command.worker_processes, "discover", lambda: registry)
    monkeypatch.setattr(gpu.environment, "gpus", lambda: ("GPU-0, one that the driver shows",))
    assert main(["bench", "--op", "nf4_quantize", "--device", "cuda"]) == Exit.INFRASTRUCTURE
    out, err = capsys.readouterr()
    why = f"the driver is there, but torch {torch.__version__} is built without CUDA"
    assert out == ""
    assert f"peft-harness: --device cuda: no GPU: {why}, so nothing was measured\n  hint: " in err
    assert main(["bench", "--op", "nf4_quantize", "--device", "cuda", "--json"]) == Exit.INFRASTRUCTURE
    assert {row["outcome"] for row in json.loads(capsys.readouterr().out)["benchmarks"]} == {"not-run"}
    requested = BenchRequest(["galore_step"], ["galore-torch"], ours="reference")
    assert [task.device for task in planning.plan(requested, registry, gpu.no_gpu())[0]] == ["cpu"]


def test_a_dead_process_is_one_row_and_the_other_sizes_continue(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = tuple(BenchSize(name, 8, 8) for name in ("one", "two", "three"))
    task = BenchTask("galore_step", "operation", "galore_step", ("fused", "acme"), (), "float32", "cpu", wanted)
    fine = row().model_dump(mode="json")

    class Workers:
        stopped = False

        def events(self, module: str, words: dict[str, Any], patience: float) -> Any:
            for number, size in enumerate(words["sizes"]):
                yield {"begin": number}
                if size["layer"] == "two":
                    yield {"failed": "RuntimeError: out of memory"}
                    yield {"died": "the process ended with exit code 1"}
                    return
                yield {"row": fine}
                yield {"end": number}

    found = list(command.TaskRunner(BenchRequest(), 1, Workers()).rows(task))  # type: ignore[arg-type]
    assert [one.outcome for one in found] == ["measured", "failed", "measured"]
    assert "out of memory" in found[1].because
    assert found[1].shape.startswith("two")


def test_a_side_that_loses_the_gpu_is_not_followed_by_the_other(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After an illegal access every call fails, so a check of the other side would blame it wrongly."""
    faulted = []

    def faults(**_: Any) -> torch.Tensor:
        faulted.append(True)
        raise RuntimeError("an illegal memory access was encountered")

    def require(_: torch.device) -> None:
        if faulted:
            raise DeviceLostError("the GPU accepts no more work of this process")

    monkeypatch.setattr(operation_benchmark.suite_run, "require_device", require)
    bench = benchmark_of(registry.find("operation", "lora_linear", "reference"), registry)
    bench.ours = offered("acme", "lora_linear", faults)
    rows_of = bench.rows(SMALL)
    refused = next(rows_of)
    assert refused.outcome == "refused"
    assert {one.implementation for one in refused.parity} == {"acme"}
    with pytest.raises(DeviceLostError):
        next(rows_of)


@pytest.mark.nightly
@pytest.mark.parametrize("target", ["lora_linear", "dora_linear", "nf4_dequantize"])
def test_torch_compile_is_a_rival_that_is_judged_like_any_other(registry: Registry, target: str) -> None:
    """It is offered for a GPU, where compilation pays. Here the same formulas are compiled for the CPU."""
    found = rows(registry.find("operation", target, "torch-compile"), registry, target)
    assert {one.outcome for one in found} == {"measured"}
    assert all(any(check.implementation == "torch-compile" for check in one.parity) for one in found)


def test_torch_compile_does_not_run_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_compile, "_no_compiler", lambda device: f"no compiler for {device}")
    x, W = torch.zeros(2, 3), torch.zeros(4, 3)
    with pytest.raises(Unsupported, match="no compiler for cpu"):
        torch_compile.lora_linear(x=x, W=W, bias=None, A=torch.zeros(1, 3), B=torch.zeros(4, 1), scaling=1.0, mask=None)


def test_torch_compile_on_a_cpu_is_not_run_with_its_reason(registry: Registry) -> None:
    tasks, later = planning.plan(
        BenchRequest(["lora_linear"], ["torch-compile"], device="cpu"), registry, no_gpu="no GPU"
    )
    assert tasks == []
    assert "torch-compile does not run on cpu" in later[0].because


def test_the_model_of_a_step_has_as_many_layers_as_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[BenchRequest] = []
    monkeypatch.setattr(command, "bench", lambda request, *_: asked.append(request) or Exit.PASS)
    assert main(["bench", "--step", "lora", "--layers", "2"]) == Exit.PASS
    assert main(["bench", "--step", "lora"]) == Exit.PASS
    assert [one.backbone for one in asked] == [Backbone(layers=2), Backbone()]


@pytest.mark.parametrize("blamed", [True, False])
def test_after_a_lost_gpu_a_new_process_takes_the_next_size(blamed: bool) -> None:
    wanted = tuple(BenchSize(name, 8, 8) for name in ("one", "two"))
    task = BenchTask("galore_step", "operation", "galore_step", ("fused", "acme"), (), "float32", "cuda", wanted)
    failed = (
        row()
        .parity[0]
        .model_copy(update={"result": CheckResult(check="lora_linear/outputs/float32/call", outcome=Outcome.FAIL)})
    )
    red = row(outcome="refused", samples=None, parity=[failed])

    class Workers:
        stopped = False
        started: ClassVar[list[int]] = []

        def events(self, module: str, words: dict[str, Any], patience: float) -> Any:
            Workers.started.append(len(words["sizes"]))
            yield {"begin": 0}
            if words["sizes"][0]["layer"] == "one":
                if blamed:
                    yield {"row": red.model_dump(mode="json")}
                yield {"lost": "DeviceLostError: the GPU accepts no more work"}
                yield {"died": "the process ended with exit code 1"}
                return
            yield {"row": row().model_dump(mode="json")}
            yield {"end": 0}

    found = list(command.TaskRunner(BenchRequest(), 1, Workers()).rows(task))  # type: ignore[arg-type]
    assert [one.outcome for one in found] == ["refused" if blamed else "failed", "measured"]
    assert Workers.started == [2, 1]


@pytest.mark.parametrize(
    ("found", "code"),
    [
        ([row()], Exit.PASS),
        ([row(), row(outcome="failed", samples=None)], Exit.INFRASTRUCTURE),
        (
            [row(outcome="not-run", samples=None, because="a reason", cause="no-gpu", device="cuda")],
            Exit.INFRASTRUCTURE,
        ),
        (
            [
                row(outcome="not-run", samples=None, because=why, cause=cause, device="cuda")
                for why, cause in (("a reason", "no-gpu"), ("no implementation", None))
            ],
            Exit.INFRASTRUCTURE,
        ),
        ([row(outcome="not-run", samples=None, because="no GPU offers this", device="cuda")], Exit.NOTHING_COMPARED),
        (
            [
                row(outcome="not-run", samples=None, because="a reason", cause="no-gpu", device="cuda"),
                row(outcome="not-run", samples=None, because="no implementation"),
            ],
            Exit.NOTHING_COMPARED,
        ),
        ([row(outcome="not-run", samples=None, because="no implementation")], Exit.NOTHING_COMPARED),
        ([], Exit.NOTHING_COMPARED),
    ],
)
def test_exit_codes(found: list[BenchRow], code: Exit) -> None:
    assert command.BenchReport(describe(), found).exit is code
    assert command.BenchReport(describe(), found, interrupted=True).exit is Exit.INFRASTRUCTURE


def test_a_failed_parity_check_is_a_failure() -> None:
    bad = row().parity[0]
    result = bad.result.model_copy(update={"outcome": Outcome.FAIL})
    red = row(outcome="refused", samples=None, parity=[bad.model_copy(update={"result": result})])
    assert command.BenchReport(describe(), [row(), red]).exit is Exit.FAIL


def test_all_unknown_names_are_listed_at_once(registry: Registry) -> None:
    requested = BenchRequest(["nf4_linea"], ["bitsandbites"], ["loro"], dtypes=["float31"])
    with pytest.raises(
        UsageError, match=r"(?s)nf4_linear.*`peft-harness list operations`.*bitsandbytes.*lora.*float32"
    ):
        planning.plan(requested, registry, no_gpu="no GPU")
    with pytest.raises(UsageError, match="did you mean `--step lora`"):
        planning.plan(BenchRequest(["lora"]), registry, no_gpu="no GPU")


def test_fewer_pairs_than_an_interval_needs_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--pairs", "5"]) == Exit.USAGE
    assert "5 is not in the range 6<=x" in capsys.readouterr().err
    least = row().samples
    assert least is not None
    of_six = row(samples=least.model_copy(update={"ours": [1.0] * 6, "other": [2.0] * 6}))
    assert "too few" not in "\n".join(table.lines([of_six]))
    assert main(["bench", "--help"]) == Exit.PASS
    assert "A 95 % interval needs 6." in " ".join(capsys.readouterr().out.split())


def test_the_triton_interpreter_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert main(["bench", "--op", "nf4_quantize"]) == Exit.USAGE
    assert "TRITON_INTERPRET" in capsys.readouterr().err


def test_dtypes_and_names_of_the_table_are_those_of_the_suites() -> None:
    for name in timed_operations.every():
        assert parity_suite.load_operation(name).dtypes
    assert results.MOSTLY_CALL < 1
