"""The kernels of optimizer steps, of AdaLoRA's importance, of mixed adapters and of experts, run by Triton's interpreter.

The conformance engine judges, as it does every implementation; here the cases are small, since the interpreter is slow.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch

from harness.conformance import operations, parity_suite
from harness.conformance.comparison.distant_weights import on_distant_weights
from harness.conformance.execution import suite_run
from harness.conformance.parity_suite import OperationCase
from harness.kernels.torch import lora_experts
from harness.kernels.triton import adalora_importance, adamw8bit_step, dynamic_quantize, galore_step, multi_lora_linear
from harness.methods.registry import implements
from harness.records.record import Outcome
from reference.operations.dynamic_map import dynamic_map, quantize_blockwise

DTYPES = ("float32", "bfloat16", "float16")
CASES: list[tuple[Callable[..., Any], dict[str, Any]]] = [
    (adamw8bit_step.adamw8bit_step, {"shape": [2048], "step": 1}),
    (adamw8bit_step.adamw8bit_step, {"shape": [63, 33], "weight_decay": 0.1, "step": 2}),
    (adamw8bit_step.adamw8bit_step, {"shape": [513], "gradient": "sparse", "step": 50}),
    (dynamic_quantize.dynamic_quantize, {"numel": 1000, "block": 100}),
    (dynamic_quantize.dynamic_quantize, {"numel": 1024, "kind": "ties", "signed": False}),
    (dynamic_quantize.dynamic_quantize, {"numel": 512, "kind": "nan"}),
    (dynamic_quantize.dynamic_quantize, {"numel": 512, "kind": "tiny"}),
    (dynamic_quantize.dynamic_quantize, {"numel": 4100, "block": 4096}),
    (adalora_importance.adalora_importance, {"shape": [20, 33], "rank": 3}),
    (adalora_importance.adalora_importance, {"shape": [16, 32], "rank": 1, "beta1": 0.0, "beta2": 1.0}),
    (galore_step.galore_step, {"shape": [33, 70], "rank": 4, "weight_decay": 0.1}),
    (galore_step.galore_step, {"shape": [70, 33], "rank": 3, "step": 2}),
    (galore_step.galore_step, {"shape": [24, 16], "rank": 4, "side": "full"}),
    (multi_lora_linear.multi_lora_linear, {"ids": [1, -1, 1], "ranks": [3, 17], "shape": [35, 20], "tokens": 2}),
    (lora_experts.lora_experts, {"shape": [16, 16], "experts": 4, "rank": 4, "used": 2}),
    (lora_experts.lora_experts, {"shape": [18, 12], "experts": 2, "rank": 17, "transposed": True, "tokens": 3}),
    (lora_experts.lora_experts, {"shape": [24, 20], "experts": 3, "rank": 3, "tokens": 5}),
]


def _met() -> list[Any]:
    """Return every case in one dtype, in turn, and the last of each function in all.

    The interpreter takes 15 s for a case of experts. Their last case meets the other two dtypes at night.
    """
    last = dict(CASES)
    met = []
    for number, (function, case) in enumerate(CASES):
        for index, dtype in enumerate(DTYPES):
            its_turn = number % 3 == index
            if its_turn or case is last[function]:
                marks = () if its_turn or function is not lora_experts.lora_experts else pytest.mark.nightly
                name = f"{function.__name__}-{parity_suite.in_words(case)}-{dtype}"
                met.append(pytest.param(function, case, dtype, id=name, marks=marks))
    return met


@pytest.mark.parametrize(("function", "case", "dtype"), _met())
def test_the_kernel_passes_every_check(function: Callable[..., Any], case: dict[str, Any], dtype: str) -> None:
    offered = implements(function.__name__, name="kernel", kind="operation", dtypes=DTYPES)(function)
    plan = parity_suite.load_operation(function.__name__)
    results = [one.result for one in suite_run.run_case(offered, plan, OperationCase(case, dtype))]
    assert results
    assert [f"{r.check}: {r.detail}" for r in results if r.outcome is Outcome.FAIL] == []


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_offsets_of_experts_have_64_bits(dtype: str) -> None:
    offered = implements("lora_experts", name="kernel", kind="operation", dtypes=DTYPES)(lora_experts.lora_experts)
    drawn = OperationCase({"shape": [16, 16], "experts": 3, "rank": 3, "tokens": 3}, dtype)
    subject, case = suite_run.call(offered, parity_suite.load_operation("lora_experts"), drawn)
    (judgement,) = on_distant_weights(subject, case)
    assert judgement.passed, judgement


@pytest.mark.parametrize("signed", [True, False])
def test_codes_next_to_every_midpoint_are_the_references_to_the_last_bit(signed: bool) -> None:
    code = dynamic_map(signed)
    middles = (code[1:] + code[:-1]) / 2
    sides = [torch.nextafter(middles, torch.tensor(side)) for side in (9.0, -9.0)]
    x = torch.cat([torch.ones(1), middles, *sides, code, torch.tensor([-0.0, 1e-30])])
    for given, want in zip(
        dynamic_quantize.dynamic_quantize(x, len(x), signed), quantize_blockwise(x, code, len(x)), strict=True
    ):
        assert torch.equal(given, want)


def _drawn(name: str, dtype: torch.dtype, **case: Any) -> dict[str, Any]:
    return operations.every()[name].arguments(dtype, torch.Generator().manual_seed(3), **case)


def test_8_bit_steps_in_place_are_the_steps() -> None:
    given = _drawn("adamw8bit_step", torch.bfloat16, shape=[5, 103])
    want = adamw8bit_step.adamw8bit_step(**given)
    adamw8bit_step.adamw8bit_step_(**given)
    assert all(torch.equal(given[n], t) for n, t in zip(("p", "m", "m_absmax", "v", "v_absmax"), want, strict=True))


def test_an_8_bit_step_represents_subnormal_moments() -> None:
    given = _drawn("adamw8bit_step", torch.float32, shape=[300], step=1)
    given["g"] *= 1e-19  # its square is 1e-38, and a thousandth of that the second moment
    _, m, _, v, v_absmax = adamw8bit_step.adamw8bit_step(**given)
    _, m_want, _, v_want, v_absmax_want = operations.every()["adamw8bit_step"].reference(**given)
    assert v_absmax.max() < torch.finfo(torch.float32).tiny
    # Subnormal numbers: neighbours differ by one in their bits.
    assert ((v_absmax.view(torch.int32) - v_absmax_want.view(torch.int32)).abs() <= 2).all()
    assert (m.int() - m_want.int()).abs().max() <= 1
    assert ((v.int() - v_want.int()).abs() <= 1).all()


def test_an_8_bit_step_in_place_refuses_a_view() -> None:
    given = _drawn("adamw8bit_step", torch.float32, shape=[16, 32])
    given["p"] = given["p"].T
    given["g"] = given["g"].T
    with pytest.raises(ValueError, match="contiguous"):
        adamw8bit_step.adamw8bit_step_(**given)


def test_galore_steps_in_place_are_the_steps() -> None:
    given = _drawn("galore_step", torch.float16, shape=[20, 40], rank=3, weight_decay=0.1)
    want = galore_step.galore_step(**given)
    galore_step.galore_step_(**given)
    assert all(torch.equal(given[name], t) for name, t in zip("WMV", want, strict=True))


def test_importance_of_several_layers_is_that_of_each() -> None:
    layers = [
        _drawn("adalora_importance", dtype, shape=shape, rank=rank)
        for dtype, shape, rank in (
            (torch.float32, [20, 33], 3),
            (torch.bfloat16, [16, 32], 4),
            (torch.float32, [9, 64], 3),
        )
    ]
    layers[2]["grad_B"] = None
    want = [adalora_importance.adalora_importance(**layer) for layer in layers]
    names = [name for name in layers[0] if not name.startswith("beta")]
    scores = adalora_importance.adalora_importance_(
        **{name: [layer[name] for layer in layers] for name in names}, beta1=0.85, beta2=0.7
    )
    for layer, mine, (*states, theirs) in zip(layers, scores, want, strict=True):
        assert torch.equal(mine, theirs)
        kept = (layer[f"{kind}_{name}"] for name in "AEB" for kind in "IU")
        assert all(torch.equal(one, other) for one, other in zip(kept, states, strict=True))
    assert torch.equal(
        layers[2]["I_B"], 0.85 * _drawn("adalora_importance", torch.float32, shape=[9, 64], rank=3)["I_B"]
    )


def test_a_gradient_of_another_dtype_is_converted() -> None:
    given = _drawn("adalora_importance", torch.bfloat16, shape=[16, 32], rank=4)
    want = adalora_importance.adalora_importance(**given)
    wider = {name: given[name].float() for name in ("grad_A", "grad_E", "grad_B")}
    assert all(map(torch.equal, adalora_importance.adalora_importance(**given | wider), want))


def test_layers_of_two_devices_share_no_launch() -> None:
    layer = _drawn("adalora_importance", torch.float32, shape=[9, 64], rank=3)
    layers = {n: [t, t.to("meta"), t] for n, t in layer.items() if not n.startswith("beta")}
    with mock.patch.object(adalora_importance, "_group", side_effect=lambda group, *_: group) as launched:
        adalora_importance.adalora_importance_(**layers, beta1=0.85, beta2=0.7)
    assert [[one[0].device.type for one in call.args[0]] for call in launched.call_args_list] == [
        ["cpu", "cpu"],
        ["meta"],
    ]


def test_sums_over_several_pieces_are_complete() -> None:
    case = {"ids": [1, 0, 1], "ranks": [3, 40], "shape": [150, 20], "tokens": 20}
    offered = implements("multi_lora_linear", name="kernel", kind="operation", dtypes=DTYPES)(
        multi_lora_linear.multi_lora_linear
    )
    plan = parity_suite.load_operation("multi_lora_linear").model_copy(update={"checks": ["outputs", "backward"]})
    results = [one.result for one in suite_run.run_case(offered, plan, OperationCase(case, "float32"))]
    assert [r.outcome for r in results] == [Outcome.PASS, Outcome.PASS]


def test_an_unknown_id_is_rejected() -> None:
    given = _drawn("multi_lora_linear", torch.float32, ids=[0], ranks=[2], shape=[16, 16])
    for wrong in (-2, 1):
        with pytest.raises(ValueError, match=f"id {wrong}"):
            multi_lora_linear.multi_lora_linear(**given | {"ids": [wrong]})
