"""peft: DoRA of a convolution raises for an image without a batch dimension, or adds a dimension to its output.

nn.Conv2d and peft's LoRA map (C, H, W) to (E, H', W'). DoRA subtracts the bias as (1, E, 1), which raises unless H' is E.
It multiplies by m / norm of shape (1, E, 1, 1), so without a bias the output is (1, E, H', W'). Seen in 0.19.1 and
0.21.2.
"""

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

for use_dora in (False, True):
    for bias in (False, True):
        config = LoraConfig(r=3, target_modules=["0"], use_dora=use_dora)
        model = get_peft_model(nn.Sequential(nn.Conv2d(4, 6, 3, bias=bias)), config)
        try:
            found = tuple(model(torch.randn(4, 9, 9)).shape)
        except RuntimeError as error:
            found = error
        print(f"use_dora={use_dora} bias={bias}: input (4, 9, 9), output {found}")
