"""NF4 by Triton's kernels: every case of the parity suites, and bit for bit what the reference makes of odd values."""

from __future__ import annotations

from typing import get_args
from unittest import mock

import pytest
import torch
from torch import Tensor

from harness.conformance.comparison.quantised_codes import Kind, values
from harness.conformance.comparison.tolerance_policies import noise_floor
from harness.kernels.torch import nf4 as dispatched
from harness.kernels.torch import nf4_linear as linear_module
from harness.kernels.torch import nf4_lora_linear
from harness.kernels.torch.support.packed_weight import PackedWeight
from harness.kernels.triton import nf4, nf4_linear
from harness.testing import conformance
from reference.operations import double_quant
from reference.operations import nf4 as reference
from reference.operations.dynamic_map import dynamic_map

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of NaN and overflow in the interpreter
CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Around a program's tile (8192 values decoded, 4096 coded), a block, and the 32 values that share one mask.
SHAPES = [
    ((1,), 64),
    ((63, 65), 64),
    ((130, 64), 64),
    ((3, 5, 7), 32),
    ((3, 4097), 4096),
    ((8193,), 256),
    ((9,), 16384),
]

# One dtype: the others' bits are compared below, in a tenth of the time.
quantize = conformance("nf4_quantize", dtypes=["bfloat16"])(nf4.quantize)
dequantize = conformance("nf4_dequantize", dtypes=["bfloat16"])(nf4.dequantize)


def bits(tensor: Tensor) -> Tensor:
    """Return the bits of numbers, those of every NaN alike."""
    whole = tensor.contiguous().view({2: torch.int16, 4: torch.int32}[tensor.element_size()])
    return torch.where(tensor.isnan(), -1, whole)


@pytest.mark.parametrize("kind", get_args(Kind))
@pytest.mark.parametrize(("shape", "block"), SHAPES)
def test_codes_and_values_have_the_bits_of_the_reference(shape: tuple[int, ...], block: int, kind: Kind) -> None:
    for dtype in DTYPES:
        W = values(kind, shape, block, reference.codebook(), dtype, torch.Generator().manual_seed(1))
        codes, absmax = reference.quantize(W, block)
        packed, mine = nf4.quantize(W, block)
        assert torch.equal(packed, reference.pack(codes))
        assert torch.equal(bits(mine), bits(absmax))
        want = reference.dequantize(codes, absmax, block).view(shape).to(dtype)
        assert torch.equal(bits(nf4.dequantize(packed, absmax, block, shape, dtype)), bits(want))


@pytest.mark.parametrize(
    ("shape", "block", "second"), [(*SHAPES[0], 256), (*SHAPES[1], 8), (*SHAPES[2], 7), (*SHAPES[4], 256)]
)
def test_one_launch_decodes_what_is_quantised_twice(shape: tuple[int, ...], block: int, second: int) -> None:
    for dtype in DTYPES:
        W = values("scales", shape, block, reference.codebook(), dtype, torch.Generator().manual_seed(2))
        codes, absmax = reference.quantize(W, block)
        twice = double_quant.quantize(absmax, second)
        want = reference.dequantize(codes, double_quant.dequantize(*twice, second), block).view(shape).to(dtype)
        have = nf4.dequantize_double(reference.pack(codes), *twice, dynamic_map(), block, second, shape, dtype)
        assert torch.equal(bits(have), bits(want))


def test_memory_past_the_end_is_not_written() -> None:
    W = torch.randn(67)
    packed, absmax = nf4.quantize(W, 64)
    memory = torch.full((200,), 7.0)
    nf4.dequantize(packed, absmax, 64, (67,), torch.float32, out=memory)
    assert torch.equal(memory[:67], nf4.dequantize(packed, absmax, 64, (67,), torch.float32))
    assert bool((memory[67:] == 7.0).all())


def test_unsupported_arguments_are_rejected() -> None:
    with pytest.raises(ValueError, match="power of two"):
        nf4.quantize(torch.ones(96), 48)
    with pytest.raises(ValueError, match="needs 9 bytes and 1 constants, got 8 and 1"):
        nf4.dequantize(torch.zeros(8, dtype=torch.uint8), torch.ones(1), 64, (3, 6), torch.float32)
    with pytest.raises(ValueError, match="no fused kernel"):  # a row that does not begin with a block
        nf4_linear.fused(torch.ones(1, 96), torch.zeros(96, dtype=torch.uint8), torch.ones(3), 64, (2, 96), None)


def _sizes(**changed: tuple[int, ...]) -> dict[str, Tensor]:
    """Return what a (64, 64) matrix is in blocks of 64 and 8, or something that is not it."""
    right = {"packed": (2048,), "codes": (64,), "absmax2": (8,), "offset": ()} | changed
    return {
        n: torch.zeros(s, dtype=torch.uint8 if n in ("packed", "codes") else torch.float32) for n, s in right.items()
    }


@pytest.mark.parametrize(
    "wrong",
    [{"packed": (2047,)}, {"packed": (2049,)}, {"codes": (63,)}, {"codes": (65,)},
     {"absmax2": (1,)}, {"absmax2": (9,)}, {"offset": (0,)}, {"offset": (64,)}],
    ids=str,
)  # fmt: skip
def test_triton_and_torch_reject_wrong_sizes_with_the_same_message(wrong: dict[str, tuple[int, ...]]) -> None:
    messages = []
    for by in (True, False):
        with (
            mock.patch.object(dispatched, "by_triton", return_value=by),
            pytest.raises(ValueError, match=r"; they take|, got") as error,
        ):
            dispatched.dequantize_double(**_sizes(**wrong), block=64, block2=8, shape=(64, 64), dtype=torch.bfloat16)
        messages.append(str(error.value))
    assert messages[0] == messages[1]


@pytest.mark.parametrize(
    "wrong", [{"packed": (2047,)}, {"packed": (2049,)}, {"codes": (63,)}, {"codes": (65,)}], ids=str
)
def test_layers_reject_wrong_sizes_with_the_same_message(wrong: dict[str, tuple[int, ...]]) -> None:
    given, messages = _sizes(**wrong), []
    weight = PackedWeight(given["packed"], given["codes"].float(), 64, (64, 64))
    A, B = torch.zeros(2, 64), torch.zeros(64, 2)
    for by in (True, False):
        for layer, name, others in (
            (linear_module, "by_triton", (None,)),
            (nf4_lora_linear, "multiplied_by_triton", (None, A, B, 1.0, None)),
        ):
            call = getattr(layer, f"packed_{layer.__name__.rpartition('nf4_')[2]}")
            with mock.patch.object(layer, name, return_value=by), pytest.raises(ValueError, match="got") as error:
                call(torch.ones(2, 64), weight, *others)
            messages.append(str(error.value))
    assert len(set(messages)) == 1


@conformance("nf4_linear", dtypes=["bfloat16"])
def fused_for_any_number_of_tokens(**arguments: object) -> Tensor:
    with mock.patch.object(nf4_linear, "is_fused_faster", return_value=True):
        return nf4_linear.nf4_linear(**arguments)  # type: ignore[arg-type]


def test_both_paths_agree_in_float16() -> None:
    W, x = torch.randn(48, 128), torch.randn(2, 9, 128, dtype=torch.float16)
    packed, absmax = nf4.quantize(W, 64)
    few, many = (
        _with_few(is_few, x, packed, absmax, 64, (48, 128), torch.ones(48, dtype=x.dtype)) for is_few in (True, False)
    )
    assert few.shape == (2, 9, 48)
    decoded = reference.dequantize(reference.unpack(packed, 48 * 128), absmax, 64).reshape(48, 128).double()
    truth = {"y": x.double() @ decoded.T + 1}
    judged = noise_floor({"y": few}, truth, {"y": many}, "float16")
    assert judged.passed, judged


def _with_few(is_few: bool, *arguments: object) -> Tensor:
    with mock.patch.object(nf4_linear, "is_fused_faster", return_value=is_few):
        return nf4_linear.nf4_linear(*arguments)  # type: ignore[arg-type]


def test_the_fused_product_writes_only_its_output() -> None:
    """67 rows and 3 tokens: two tiles are computed beyond the last of either, and must not be seen."""
    W, x = torch.randn(67, 128), torch.randn(3, 128, dtype=torch.float16)
    packed, absmax = nf4.quantize(W, 64)
    with mock.patch.object(torch, "empty", lambda *shape, **options: torch.full(shape, torch.nan, **options)):
        y = nf4_linear.fused(x, packed, absmax, 64, (67, 128), None)
    assert bool(y.isfinite().all())


@pytest.mark.parametrize("tokens", [1, 16, 17, 64, 65, 4096])
def test_more_rows_never_mean_fewer_tokens(tokens: int) -> None:
    chosen = [nf4_linear.is_fused_faster(tokens, E, CPU) for E in (1, 4096, 8192, 16384, 100_000)]
    assert chosen == sorted(chosen)
    assert tokens <= 64 or not any(chosen)


def test_the_fused_kernel_is_chosen_by_the_crossover_table() -> None:
    assert not any(nf4_linear.is_fused_faster(1, E, CPU) for E in (1024, 4096, 8192))
    assert nf4_linear.is_fused_faster(32, 14336, CPU)
