"""axolotl: the backward pass of LoRA_MLP overwrites the outputs of gate and up, so a second backward pass raises.

torch's and peft's layers allow a second pass with retain_graph=True. Run with TRITON_INTERPRET=1 on a CPU. Seen in
0.19.0.
"""

from types import SimpleNamespace

import torch
from axolotl.kernels import swiglu
from axolotl.kernels.lora import LoRA_MLP

device = "cuda" if torch.cuda.is_available() else "cpu"
if device == "cpu":
    swiglu.torch = SimpleNamespace(
        **vars(torch) | {"empty": lambda *shape, **options: torch.empty(*shape, **{**options, "device": "cpu"})}
    )


def layer(out: int, features: int) -> tuple[object, ...]:
    """Return the arguments of one layer: weight, bias, quant_state, A, B, scale, lora_bias, magnitude."""
    W, A, B = (torch.randn(*shape, device=device) for shape in ((out, features), (2, features), (out, 2)))
    return W, None, None, A, B, 1.0, None, None


x = torch.randn(1, 5, 16, device=device, requires_grad=True)
layers = (*layer(24, 16), *layer(24, 16), *layer(16, 24))
y = LoRA_MLP.apply(x, None, *layers, swiglu.swiglu_forward, swiglu.swiglu_backward, True)
y.sum().backward(retain_graph=True)
try:
    y.sum().backward()
    print("a second backward pass went through")
except RuntimeError as error:
    print("a second backward pass raises:", str(error).partition(":")[0])
