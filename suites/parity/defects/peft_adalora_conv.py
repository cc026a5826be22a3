"""peft: AdaLoRA of a Conv2d ignores the padding_mode and the groups of the layer.

The update is convolved with zeros around the image, so the outputs before and after merging differ. With groups, A has a
column for each input channel of all groups, so B A does not have the size of the kernel, and the forward pass raises. The
defect is as old as AdaLoRA's convolutions, which came in 0.20.0. Seen in 0.20.0 and 0.21.2.
"""

import torch
from peft import AdaLoraConfig, get_peft_model
from torch import nn

for options in ({}, {"padding_mode": "reflect"}, {"groups": 2}):
    torch.manual_seed(0)
    config = AdaLoraConfig(init_r=2, target_modules=["0"], total_step=20)
    model = get_peft_model(nn.Sequential(nn.Conv2d(4, 8, 3, padding=1, **options)), config)
    nn.init.ones_(model.base_model.model[0].lora_E["default"])
    x = torch.randn(1, 4, 9, 9)
    try:
        y = model.base_model(x).detach()
        model.merge_adapter()
        gap = float((model.base_model(x) - y).norm() / y.norm())
        print(f"{options}: merged and unmerged outputs differ by {gap:.3g} (relative)")
    except RuntimeError as error:
        print(f"{options}: RuntimeError: {error}")
