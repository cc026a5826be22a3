"""peft: LoRA-FA computes the corrected gradient of B in bfloat16, even if the adapter is in float32 or float16.

The product g (A A^T)^-1 runs under an autocast to bfloat16 if the device has bfloat16, as every CPU has. The gradient keeps
8 of 24 bits, and both moments are computed from it. Seen in 0.21.2.
"""

import torch
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_lorafa_optimizer
from torch import nn

torch.manual_seed(0)
for dtype, ratio in ((torch.float64, 1), (torch.float32, 1), (torch.float16, 1), (torch.bfloat16, 100)):
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["0"])
    model = get_peft_model(nn.Sequential(nn.Linear(96, 48, dtype=dtype)), config, autocast_adapter_dtype=False)
    layer = model.base_model.model[0]
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    if ratio > 1:
        U, _, Vt = torch.linalg.svd(A.data.double(), full_matrices=False)
        A.data.copy_((U * torch.logspace(0, -1, 4, ratio)) @ Vt)
    optimizer = create_lorafa_optimizer(model, r=4, lora_alpha=8, lr=1e-3)
    B.grad = torch.randn_like(B)
    optimizer.step()
    state = optimizer.state["base_model.model.0.lora"]
    wide = A.detach().double()
    right = 0.1 * B.grad.double() @ torch.linalg.inv(wide @ wide.T + 1e-8 * torch.eye(4)) / 2**2
    error = (state["exp_avg_B"].double() - right).norm() / right.norm()
    graded = f", singular values of A from 1 to 1/{ratio}" if ratio > 1 else ""
    print(f"{dtype}{graded}: the first moment is off by {error:.1e}; eps is {torch.finfo(dtype).eps:.1e}")
