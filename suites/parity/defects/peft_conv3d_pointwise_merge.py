"""peft: LoRA on a Conv3d whose kernel has a depth and a height of 1 raises when it is merged.

get_delta_weight takes such a kernel for that of a 1 x 1 Conv2d and multiplies B by A as if they were matrices. Both still
have the width of the kernel as a third dimension. The forward pass is right. Seen in 0.19.1 and 0.21.2.
"""

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

for kernel in ((2, 1, 1), (1, 1, 2), 1):
    model = get_peft_model(nn.Sequential(nn.Conv3d(4, 8, kernel)), LoraConfig(r=2, target_modules=["0"]))
    model(torch.randn(1, 4, 5, 5, 5))
    try:
        model.merge_adapter()
        found = "merged"
    except RuntimeError as error:
        found = f"RuntimeError: {error}"
    print(f"kernel {kernel}: {found}")
