"""peft: LoKr raises if its first block is not contiguous, because torch.kron does not take every layout.

`make_kron` makes only the second block contiguous. Seen in 0.21.2 with torch 2.13.
"""

import torch
from peft import LoKrConfig, get_peft_model
from torch import nn

model = get_peft_model(nn.Sequential(nn.Linear(16, 16)), LoKrConfig(r=2, target_modules=["0"]))
block = model.base_model.model[0].lokr_w1["default"]
block.data = block.data.T.contiguous().T  # the same values in another layout
try:
    model(torch.randn(3, 16))
except RuntimeError as error:
    print(error)
