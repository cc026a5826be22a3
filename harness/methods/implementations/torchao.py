"""`torchao`: an NF4 tensor, as an Operation and as a quantisation of base weights, and 8-bit AdamW."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from harness.errors import Unsupported
from harness.methods.registry import Implementation, implementations_in, implements

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
_OPERATION: dict[str, Any] = {"name": "torchao", "kind": "operation", "requires": ["torchao"]}
BLOCK, SCALER_BLOCK = 64, 256


def nf4_module() -> Any:
    """Return the module of torchao that defines the NF4 tensor. Release 0.18 of torchao moved this module."""
    try:
        from torchao.quantization.quantize_.workflows.nf4 import nf4_tensor
    except ModuleNotFoundError:
        from torchao.dtypes import nf4tensor as nf4_tensor
    return nf4_tensor


@implements("nf4_quantize", **_OPERATION)
def nf4_quantize(W: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Pack W by torchao's `to_nf4`. Return the packed bytes, and the absmax of each block.

    `to_nf4` divides the weight by this absmax, and quantises the absmax only afterwards. Raises Unsupported for more
    than two dimensions and for sizes that torchao's blocks do not divide.
    """
    nf4_tensor = nf4_module()
    if W.dim() > 2 or W.numel() % (block * SCALER_BLOCK):
        raise Unsupported(f"torchao supports matrices of whole blocks of {block} x {SCALER_BLOCK} elements only")
    packed = nf4_tensor.to_nf4(W, block, SCALER_BLOCK)
    return packed.quantized_data.flatten(), nf4_tensor.get_block_absmax(W.detach().flatten(), block).float()


@implements("nf4-dq", **_OPERATION | {"kind": "base"})
def nf4_dq(model: nn.Module, paths: list[str], dtype: torch.dtype) -> dict[str, tuple[Tensor, Tensor, int, bool]]:
    """Replace the linear layers at `paths` by layers with an NF4Tensor, in place.

    Return, for each path, the packed bytes, the decoded absmax of each block, the block size, and True, which marks
    double quantisation. Raises Unsupported for sizes that torchao's blocks do not divide.
    """
    import torch

    from reference.shared.layers import replace

    nf4_tensor = nf4_module()

    class TorchaoNf4Linear(torch.nn.Linear):
        """A layer with an NF4Tensor. `weight` holds only the packed bytes, because an NF4Tensor cannot be compared."""

        def __init__(self, dense: torch.nn.Linear) -> None:
            super().__init__(dense.in_features, dense.out_features, bias=False, device="meta")
            # The tensor is in a list, since a module would register a tensor as its own.
            self.packed = [nf4_tensor.to_nf4(dense.weight.detach(), BLOCK, SCALER_BLOCK)]
            self.weight = torch.nn.Parameter(self.packed[0].quantized_data, requires_grad=False)
            for name in ("quantized_scalers", "quantization_factor", "scaler_mean"):  # so that a state_dict has them
                self.register_buffer(name, getattr(self.packed[0], name))
            self.compute_dtype = dtype
            if dense.bias is not None:
                self.bias = torch.nn.Parameter(dense.bias.detach().clone(), requires_grad=False)

        def forward(self, x: Tensor) -> Any:
            return torch.nn.functional.linear(x, self.packed[0], self.bias)

    forms = {}
    for path in paths:
        dense: Any = model.get_submodule(path)
        if dense.weight.numel() % (BLOCK * SCALER_BLOCK):
            raise Unsupported(f"torchao supports matrices of whole blocks of {BLOCK} x {SCALER_BLOCK} elements only")
        layer = TorchaoNf4Linear(dense)
        replace(model, path, layer.train(dense.training))
        packed = layer.packed[0]
        absmax = packed.dequantize_scalers(packed.quantized_scalers, packed.quantization_factor, SCALER_BLOCK)
        forms[path] = (packed.quantized_data, absmax.float(), BLOCK, True)
    return forms


@implements("adamw8bit_step", **_OPERATION)
def adamw8bit_step(p: Tensor, g: Tensor, step: int, **options: Any) -> tuple[Tensor, ...]:
    """Take one step of AdamW8bit from a given state. Return the new p, m, m_absmax, v and v_absmax.

    p is the parameter. m and v are the 8-bit codes of its two moments, and each block of codes has one absmax. options:
    the state (m, m_absmax, v, v_absmax), and the optimizer's options. Raises Unsupported for sizes at which torchao
    keeps its states in 32 bits.
    """
    import torch
    from torchao.optim import AdamW8bit

    moments = {name: options.pop(name) for name in ("m", "m_absmax", "v", "v_absmax")}
    if p.numel() < 4096 or p.numel() % 256:
        raise Unsupported("torchao keeps 32-bit states if a tensor has fewer than 4096 elements or no multiple of 256")
    p = torch.nn.Parameter(p.clone())
    p.grad = g.clone()
    optimizer = AdamW8bit([p], **options)
    state = {"step": torch.tensor(step - 1.0)}
    for torchao_name, name, signed in (("exp_avg", "m", True), ("exp_avg_sq", "v", False)):
        moment = optimizer._new_buffer(p, signed)
        moment.codes.copy_(moments[name].view(p.shape))
        moment.scale.copy_(moments[f"{name}_absmax"])
        state[torchao_name] = moment
    optimizer.state[p].update(state)
    with torch.compiler.set_stance("force_eager"):  # otherwise it compiles for every shape
        optimizer.step()
    m, v = optimizer.state[p]["exp_avg"], optimizer.state[p]["exp_avg_sq"]
    return p.detach(), m.codes.flatten(), m.scale, v.codes.flatten(), v.scale


def implementations() -> list[Implementation]:
    """Return the Implementations of this file."""
    return implementations_in(__name__)
