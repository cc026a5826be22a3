"""LoRA on stacked experts: against matrices written out expert by expert, and against HF peft's own tensors."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import GptOssConfig, MixtralConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from harness.conformance.comparison.stacked_experts import fixed_choice
from harness.kernels.torch import nf4 as kernels
from harness.kernels.torch.lora_experts import grouped_lora_linear
from harness.kernels.torch.support.packed_weight import PackedStack, PackedWeight
from harness.methods.implementations.hf_peft.adapted import wrappers
from reference import lora, qlora
from reference.lora_experts import LoraExperts, packed, unpacked
from reference.operations import nf4
from reference.operations.double_quant import dequantize, quantize
from support.two_layer_model import assert_same, generator

D, H, R = 12, 8, 3
KINDS = ["mixtral", "gpt-oss"]
"""Experts with weights (K, outputs, inputs), and experts with biases, another gate, and weights (K, inputs, outputs)."""


class Block(nn.Module):
    """One module of experts, in float64, with a fixed choice of experts."""

    def __init__(self, kind: str, K: int) -> None:
        super().__init__()
        made: Any = GptOssExperts if kind == "gpt-oss" else MixtralExperts
        config: Any = GptOssConfig if kind == "gpt-oss" else MixtralConfig
        shape = config(hidden_size=D, intermediate_size=H, num_local_experts=K)
        shape._experts_implementation = "eager"
        self.experts = made(shape).double()
        self.count = K
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator(1), dtype=torch.float64) / 3

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.experts(x, *fixed_choice(self.count, x))
        return y


def attached(kind: str, K: int) -> Any:
    adapted = lora.attach(Block(kind, K), lora.Config(rank=R, alpha=6.0, targets=("experts",)), generator())
    with torch.no_grad():
        for tensor in adapted.tensors().values():
            tensor.copy_(torch.randn(tensor.shape, generator=generator(2), dtype=torch.float64))
    return adapted


def rows() -> Tensor:
    return torch.randn(9, D, generator=generator(3), dtype=torch.float64)


@pytest.mark.parametrize("K", [R, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_every_expert_gets_the_product_of_its_own_factors(kind: str, K: int) -> None:
    adapted, plain = attached(kind, K), Block(kind, K)
    layer = adapted.layers["experts"]
    assert isinstance(layer, LoraExperts)
    for name in ("gate_up_proj", "down_proj"):
        A, B = (adapted.tensors()[f"experts.{name}.{letter}"] for letter in "AB")
        weight = plain.experts.get_parameter(name)
        for k in range(K):
            A_k = torch.stack([A[k * R + r] for r in range(R)])
            B_k = torch.stack([B[:, r * K + k] for r in range(R)], dim=1)
            update = 6.0 / R * (B_k @ A_k)
            weight.data[k] += update.T if kind == "gpt-oss" else update
    assert_same({"y": adapted.model(rows())}, {"y": plain(rows())})


@pytest.mark.parametrize("K", [R, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_the_packing_is_that_of_peft(kind: str, K: int) -> None:
    adapted, peft_block = attached(kind, K), Block(kind, K)
    names = ["experts.gate_up_proj", "experts.down_proj"]
    get_peft_model(peft_block, LoraConfig(r=R, lora_alpha=6, target_modules=[], target_parameters=names))
    wrapped = {one.parameter_name: one for one in wrappers(peft_block.experts)}
    for name, wrapper in wrapped.items():
        for letter in "AB":
            own = getattr(wrapper, f"lora_{letter}")["default"].weight
            mine = adapted.tensors()[f"experts.{name}.{letter}"]
            assert own.shape == mine.shape
            own.data.copy_(mine)
        assert_same({"update": wrapper.get_delta_weight("default")}, {"update": adapted.layers["experts"].update(name)})
    x = rows()
    for model in (adapted.model, peft_block):
        model(x).sum().backward()
    assert_same({"y": adapted.model(x)}, {"y": peft_block(x)})
    for name, wrapper in wrapped.items():
        for letter in "AB":
            theirs = getattr(wrapper, f"lora_{letter}")["default"].weight.grad
            assert_same({"grad": adapted.tensors()[f"experts.{name}.{letter}"].grad}, {"grad": theirs})


def test_packing_and_unpacking_are_inverse() -> None:
    A, B = torch.randn(5, R, D, generator=generator()), torch.randn(5, H, R, generator=generator())
    assert all(map(torch.equal, unpacked(*packed(A, B), 5), (A, B)))


@pytest.mark.parametrize("kind", KINDS)
def test_merging_adds_every_update_and_unmerging_is_exact(kind: str) -> None:
    adapted = attached(kind, 4)
    before, weights = adapted.model(rows()), copy.deepcopy(adapted.layers["experts"].base.state_dict())
    adapted.merge()
    assert isinstance(adapted.model.experts, type(adapted.layers["experts"].base))
    assert_same({"y": adapted.model(rows())}, {"y": before})
    adapted.unmerge()
    assert torch.equal(adapted.model(rows()), before)
    assert all(torch.equal(t, weights[name]) for name, t in adapted.layers["experts"].base.state_dict().items())


def test_an_expert_without_tokens_has_a_gradient_of_zero() -> None:
    adapted = attached("mixtral", 4)
    adapted.model(rows()).square().sum().backward()
    grads = {name: t.grad for name, t in adapted.tensors().items()}
    A, B = unpacked(grads["experts.gate_up_proj.A"], grads["experts.gate_up_proj.B"], 4)
    assert [bool(one.any()) for one in A] == [bool(one.any()) for one in B] == [False, True, True, True]


def test_threads_that_call_one_layer_do_not_disturb_each_other() -> None:
    model, x = attached("mixtral", R).model, rows()
    with torch.no_grad():
        alone = model(x)
    with ThreadPoolExecutor(4) as threads:  # each thread records gradients: no_grad holds for one thread only
        for y in threads.map(lambda _: model(x), range(64)):
            assert torch.equal(y, alone)


@pytest.mark.slow
def test_the_grouped_product_has_second_derivatives_with_strided_factors() -> None:
    K, P, D, E = 2, 4, 3, 5
    x, W, A = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((P, D), (K, E, D), (K, R, D)))
    B = torch.randn(E, R, K, dtype=torch.float64, requires_grad=True)

    def product(x: Tensor, W: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return grouped_lora_linear(x, W, A, B.permute(2, 0, 1), 0.5, torch.tensor([3, 1]))

    assert torch.autograd.gradgradcheck(product, (x, W, A, B))


def test_a_dropout_is_rejected_and_the_model_stays() -> None:
    block = Block("mixtral", 3)
    with pytest.raises(ValueError, match=r"^experts: LoRA on stacked experts has no dropout, and dropout is 0.1"):
        lora.attach(block, lora.Config(targets=("experts",), dropout=0.1), generator())
    assert isinstance(block.experts, MixtralExperts)


def quantised(K: int, block: int, double_quant: bool) -> tuple[Any, Any]:
    """Return experts before they were packed, and QLoRA's adapted experts with drawn factors."""
    dense, config = (
        Block("gpt-oss", K),
        qlora.Config(rank=R, block=block, double_quant=double_quant, targets=("experts",)),
    )
    adapted = qlora.attach(copy.deepcopy(dense), config, generator())
    with torch.no_grad():
        for tensor in adapted.tensors().values():
            tensor.copy_(torch.randn(tensor.shape, generator=generator(2), dtype=torch.float64))
    return dense, adapted


@pytest.mark.parametrize("double_quant", [False, True])
def test_qlora_computes_with_the_decoded_experts_and_their_updates(double_quant: bool) -> None:
    dense, adapted = quantised(3, 64, double_quant)
    layer = adapted.layers["experts"]
    for name in ("gate_up_proj", "down_proj"):
        weight = dense.experts.get_parameter(name)
        codes, absmax = nf4.quantize(weight.detach(), 64)
        if double_quant:
            absmax = dequantize(*quantize(absmax))
        decoded = nf4.dequantize(codes, absmax, 64).view(weight.shape).double()
        assert not torch.equal(decoded, weight)
        weight.data = decoded + layer.update(name).detach()
    assert_same({"y": adapted.model(rows())}, {"y": dense(rows())})
    adapted.merge()
    assert_same({"y": adapted.model(rows())}, {"y": dense(rows())})


def test_detached_qlora_leaves_the_experts_of_before() -> None:
    dense, adapted = quantised(3, 64, True)
    adapted.detach()
    assert torch.equal(adapted.model(rows()), dense(rows()))


def test_the_bias_of_b_is_refused_for_packed_experts() -> None:
    block = Block("mixtral", 3)
    with pytest.raises(ValueError, match=r"^experts: lora_bias adapts linear layers only"):
        qlora.attach(block, qlora.Config(lora_bias=True, targets=("experts",)), generator())
    assert type(block.experts) is MixtralExperts


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("block", [7, 64, 1000])
def test_a_packed_stack_gives_the_matrix_of_each_expert(block: int, transposed: bool) -> None:
    weight = torch.randn(5, 9, 6, generator=generator(1))
    stack = PackedStack(PackedWeight(*kernels.quantize(weight, block), block, (5, 9, 6)), transposed)
    decoded = kernels.dequantize(*kernels.quantize(weight, block), block, (5, 9, 6), torch.float32)
    want = decoded.transpose(1, 2) if transposed else decoded
    assert stack.shape == want.shape
    assert torch.equal(stack.dense(torch.float32), want)
    matrix = stack.matrices(torch.float32)
    assert all(torch.equal(matrix(k), want[k]) for k in (4, 0, 2))


def test_packed_experts_have_second_derivatives() -> None:
    x, dtype = rows(), torch.float64
    weight = torch.randn(3, D, D, generator=generator(1), dtype=dtype)
    stack = PackedStack(PackedWeight(*kernels.quantize(weight, 64), 64, (3, D, D)))
    A, B = (torch.randn(3, *shape, generator=generator(n), dtype=dtype) for n, shape in ((2, (R, D)), (3, (D, R))))
    counts = torch.tensor([4, 0, 5])
    tensors = [t.requires_grad_() for t in (x, A, B)]
    assert torch.autograd.gradgradcheck(
        lambda x, A, B: grouped_lora_linear(x, stack, A, B, 2.0, counts), tensors, fast_mode=True
    )
