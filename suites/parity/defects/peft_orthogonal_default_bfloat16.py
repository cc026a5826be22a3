"""peft: the orthogonal start raises on a CPU while torch's default dtype is bfloat16, even if the model is in float32.

It makes A in torch's default dtype and computes its QR decomposition there. Other starts work. Seen in 0.21.2.
"""

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

torch.set_default_dtype(torch.bfloat16)
for start in (True, "orthogonal"):
    model = nn.Sequential(nn.Linear(12, 10, dtype=torch.float32))
    try:
        get_peft_model(model, LoraConfig(r=4, target_modules=["0"], init_lora_weights=start))
        print(f"init_lora_weights={start}: works")
    except NotImplementedError as error:
        print(f"init_lora_weights={start}: {type(error).__name__}: {error}")
