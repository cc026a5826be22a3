"""peft: LoRA on a Conv2d whose padding_mode is not zeros still pads the adapter's input with zeros.

So the output of the merged layer differs from that of the trained layer. The defect is as old as LoRA's convolutions. Seen
in 0.21.2.
"""

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

for mode in ("zeros", "reflect", "replicate", "circular"):
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    model = get_peft_model(nn.Sequential(nn.Conv2d(4, 8, 3, padding=1, padding_mode=mode)), config)
    x = torch.randn(1, 4, 9, 9)
    y = model(x)
    model.merge_adapter()
    print(f"{mode}: merged and unmerged outputs differ by {float((model(x) - y).norm() / y.norm()):.3g} (relative)")
