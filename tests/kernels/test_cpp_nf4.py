"""The C++ kernels for NF4 give the reference's codes and values to the last bit, and torch takes over where they cannot."""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from harness.kernels.cpp import library
from harness.kernels.cpp import nf4 as cpp
from harness.kernels.torch import nf4
from harness.kernels.torch.nf4_linear import nf4_linear
from harness.kernels.torch.support.packed_weight import PackedWeight
from reference.operations import double_quant
from reference.operations import nf4 as reference

pytestmark = pytest.mark.build

COUNT = 9 * 4096 + 37
"""Whole blocks of every tried size, and an odd rest."""
PATIENCE = 120
"""Seconds after which a process that waits is killed."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@pytest.fixture(autouse=True)
def _no_warning() -> Iterator[None]:
    """Raise the warning of a failed compilation. Otherwise torch's results would let every test pass."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="harness.kernels.cpp", category=RuntimeWarning)
        yield


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether the library was given, for each time that it was asked for."""
    given: list[bool] = []
    ask = library.library_for
    monkeypatch.setattr(cpp, "library_for", lambda *t: given.append((found := ask(*t)) is not None) or found)
    return given


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Return an empty cache folder for a process that has loaded no library."""
    monkeypatch.setenv("PEFT_HARNESS_CACHE", str(tmp_path))
    library._loaded.clear()
    yield tmp_path
    library._loaded.clear()


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


@pytest.mark.parametrize("switch", ["1", "0"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block", [2, 32, 64, 96, 4096])
def test_codes_and_values_are_the_reference_s(
    block: int, dtype: torch.dtype, switch: str, answers: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PEFT_HARNESS_COMPILE", switch)
    agrees(special(dtype), block)
    assert answers == [switch == "1"] * (1 if dtype == torch.float64 else 3)


@pytest.mark.parametrize("without", ["avx512bw", "avx512f", "avx2", "avx"])
def test_cpus_without_wide_vectors_get_the_same_bits(
    without: str, answers: list[bool], fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if platform.machine() != "x86_64":
        pytest.skip(f"the instructions of {without} exist on x86 only")
    monkeypatch.setattr(library, "_FLAGS", (*library._FLAGS, f"-mno-{without}"))
    for dtype in DTYPES:
        agrees(special(dtype), 64)
        agrees(special(dtype), 96)
    assert all(answers)
    for dtype in DTYPES[:3]:
        x, bias, weight, right = exact(2, dtype)
        assert torch.equal(nf4_linear(x, weight.packed, weight.absmax, 64, (40, 192), bias), right)


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_a_result_that_bypasses_the_cache_has_the_same_values(dtype: torch.dtype, answers: list[bool]) -> None:
    W = special(dtype, (32 << 20) // dtype.itemsize + 64 + 5)
    agrees(W, 64)
    assert all(answers)


@pytest.mark.parametrize("switch", ["1", "0"])
def test_double_quantised_values_are_the_reference_s(
    switch: str, answers: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PEFT_HARNESS_COMPILE", switch)
    W = torch.randn(COUNT, generator=torch.Generator().manual_seed(1))
    packed, absmax = nf4.quantize(W, 64)
    constants = nf4.double_quantize(absmax, 256)
    decoded = double_quant.dequantize(*constants)
    assert same(nf4.double_dequantize(*constants, 256), decoded)
    values = nf4.dequantize_double(packed, *constants, 64, 256, W.shape, W.dtype)
    assert same(values, nf4.dequantize(packed, decoded, 64, W.shape, W.dtype))
    assert set(answers) == {switch == "1"}


def exact(rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, PackedWeight, Tensor]:
    """Return (x, bias, W, x W^T + bias) of small integers, of which every sum is exact in every dtype."""
    draw = torch.Generator().manual_seed(rows)
    W = torch.randint(-1, 2, (40, 192), generator=draw).float()
    W[:, ::64] = 1  # each block has absmax 1, so that the levels -1, 0 and 1 are the values
    x = torch.randint(-1, 2, (rows, 192), generator=draw).to(dtype)
    bias = torch.randint(-9, 10, (40,), generator=draw).to(dtype)
    packed, absmax = nf4.quantize(W, 64)
    return x, bias, PackedWeight(packed, absmax, 64, (40, 192)), (x.double() @ W.double().T + bias).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5])
def test_few_rows_are_multiplied_by_the_packed_weight(rows: int, dtype: torch.dtype) -> None:
    x, bias, weight, right = exact(rows, dtype)
    assert torch.equal(nf4_linear(x, weight.packed, weight.absmax, 64, (40, 192), bias), right)
    without = nf4_linear(x, weight.packed, weight.absmax, 64, (40, 192), None)
    assert torch.equal(without + bias, right)
    assert (weight.times_few(x, bias) is None) == (rows == 5)


def test_few_strided_rows_and_rows_that_end_inside_a_block() -> None:
    x, bias, weight, right = exact(3, torch.float32)
    strided = torch.stack([x, x], dim=2)[:, :, 0]
    assert torch.equal(nf4_linear(strided, weight.packed, weight.absmax, 64, (40, 192), bias), right)
    assert weight.times_few(x[:, :128], None) is None
    assert weight.times_few(x, bias[:1]) is None
    assert torch.equal(nf4_linear(torch._neg_view(-x), weight.packed, weight.absmax, 64, (40, 192), bias), right)
    narrow = PackedWeight(weight.packed, weight.absmax, 64, (80, 96))
    assert narrow.times_few(torch.ones(1, 96), None) is None


@pytest.mark.parametrize(
    "damage", [lambda W: replace(W, absmax=W.absmax[1:]), lambda W: replace(W, packed=W.packed[1:])]
)
def test_few_rows_of_a_weight_with_missing_values_raise(damage: Callable[[PackedWeight], PackedWeight]) -> None:
    x, bias, weight, _ = exact(1, torch.float32)
    with pytest.raises(ValueError, match="needs 3840 bytes and 120 constants"):
        damage(weight).times_few(x, bias)


def test_constants_in_another_dtype_are_converted() -> None:
    x, bias, weight, right = exact(2, torch.float32)
    assert weight.times_few(x, bias) is not None
    wide = weight.absmax.double()
    assert torch.equal(nf4_linear(x, weight.packed, wide, 64, (40, 192), bias), right)
    codes, *second = nf4.double_quantize(weight.absmax, 256)
    assert torch.equal(nf4.double_dequantize(codes.int(), *second, 256), nf4.double_dequantize(codes, *second, 256))


def test_a_first_use_under_fake_tensors_leaves_no_empty_tables(tmp_path: Path) -> None:
    script = """
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from harness.kernels.torch import nf4
with FakeTensorMode(allow_non_fake_inputs=True):
    packed, absmax = nf4.quantize(torch.ones(64, 64), 64)
    nf4.dequantize(packed, absmax, 64, (64, 64), torch.float64)
    nf4.double_dequantize(*nf4.double_quantize(absmax, 256), 256)
W = torch.randn(64, 64)
packed, absmax = nf4.quantize(W, 64)
found = nf4.dequantize(packed, absmax, 64, (64, 64), torch.float64)
assert torch.equal(found.float(), nf4.dequantize(packed, absmax, 64, (64, 64), torch.float32))
nf4.double_dequantize(*nf4.double_quantize(absmax, 256), 256)
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path)


def test_a_counter_of_operations_sees_the_product() -> None:
    x, bias, weight, right = exact(1, torch.float32)
    with FlopCounterMode(display=False) as counter:
        y = nf4_linear(x, weight.packed, weight.absmax, 64, (40, 192), bias)
    assert counter.get_total_flops() == 2 * 40 * 192
    assert torch.equal(y, right)


def test_a_buffer_s_version_counts_what_is_written() -> None:
    packed, absmax = nf4.quantize(special(torch.float32), 64)
    x, out = torch.ones(COUNT, requires_grad=True), torch.zeros(COUNT)
    y = (x * out).sum()  # needs `out` as it was
    nf4.dequantize(packed, absmax, 64, (COUNT,), torch.float32, out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_inference_mode_and_parameters(answers: list[bool]) -> None:
    W = special(torch.float32)
    with torch.inference_mode():
        agrees(W, 64)
        packed, _ = nf4.quantize(W, 64)
    assert packed.is_inference()
    agrees(torch.nn.Parameter(W), 64)
    assert all(answers)


def test_threads_compile_once_and_a_later_process_not_at_all(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []
    run = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda command, **k: commands.append(command) or run(command, **k))
    right: list[bool] = []

    def work(scale: float) -> None:
        agrees(special(torch.float32) * scale, 64)
        right.append(True)

    threads = [threading.Thread(target=work, args=(scale,)) for scale in (1, 3, -2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    library._loaded.clear()
    agrees(special(torch.float32), 64)
    assert len(right) == 3
    assert len(commands) == 1
    assert [path.suffix for path in (fresh / "kernels").iterdir()] == [".so"]


@pytest.mark.parametrize("compiler", ["false", "no-such-compiler"])
def test_a_failing_compiler_gives_one_warning_and_the_same_result(
    compiler: str, monkeypatch: pytest.MonkeyPatch, fresh: Path
) -> None:
    monkeypatch.setenv("CXX", compiler)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always", RuntimeWarning)
        for _ in range(2):
            agrees(special(torch.float32), 64)
    (warning,) = [str(one.message) for one in seen if "harness.kernels.cpp" in str(one.message)]
    assert "hint: install a C++ compiler" in warning
    assert list(fresh.rglob("*.so")) == []


def test_a_process_that_is_forked_during_compilation_does_not_wait(fresh: Path) -> None:
    with library._COMPILING:
        child = os.fork()
        if not child:
            signal.alarm(PATIENCE)  # kills the process if it waits
            os._exit(library.library_for(torch.zeros(1)) is None)
    assert os.waitpid(child, 0)[1] == 0


def test_a_damaged_library_is_compiled_again(fresh: Path) -> None:
    path = library._path()
    path.parent.mkdir()
    path.write_bytes(b"")
    agrees(special(torch.float32), 64)
    assert path.stat().st_size


def test_a_user_without_a_home_gets_the_same_result(monkeypatch: pytest.MonkeyPatch, fresh: Path) -> None:
    def fail() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(library, "cache_root", fail)
    with pytest.warns(RuntimeWarning, match="Could not determine home directory"):
        packed, absmax = nf4.quantize(torch.ones(64), 64)
    assert nf4.dequantize(packed, absmax, 64, (64,), torch.float32).tolist() == [1.0] * 64
