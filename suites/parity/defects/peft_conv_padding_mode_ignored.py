"""peft: LoRA on a Conv2d whose padding_mode is not zeros pads the adapter's input with zeros all the same.

So the merged layer is another function than the one that was trained. Since LoRA has convolutions; here on 0.21.2.
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
