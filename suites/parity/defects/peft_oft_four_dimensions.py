"""peft: OFT of an nn.Linear raises if the input has 4 dimensions, e.g. (batch, height, width, features) in a vision model.

`OFTRotationModule` takes every such input for the input of a convolution, and unfolds it. nn.Linear takes any number of
dimensions, and so does OFT with 2, 3 or 5. Seen in 0.21.2.
"""

import torch
from peft import OFTConfig, get_peft_model
from torch import nn

model = get_peft_model(nn.Sequential(nn.Linear(8, 3)), OFTConfig(oft_block_size=4, target_modules=["0"]))
for shape in [(2, 8), (2, 5, 8), (2, 5, 6, 8), (2, 5, 6, 7, 8)]:
    try:
        print(shape, "->", tuple(model(torch.randn(shape)).shape))
    except RuntimeError as error:
        print(shape, "->", error)
