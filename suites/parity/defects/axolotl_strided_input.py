"""axolotl: the kernels raise for an input whose batch and tokens cannot be viewed as one dimension.

`matmul_lora` and the backward pass of LoRA_MLP call `view(-1, features)`. A model that transposes batch and tokens, or
that cuts off tokens, makes such inputs and gradients; every layer of torch and of peft takes them. Seen in 0.19.0.
"""

import torch
from axolotl.kernels.lora import LoRA_QKV

torch.manual_seed(0)
layer = (torch.randn(8, 16), None, None, torch.randn(2, 16), torch.randn(8, 2), 1.0, None, None)
for name, x in (
    ("contiguous", torch.randn(2, 5, 16)),
    ("batch and tokens transposed", torch.randn(5, 2, 16).transpose(0, 1)),
    ("without the last token", torch.randn(2, 6, 16)[:, :-1]),
):
    try:
        q, _, _ = LoRA_QKV.apply(x, None, *layer, *layer, *layer, True)
        print(f"{name}: an output of shape {tuple(q.shape)}")
    except RuntimeError as error:
        print(f"{name}: raises {str(error).partition('.')[0]}")
