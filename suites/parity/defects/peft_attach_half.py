"""peft: if `get_peft_model` refuses a later target, the earlier targets stay wrapped.

The model then has adapters that nobody uses, and its tensors have other names. A comment in peft's `inject_adapter` says
that checks should come first, so that no "half-initialized" model remains. But peft checks some settings, such as
`lora_bias`, only when it reaches the target. Seen in 0.21.2.
"""

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(4, 8), nn.Embedding(3, 3))
names = list(model.state_dict())
try:
    get_peft_model(model, LoraConfig(r=2, target_modules=["0", "1"], lora_bias=True))
except ValueError as error:
    print("raised:", error)
print("the model's tensors before:", names)
print("and after the error, where they should be the same:", list(model.state_dict()))
