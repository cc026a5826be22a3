"""peft: LoRA on a dilated Conv2d builds lora_A without the dilation.

If the padding is a number that keeps the size of the image, base and adapter give outputs of different sizes, and
forward raises. With padding="same" forward runs, but its output differs from that of the merged layer. The defect is as
old as LoRA's convolutions. Seen in 0.21.2.
"""

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

for padding in (2, "same"):
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    model = get_peft_model(nn.Sequential(nn.Conv2d(4, 8, 3, padding=padding, dilation=2)), config)
    x = torch.randn(1, 4, 9, 9)
    try:
        y = model(x)
    except RuntimeError as error:
        print(f"padding={padding}: {error}")
        continue
    model.merge_adapter()
    print(
        f"padding={padding}: merged and unmerged outputs differ by {float((model(x) - y).norm() / y.norm()):.3g} (relative)"
    )
