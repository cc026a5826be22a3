"""peft: DoRA computes W x as the base layer's output minus the bias, which loses digits if the bias is much larger than W x.

The gradient of m is dy (W' x) / ||W'||. Here the bias is about 2e3 times W x for an input of size 1e-4, and two of
float32's seven digits are lost. For an input of size 1e-8 nearly all digits are lost. Without a bias none are lost.
With dropout, in training mode, peft multiplies W by x instead and is right. Seen in 0.21.2.
"""

import torch
from peft import LoraConfig, get_peft_model
from torch import nn


def gradient_of_m(dtype: torch.dtype, size: float, bias: bool) -> torch.Tensor:
    """Return the gradient of m for an input of about this size, divided by the size."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 16, bias=bias, dtype=torch.float64))
    config = LoraConfig(r=4, target_modules=["0"], use_dora=True, init_lora_weights=False)
    model = get_peft_model(model, config, autocast_adapter_dtype=False).to(dtype)
    x = (torch.randn(8, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * size).to(dtype)
    model(x).backward(torch.ones(8, 16, dtype=dtype))
    return model.base_model.model[0].lora_magnitude_vector["default"].weight.grad.double() / size


for dtype in (torch.float32, torch.bfloat16):
    for bias in (False, True):
        right = gradient_of_m(torch.float64, 1.0, bias)  # the gradient is proportional to x
        errors = []
        for size in (1.0, 1e-4, 1e-8):
            wrong = gradient_of_m(dtype, size, bias) - right
            errors.append(f"{float(wrong.norm() / right.norm()):.2g} for x of size {size}")
        print(f"{dtype}, {'a' if bias else 'no'} bias: relative error of the gradient of m {', '.join(errors)}")
