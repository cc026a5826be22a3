"""peft: OFT rotates backwards with use_cayley_neumann=False: (I - Q) (I + Q)^-1 instead of (I + Q) (I - Q)^-1.

The papers (arXiv:2306.07280 and 2506.19847) have the second form, and use_cayley_neumann=True approximates it. So the flag
does not choose between a result and its approximation: if a trained adapter is loaded with the other value, every rotation
is undone and applied the other way round. Seen in 0.21.2.
"""

import torch
from peft import OFTConfig, get_peft_model
from torch import nn

Q = torch.tensor([[0.0, 0.1], [-0.1, 0.0]], dtype=torch.float64)
one = torch.eye(2, dtype=torch.float64)
print("(I + Q) (I - Q)^-1:", ((one + Q) @ torch.linalg.inv(one - Q)).tolist())
for neumann in (True, False):
    config = OFTConfig(oft_block_size=2, use_cayley_neumann=neumann, num_cayley_neumann_terms=20, target_modules=["0"])
    model = get_peft_model(nn.Sequential(nn.Linear(2, 2, bias=False, dtype=torch.float64)), config)
    layer = model.base_model.model[0]
    layer.oft_R["default"].weight.data.fill_(0.1)  # the number above the diagonal of Q
    print(f"use_cayley_neumann={neumann}:", layer.get_delta_weight("default").tolist())
