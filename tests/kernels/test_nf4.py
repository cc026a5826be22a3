"""NF4 by `fused`: what the conformance engine does not see: many pieces, threads, memory that is used again."""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from harness.conformance.comparison.tolerance_policies import noise_floor
from harness.kernels.torch import nf4
from harness.kernels.torch.nf4_linear import Nf4Linear, nf4_linear
from harness.kernels.torch.nf4_lora_linear import nf4_lora_linear, packed_lora_linear
from harness.kernels.torch.support import chunks, huge_pages, packed_weight
from harness.methods.implementations.fused import bases
from reference.operations import double_quant
from reference.operations import nf4 as reference


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def decoded(packed: Tensor, absmax: Tensor, block: int, shape: tuple[int, ...]) -> Tensor:
    count = torch.Size(shape).numel()
    return reference.dequantize(reference.unpack(packed, count), absmax, block).view(shape)


def test_codebooks_are_the_reference_s() -> None:
    assert torch.equal(nf4.levels(), reference.codebook())
    assert torch.equal(nf4.dynamic_map(torch.device("cpu")), double_quant.dynamic_map())


def test_every_number_near_a_midpoint_or_a_cell_s_end_gets_the_nearest_code() -> None:
    levels = reference.codebook()
    edges = torch.cat([(levels[1:] + levels[:-1]) / 2, levels, torch.arange(-32, 33) / 32]).clamp(-1, 1)
    near = [edges]
    for towards in (-2.0, 2.0):
        step = edges
        for _ in range(40):
            step = torch.nextafter(step, torch.tensor(towards)).clamp(-1, 1)
            near.append(step)
    numbers = torch.cat([*near, torch.linspace(-1, 1, 100_003)])
    W = torch.stack([torch.ones_like(numbers), numbers], dim=1)  # absmax 1: every division is exact
    packed, absmax = nf4.quantize(W, 2)
    codes, _ = reference.quantize(W, 2)
    assert torch.equal(packed, reference.pack(codes))
    assert bool((absmax == 1).all())


@pytest.mark.nightly
@pytest.mark.parametrize("block", [64, 96, 4096])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_many_pieces_equal_one(dtype: torch.dtype, block: int, threads: int) -> None:
    W = torch.randn(1500, 1501, generator=torch.Generator().manual_seed(0)).to(dtype)
    W[700, 3], W[20, 5], W[100:107] = torch.nan, torch.inf, 0
    packed, absmax = nf4.quantize(W, block)
    codes, largest = reference.quantize(W, block)
    assert torch.equal(packed, reference.pack(codes))
    assert torch.equal(absmax.nan_to_num(), largest.nan_to_num())
    finite = absmax.nan_to_num(1.0, 1.0)
    assert torch.equal(
        nf4.dequantize(packed, finite, block, W.shape, dtype), decoded(packed, finite, block, W.shape).to(dtype)
    )
    two = nf4.double_quantize(finite, 256)
    want = decoded(packed, double_quant.dequantize(*two), block, W.shape).to(dtype)
    assert torch.equal(nf4.dequantize_double(packed, *two, block, 256, W.shape, dtype), want)


@pytest.mark.slow
def test_large_results_are_right_in_inference_mode_too(threads: int) -> None:
    W = torch.randn(2900, 2900, generator=torch.Generator().manual_seed(0))  # above 32 MiB
    with torch.inference_mode():
        packed, absmax = nf4.quantize(W, 64)
        got = nf4.dequantize(packed, absmax, 64, W.shape, torch.float32)
    assert got.is_inference()
    assert torch.equal(got, decoded(packed.clone(), absmax, 64, (2900, 2900)))


def test_advice_on_pages_stays_within_the_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[tuple[int, int]] = []
    monkeypatch.setattr(huge_pages, "_advise", lambda: lambda first, size, _: given.append((first, size)))
    out = huge_pages.empty((2900, 2900), torch.float32, torch.device("cpu"))
    huge_pages.empty((100, 100), torch.float32, torch.device("cpu"))
    ((first, size),) = given
    assert out.data_ptr() <= first
    assert first + size <= out.data_ptr() + 2900 * 2900 * 4


def test_without_huge_pages_results_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("mmap.MADV_HUGEPAGE", raising=False)
    huge_pages._advise.cache_clear()
    assert huge_pages._advise() is None
    assert huge_pages.empty((2900, 2900), torch.float32, torch.device("cpu")).shape == (2900, 2900)
    huge_pages._advise.cache_clear()


def test_an_error_in_a_thread_reaches_the_caller(threads: int) -> None:
    def work(number: int) -> None:
        raise ArithmeticError(str(number))

    with pytest.raises(ArithmeticError):
        chunks.for_each(work, [(1,), (2,)], values=1 << 30)


def test_invalid_arguments_are_rejected() -> None:
    packed, absmax = nf4.quantize(torch.randn(8, 64), 64)
    for wrong in ((packed[:-1], absmax), (packed, absmax[:-1])):
        with pytest.raises(ValueError, match="needs 256 bytes and 8 constants"):
            nf4.dequantize(*wrong, 64, (8, 64), torch.float32)
    with pytest.raises(ValueError, match="block of at least 1"):
        nf4.quantize(torch.randn(8), 0)
    with pytest.raises(ValueError, match="constants and 1 offset"):
        nf4.double_dequantize(packed, absmax, absmax[0], 64)
    with pytest.raises(ValueError, match="needs at least one absmax"):
        nf4.double_quantize(absmax[:0], 256)


def made(E: int, D: int, seed: int, double: bool = False) -> Nf4Linear:
    dense = nn.Linear(D, E)
    with torch.no_grad():
        dense.weight.normal_(generator=torch.Generator().manual_seed(seed))
        dense.bias.normal_(generator=torch.Generator().manual_seed(seed))
    return Nf4Linear(dense, torch.float32, double=double)


def test_layers_with_a_shared_buffer_have_correct_gradients() -> None:
    """Two layers of one size, and a smaller one: each backward pass needs a weight that the others have overwritten."""
    layers = [made(96, 64, 0), made(64, 96, 1, double=True), made(64, 64, 2)]
    x = torch.randn(7, 64)

    def gradient(dtype: torch.dtype, *, packed: bool) -> dict[str, torch.Tensor]:
        y = given = x.to(dtype, copy=True).requires_grad_()
        for layer in layers:
            dense = layer.packed_weight.decoded(torch.float32).to(dtype)
            y = (layer(y) if packed else nn.functional.linear(y, dense, layer.bias.to(dtype))).tanh()
        y.sum().backward()
        assert given.grad is not None
        return {"grad x": given.grad}

    mine, truth, rounded = (
        gradient(dtype, packed=packed)
        for dtype, packed in ((torch.float32, True), (torch.float64, False), (torch.float32, False))
    )
    assert noise_floor(mine, truth, rounded, "float32").passed


def test_threads_do_not_decode_into_each_other_s_buffer() -> None:
    layers = [made(256, 256, seed) for seed in range(4)]
    x = torch.randn(3, 256)
    want, wrong = [layer(x) for layer in layers], []

    def many(index: int) -> None:
        for _ in range(50):
            if not torch.equal(layers[index](x), want[index]):
                wrong.append(index)

    running = [threading.Thread(target=many, args=(index,)) for index in range(4)]
    for one in running:
        one.start()
    for one in running:
        one.join()
    assert not wrong


def test_the_buffer_is_reused_grows_and_survives_inference_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_weight, "OWN_MAPPING", 1)
    packed_weight._own.buffers.by_dtype.clear()
    with torch.inference_mode():
        made(8, 64, 0)(torch.randn(5, 64))
    first = packed_weight._own.buffers.by_dtype[torch.float32].data_ptr()
    x = torch.randn(5, 64, requires_grad=True)
    made(8, 64, 1)(x).sum().backward()
    assert x.grad is not None
    assert packed_weight._own.buffers.by_dtype[torch.float32].data_ptr() == first
    made(80, 64, 1)(x)
    assert packed_weight._own.buffers.by_dtype[torch.float32].numel() == 80 * 64


def test_small_weights_leave_no_memory_behind() -> None:
    packed_weight._own.buffers.by_dtype.clear()
    made(80, 64, 1)(torch.randn(5, 64))
    assert packed_weight._own.buffers.by_dtype == {}


@pytest.mark.parametrize("double", [False, True])
def test_a_packed_layer_stores_and_saves_half_a_byte_per_weight(double: bool) -> None:
    layer = made(512, 1024, 0, double)
    held = sum(t.numel() * t.element_size() for t in layer.state_dict().values()) - 512 * 4
    assert held / (512 * 1024) == pytest.approx(double_quant.bits_per_parameter(512 * 1024, double=double) / 8)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other = made(512, 1024, 1, double)
    other.load_state_dict(torch.load(file))
    x = torch.randn(3, 1024)
    assert torch.equal(other(x), layer(x))


def test_casting_a_model_leaves_the_weight_as_it_was() -> None:
    layer = made(48, 64, 0, double=True)
    W = layer.packed_weight.decoded(torch.float32)
    layer.to(torch.bfloat16)
    assert torch.equal(layer.packed_weight.decoded(torch.float32), W)
    assert layer(torch.randn(2, 64)).dtype == torch.float32


def test_no_tensor_of_the_weights_size_is_saved_for_the_backward_pass() -> None:
    layer, kept = made(512, 512, 0), []
    A, B = torch.randn(4, 512, requires_grad=True), torch.randn(512, 4, requires_grad=True)
    x = torch.randn(3, 512, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        layer(x)
        packed_lora_linear(x, layer.packed_weight, layer.bias, A, B, 2.0, None)
    assert max(kept, default=0) <= 512 * 4


@pytest.mark.slow
def test_second_derivatives_are_correct() -> None:
    generator = torch.Generator().manual_seed(0)
    packed, absmax = nf4.quantize(torch.randn(6, 10, generator=generator), 32)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    x, A, B, bias, mask = drawn(2, 3, 10), drawn(2, 10), drawn(6, 2), drawn(6), drawn(2, 3, 10).detach()

    def plain(x: Tensor, bias: Tensor) -> Tensor:
        return nf4_linear(x, packed, absmax, 32, (6, 10), bias)

    assert torch.autograd.gradcheck(plain, (x, bias))
    assert torch.autograd.gradgradcheck(plain, (x, bias))
    for of in (mask, None):

        def adapted(x: Tensor, A: Tensor, B: Tensor, bias: Tensor, of: Tensor | None = of) -> Tensor:
            return nf4_lora_linear(x, packed, absmax, 32, (6, 10), bias, A, B, 1.5, of)

        assert torch.autograd.gradcheck(adapted, (x, A, B, bias))
        assert torch.autograd.gradgradcheck(adapted, (x, A, B, bias))


@pytest.mark.parametrize("double", [False, True])
def test_a_compiled_call_is_one_graph_and_computes_the_same(double: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    layer = made(40, 96, 0, double=double)
    x, A, B = (torch.randn(*shape, generator=generator) for shape in ((5, 96), (4, 96), (40, 4)))

    def call(x: Tensor) -> Tensor:
        bias, *factors = (t.to(x.dtype) for t in (layer.bias, A, B))
        return packed_lora_linear(x, layer.packed_weight, bias, *factors, 2.0, None)

    torch.compiler.reset()
    plain, compiled = x.clone().requires_grad_(), x.clone().requires_grad_()
    y = call(plain)
    # A second graph would raise an exception.
    z = torch.compile(call, backend="aot_eager", fullgraph=True)(compiled)
    for one in (y, z):
        one.sum().backward()
    assert plain.grad is not None
    assert compiled.grad is not None
    exactly = call(x.double())
    assert noise_floor({"y": z}, {"y": exactly}, {"y": y}, "float32").passed
    assert noise_floor({"dx": compiled.grad}, {"dx": plain.grad.double()}, {"dx": plain.grad}, "float32").passed


def test_under_autocast_products_are_in_its_dtype() -> None:
    layer = made(48, 64, 0)
    x, A, B = torch.randn(3, 64), torch.randn(4, 64), torch.randn(48, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert nf4_linear(x, layer.weight, layer.packed_weight.absmax, 64, (48, 64), layer.bias).dtype == torch.bfloat16
        assert packed_lora_linear(x, layer.packed_weight, layer.bias, A, B, 2.0, None).dtype == torch.bfloat16


def test_only_plain_linear_layers_are_packed() -> None:
    from harness.errors import Unsupported

    model = nn.Sequential(nn.Linear(8, 8), nn.Embedding(3, 8))
    with pytest.raises(Unsupported, match="1 is a Embedding"):
        bases.nf4(model, ["0", "1"], torch.float32)
    assert type(model[0]) is nn.Linear
