"""peft: LoRA-FA adds 1e-8 I to A A^T in torch's default dtype, not in that of A.

If the default is float64, an adapter in another dtype raises. If the default is bfloat16, an adapter in bfloat16 raises. An
adapter in float64 gets 1e-8 rounded to the default dtype. Seen in 0.21.2.
"""

import torch
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_lorafa_optimizer
from torch import nn

for default in (torch.float64, torch.float32, torch.bfloat16):
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        base = nn.Sequential(nn.Linear(16, 8, dtype=dtype))
        config = LoraConfig(r=4, lora_alpha=8, target_modules=["0"])
        model = get_peft_model(base, config, autocast_adapter_dtype=False)
        layer = model.base_model.model[0]
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        optimizer = create_lorafa_optimizer(model, r=4, lora_alpha=8, lr=1e-3)
        B.grad = torch.ones_like(B)
        torch.set_default_dtype(default)
        try:
            optimizer.step()
        except RuntimeError as error:
            print(f"default {default}, adapter {dtype}: RuntimeError: {error}")
        else:
            have = optimizer.state["base_model.model.0.lora"]["exp_avg_B"].double()
            A, g = A.detach().double(), B.grad.double()
            right = 0.1 * g @ torch.linalg.inv(A @ A.T + 1e-8 * torch.eye(4, dtype=torch.float64)) / 2**2
            off = (have - right).norm() / right.norm()
            print(f"default {default}, adapter {dtype}: the first moment is off by {off:.1e}")
        torch.set_default_dtype(torch.float32)
