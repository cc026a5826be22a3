"""peft: DoRA of a convolution raises if A is not contiguous, for example after `parameter.data = values.transpose(0, 1)`.

LoRA computes with such values. DoRA also reads A as a matrix, with `view`, which refuses them. Seen in 0.19.1 and 0.21.2.
"""

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

for use_dora in (False, True):
    config = LoraConfig(r=3, target_modules=["0"], use_dora=use_dora)
    model = get_peft_model(nn.Sequential(nn.Conv2d(4, 6, 3)), config)
    A = model.base_model.model[0].lora_A["default"].weight
    A.data = A.data.transpose(0, 1).contiguous().transpose(0, 1)  # equal values, another layout in memory
    try:
        found = tuple(model(torch.randn(2, 4, 9, 9)).shape)
    except RuntimeError as error:
        found = error
    print(f"use_dora={use_dora}: {found}")
