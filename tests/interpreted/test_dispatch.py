"""Who calls Triton's kernels, and how: what an Operation does is what the kernels' own tests look at."""

from __future__ import annotations

import ast
import importlib
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

from harness.conformance import operations
from harness.kernels import device
from harness.kernels import triton as gpu
from harness.kernels.torch.lora_linear import lora_linear
from harness.kernels.torch.nf4 import quantize
from harness.kernels.torch.nf4_lora_linear import nf4_lora_linear
from harness.kernels.triton.support import launch as launches
from harness.kernels.triton.support.launch import launch


def test_every_launch_uses_the_device_of_its_tensors() -> None:
    bare = [
        f"{file.name}:{node.lineno}"
        for file in sorted(Path(gpu.__path__[0]).rglob("*.py"))
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript)
    ]
    assert [one.partition(":")[0] for one in bare] == ["launch.py"], bare


@triton.jit
def nothing(number, tensor):
    pass


def test_a_launch_is_on_the_device_of_its_first_tensor() -> None:
    first = torch.ones(1)
    for positional, named in (((3, first), {}), ((3,), {"tensor": first})):
        with mock.patch.object(torch.cuda, "device_of") as taken:
            launch(nothing, (1,), *positional, **named)
        assert taken.call_args.args[0] is first


@triton.jit
def counted(total, N):
    for _ in range(0, N):
        tl.store(total, tl.load(total) + 1)


def test_the_interpreter_of_triton_3_6_runs_a_loop_that_ends_at_a_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    newer = interpreter._patch_lang_tensor

    def of_triton_3_6(tensor: Any, scope: Any) -> None:
        newer(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data))  # an array: NumPy 2.4 raises TypeError

    monkeypatch.setattr(triton, "__version__", "3.6.0")
    monkeypatch.setattr(interpreter, "_patch_lang_tensor", of_triton_3_6)
    launches._mend_interpreter.cache_clear()
    total = torch.zeros(1)
    launch(counted, (1,), total, 3)
    assert total.item() == 3
    launches._mend_interpreter.cache_clear()


STEPS = {
    "adamw8bit_step": ({"shape": [5, 103]}, ("p", "m", "m_absmax", "v", "v_absmax")),
    "galore_step": ({"shape": [20, 40], "rank": 3}, ("W", "M", "V")),
    "adalora_importance": ({"shape": [20, 33], "rank": 3}, ("I_A", "U_A", "I_E", "U_E", "I_B", "U_B")),
}  # fmt: skip


def drawn(name: str, dtype: torch.dtype, **case: Any) -> dict[str, Any]:
    given = operations.every()[name].arguments(dtype, torch.Generator().manual_seed(3), **case)
    return {key: one for key, one in given.items() if key != "side"}


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("in_place", [False, True], ids=["new", "in place"])
def test_a_step_is_dispatched_to_its_kernel(name: str, in_place: bool) -> None:
    case, states = STEPS[name]
    dispatched = importlib.import_module(f"harness.kernels.torch.{name}")
    of_gpu = importlib.import_module(f"harness.kernels.triton.{name}")
    given = drawn(name, torch.bfloat16, **case)
    want = getattr(of_gpu, name)(**given)
    if not in_place:
        with mock.patch.object(of_gpu, name, wraps=getattr(of_gpu, name)) as called:
            have = getattr(dispatched, name)(**given)
        assert called.call_count == 1
    else:
        are_lists = name == "adalora_importance"
        arguments = {n: [t] if are_lists and not n.startswith("beta") else t for n, t in given.items()}
        with mock.patch.object(of_gpu, f"{name}_", wraps=getattr(of_gpu, f"{name}_")) as called:
            getattr(dispatched, f"{name}_")(**arguments)
        assert called.call_count == 1
        have = tuple(given[one] for one in states)
    assert all(torch.equal(one, other) for one, other in zip(have, want, strict=not in_place))


@pytest.mark.parametrize("name", ["adamw8bit_step", "galore_step"])
def test_options_of_a_step_have_the_same_defaults(name: str) -> None:
    case, states = STEPS[name]
    dispatched = importlib.import_module(f"harness.kernels.torch.{name}")
    given = drawn(name, torch.float32, **case)
    given = {n: one for n, one in given.items() if isinstance(one, torch.Tensor) or one is None} | {
        "step": 2,
        "lr": 0.1,
    }
    want = getattr(dispatched, name)(**given)
    getattr(dispatched, f"{name}_")(**given)
    assert all(torch.equal(given[one], other) for one, other in zip(states, want, strict=True))


def test_on_a_gpu_float32_is_multiplied_by_torch_and_16_bits_by_triton() -> None:
    def on_gpu(dtype: torch.dtype) -> Any:
        return SimpleNamespace(is_cuda=True, dtype=dtype, is_floating_point=lambda: dtype.is_floating_point)

    with mock.patch.object(device, "interpreted", return_value=False), mock.patch.object(device, "_compiles"):
        for dtype, multiplied in ((torch.bfloat16, True), (torch.float16, True), (torch.float32, False)):
            assert device.by_triton(on_gpu(dtype), on_gpu(torch.uint8))
            assert device.multiplied_by_triton(on_gpu(dtype), on_gpu(torch.uint8)) is multiplied


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, where a block is short
def test_a_bias_that_trains_gets_its_gradient() -> None:
    W, x, A, B = torch.randn(6, 64), torch.randn(3, 64), torch.randn(2, 64), torch.randn(6, 2)
    for layer, weight in ((lora_linear, (W,)), (nf4_lora_linear, (*quantize(W, 64), 64, (6, 64)))):
        bias = torch.zeros(6, requires_grad=True)
        layer(x, *weight, bias, A, B, 1.0, None).sum().backward()
        assert torch.equal(bias.grad, torch.full((6,), 3.0))


def test_without_the_interpreter_these_tests_stop_with_a_hint() -> None:
    environment = {name: one for name, one in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", str(Path(__file__).with_name("test_rounding.py"))],
        env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "TRITON_INTERPRET=1 python -m pytest tests/interpreted" in done.stderr
