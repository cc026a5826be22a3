"""peft: AdaLoRA divides its update by the parameter `ranknum`, which trains unless the base is in float32 on a CPU.

`ranknum` is made with requires_grad=False in float32 on the CPU. Moving it to the dtype and the device of the base makes a
new parameter, which trains. An optimizer over all parameters that require a gradient then changes the scaling alpha /
ranknum, which is not saved with the adapter. Present since 0.21.0.
"""

import torch
from peft import AdaLoraConfig, get_peft_model
from torch import nn


def adapted(dtype, device):
    """Return a linear layer of this dtype, on this device, with AdaLoRA."""
    torch.manual_seed(0)
    config = AdaLoraConfig(init_r=4, target_r=2, target_modules=["0"], total_step=100)
    return get_peft_model(nn.Sequential(nn.Linear(12, 10, dtype=dtype, device=device)), config)


for dtype in (torch.float32, torch.float64, torch.bfloat16):
    model = adapted(dtype, "cpu")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    x = torch.randn(8, 12, dtype=dtype)
    for _ in range(50):
        optimizer.zero_grad()
        (model(x) - 1).square().mean().backward()
        optimizer.step()
    ranknum = model.base_model.model[0].ranknum["default"]
    print(f"{dtype}: ranknum trains: {ranknum.requires_grad}; after 50 steps it is {ranknum.item():.4g}, should be 4")

# torch's device `meta` stands for a GPU if there is none.
device = "cuda" if torch.cuda.is_available() else "meta"
ranknum = adapted(torch.float32, device).base_model.model[0].ranknum["default"]
print(f"{torch.float32} on {device}: ranknum trains: {ranknum.requires_grad}, should be False")
