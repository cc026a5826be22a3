"""Compiled NF4 gives the reference's codes and values to the last bit, and steps aside where it cannot."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

# What inductor imports at its first use refuses to be imported after distutils, which other tests bring in.
import torch.utils.cpp_extension
from torch import Tensor

from harness.conformance import process_settings
from harness.kernels.torch import nf4
from harness.kernels.torch.support import compiled, nf4_compiled
from reference.operations import nf4 as reference

pytestmark = pytest.mark.build

PATIENCE = 120
"""Seconds after which a thread that waits for another is taken to wait for good."""
COUNT = compiled.LARGE + 4096 + 5
"""One large piece, and an odd rest."""


@pytest.fixture(autouse=True)
def _no_warning() -> Iterator[None]:
    """A compiler that fails would leave all else here green."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="harness.kernels.torch.support.compiled", category=RuntimeWarning)
        yield


@pytest.fixture
def fresh() -> Iterator[None]:
    """Nothing is compiled yet, and what the test leaves is not kept."""
    nf4_compiled._encoder.cache_clear()
    nf4_compiled._decoder.cache_clear()
    yield
    nf4_compiled._encoder.cache_clear()
    nf4_compiled._decoder.cache_clear()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each call of something compiled ran, in the order in which they ended."""
    ran: list[bool] = []
    call = compiled.Compiled.__call__
    monkeypatch.setattr(compiled.Compiled, "__call__", lambda *a, **k: ran.append(call(*a, **k)) or ran[-1])
    return ran


def special(dtype: torch.dtype, count: int = COUNT) -> Tensor:
    W = torch.randn(count, generator=torch.Generator().manual_seed(0)).to(dtype)
    levels = reference.codebook()
    middles = ((levels[1:] + levels[:-1]) / 2).to(dtype)
    W[7], W[4100], W[8200], W[-3] = torch.nan, torch.inf, -torch.inf, torch.nan
    W[12288:16384], W[16384:20480] = 0, -0.0
    W[20480:24576] *= torch.finfo(dtype).smallest_normal  # of which many are subnormal
    W[24576:28672] /= 8
    W[24576], W[24577:24592] = 1, middles.clamp(-1, 1)
    W[28672], W[28673:28688] = -1, torch.nextafter(middles, torch.ones_like(middles))
    W[32768:36864] *= torch.finfo(dtype).max / 8
    return W


def same(one: Tensor, other: Tensor) -> bool:
    """Whether these agree bit for bit; any NaN is as good as another."""
    number = ~other.isnan()
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[other.element_size()]
    bits = [t[number].view(integers) for t in (one, other)]
    return one.dtype == other.dtype and torch.equal(*bits) and torch.equal(one.isnan(), other.isnan())


def agrees(W: Tensor, block: int) -> None:
    packed, absmax = nf4.quantize(W, block)
    codes, largest = reference.quantize(W, block)
    assert torch.equal(packed, reference.pack(codes))
    assert same(absmax, largest)
    out = torch.full_like(W, 7)
    nf4.dequantize(packed, absmax, block, W.shape, W.dtype, out)
    assert same(out, reference.dequantize(codes, largest, block).to(W.dtype))
    assert same(nf4.dequantize(packed, absmax, block, W.shape, W.dtype), out)


def twice(W: Tensor) -> None:
    agrees(W, 64)
    agrees(W, 64)


def together(work: Callable[[Tensor], object], weights: list[Tensor]) -> None:
    """Work on each in a thread of its own."""
    threads = [threading.Thread(target=work, args=(W,)) for W in weights]
    for one in threads:
        one.start()
    for one in threads:
        one.join()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize(  # each block size is compiled anew
    "block", [pytest.param(32, marks=pytest.mark.nightly), 64, pytest.param(4096, marks=pytest.mark.nightly)]
)
def test_codes_and_values_are_the_reference_s(block: int, dtype: torch.dtype, calls: list[bool]) -> None:
    agrees(special(dtype), block)
    assert len(calls) == (3 if dtype == torch.float32 else 1)
    assert all(calls)


@pytest.mark.nightly
def test_sizes_modes_and_settings_do_not_recompile(fresh: None) -> None:
    W, made = special(torch.float32), torch._dynamo.utils.counters["stats"]
    agrees(W, 64)
    before, kept, threads = made["unique_graphs"], process_settings.snapshot(), torch.get_num_threads()
    agrees(special(torch.float32, COUNT + 640), 64)
    with torch.inference_mode():
        agrees(special(torch.float32), 64)
    with torch.autocast("cpu"):
        agrees(W, 64)
    agrees(torch.nn.Parameter(W), 64)
    torch.set_num_threads(3 - min(threads, 2))
    try:
        agrees(W, 64)
    finally:
        torch.set_num_threads(threads)
    assert made["unique_graphs"] == before > 0
    assert process_settings.list_changes(kept) == []


def test_compiling_changes_no_setting_and_no_random_number(fresh: None, calls: list[bool]) -> None:
    W, before, state = special(torch.float32), process_settings.snapshot(), torch.get_rng_state()
    with torch.inference_mode():
        packed, absmax = nf4.quantize(W, 64)
    assert calls == [True]
    assert packed.is_inference()
    assert absmax.is_inference()
    assert process_settings.list_changes(before) == []
    assert torch.equal(torch.get_rng_state(), state)


def test_a_buffer_s_version_counts_what_is_written() -> None:
    packed, absmax = nf4.quantize(special(torch.float32), 64)
    x, out = torch.ones(COUNT, requires_grad=True), torch.zeros(COUNT)
    y = (x * out).sum()  # needs `out` as it was
    nf4.dequantize(packed, absmax, 64, (COUNT,), torch.float32, out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_threads_compile_once(fresh: None, calls: list[bool]) -> None:
    weights, right = [special(torch.float32) * scale for scale in (1, 3, -2)], []

    def work(W: Tensor) -> None:
        agrees(W, 64)
        right.append(W)

    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    together(work, weights)
    assert len(right) == 3
    assert True in calls  # while one compiles, another does without
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before + 2


class Stopped:
    """torch.compile, which goes on when it may; `began` says that a thread is in it."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.began, self.may, self.entered, self._compile = threading.Event(), threading.Event(), 0, torch.compile
        patch.setattr(torch, "compile", self)

    def __call__(self, *a: Any, **k: Any) -> Any:
        self.entered += 1
        self.began.set()
        assert self.may.wait(PATIENCE)
        return self._compile(*a, **k)


def test_while_one_thread_compiles_another_does_not_wait(
    monkeypatch: pytest.MonkeyPatch, fresh: None, calls: list[bool]
) -> None:
    W, stopped, done = special(torch.float32), Stopped(monkeypatch), threading.Event()

    def other() -> None:
        agrees(W, 64)
        done.set()

    first, second = threading.Thread(target=nf4.quantize, args=(W, 64)), threading.Thread(target=other)
    first.start()
    assert stopped.began.wait(PATIENCE)
    second.start()
    in_time = done.wait(PATIENCE / 2)
    during = list(calls)
    stopped.may.set()
    first.join()
    second.join()
    assert in_time
    assert during == [False, False, False]
    assert calls[3:] == [True]


def test_threads_after_a_failure_do_not_retry_or_warn(monkeypatch: pytest.MonkeyPatch, fresh: None) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no working C++ compiler")

    stopped, W, looked = Stopped(monkeypatch), special(torch.float32), threading.Barrier(2)
    monkeypatch.setattr(stopped, "_compile", fail)
    stopped.may.set()
    wanted = compiled.Compiled.wanted

    def both(*a: Any) -> bool:  # neither knows of the other's failure when it decides
        answer = wanted(*a)
        looked.wait(PATIENCE)
        return answer

    monkeypatch.setattr(compiled.Compiled, "wanted", both)
    with pytest.warns(RuntimeWarning, match="nf4_encode did not compile") as seen:
        together(lambda W: nf4.quantize(W, 64), [W, W])
    assert len(seen) == stopped.entered == 1


def test_a_failing_compiler_gives_one_warning_and_the_same_result(monkeypatch: pytest.MonkeyPatch, fresh: None) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no working C++ compiler")

    monkeypatch.setattr(torch._inductor, "compile", fail)
    W = special(torch.float32)
    with pytest.warns(RuntimeWarning, match=r"no working C\+\+ compiler[\s\S]*PEFT_HARNESS_COMPILE=0") as seen:
        twice(W)
    assert sum(str(one.message).startswith("harness.kernels.torch.support.compiled: nf4_encode") for one in seen) == 1
    assert sum(str(one.message).startswith("harness.kernels.torch.support.compiled: nf4_decode") for one in seen) == 1


def test_runtime_failures_are_not_reported_as_compiler_failures(monkeypatch: pytest.MonkeyPatch, fresh: None) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(torch._inductor, "compile", lambda *_, **__: fail)
    W = special(torch.float32)
    with pytest.warns(RuntimeWarning, match="failed after compilation.*allocate memory") as seen:
        twice(W)
    assert [str(one.message).split()[1] for one in seen] == ["nf4_encode", "nf4_decode"]
    assert not any("C++" in str(one.message) for one in seen)


def test_the_environment_disables_compilation(monkeypatch: pytest.MonkeyPatch, fresh: None, calls: list[bool]) -> None:
    monkeypatch.setenv("PEFT_HARNESS_COMPILE", "0")
    agrees(special(torch.float32), 64)
    assert calls == []


def test_small_tensors_and_unusual_blocks_are_not_compiled(fresh: None, calls: list[bool]) -> None:
    agrees(torch.randn(compiled.LARGE - 64), 64)
    agrees(special(torch.float32), 96)
    assert calls == []


def test_unaligned_values_are_encoded_uncompiled(calls: list[bool]) -> None:
    agrees(torch.cat([torch.zeros(1), special(torch.float32)])[1:], 64)
    assert calls == [False, True, True]


def test_nothing_is_compiled_while_torch_compiles_nothing(fresh: None, calls: list[bool]) -> None:
    W = special(torch.float32)
    with torch.compiler.set_stance("force_eager"):
        agrees(W, 64)
    assert calls == [False, False, False]
    agrees(W, 64)
    assert calls[3:] == [True, True, True]
