"""peft: after PiSSA, `unload` and `disable_adapter` give a base model without its principal part, instead of the original.

peft writes the residual into the base weight, and keeps no copy. Seen in 0.21.2.
"""

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

for start in (True, "pissa"):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 64)), torch.randn(8, 64)
    y = model(x).detach()
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=16, init_lora_weights=start, target_modules=["0"]))
    with model.disable_adapter():
        disabled = model(x)
    unloaded = model.unload()(x)
    errors = [float((other - y).norm() / y.norm()) for other in (disabled, unloaded)]
    print(f"init_lora_weights={start}: relative change of the base, disabled {errors[0]:.3g}, unloaded {errors[1]:.3g}")
