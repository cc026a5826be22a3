"""peft: `add_weighted_adapter` copies use_rslora, use_dora and lora_bias, but computes as if the new adapter had none.

The updates of the adapters, with their scalings, go into the new A and B, and the new adapter gets alpha = r, so its
scaling is 1. With use_rslora the scaling is then sqrt(r). The new bias of lora_bias and the new magnitude of use_dora keep
their initial values. Even the combination of one adapter with the weight 1 differs from the adapter. On a base in 16 bits,
the new A and B are float32 and the bias is not, so the forward pass raises. peft#3761. Seen in 0.21.2.
"""

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

x = torch.randn(3, 12)
for setting in ("none", "use_rslora", "lora_bias", "use_dora"):
    torch.manual_seed(0)
    settings = {} if setting == "none" else {setting: True}
    model = get_peft_model(nn.Sequential(nn.Linear(12, 12)), LoraConfig(r=4, target_modules=["0"], **settings))
    for parameter in model.parameters():
        if parameter.requires_grad:  # as if it had been trained
            parameter.data += 0.3 * torch.randn_like(parameter)
    expected = model(x)
    model.add_weighted_adapter(["default"], [1.0], "same")
    model.set_adapter("same")
    error = float((model(x) - expected).norm() / expected.norm())
    print(f"{setting}: the combination of one adapter with the weight 1 is off by {error:.2g} (should be 0)")

model = get_peft_model(
    nn.Sequential(nn.Linear(12, 12)).bfloat16(), LoraConfig(r=4, target_modules=["0"], lora_bias=True)
)
model.add_weighted_adapter(["default"], [1.0], "same")
model.set_adapter("same")
try:
    model(x.bfloat16())
    print("lora_bias on a bfloat16 base: works")
except RuntimeError as error:
    print(f"lora_bias on a bfloat16 base: raised {error}")
