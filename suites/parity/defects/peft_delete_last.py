"""peft: after `delete_adapter` of the only adapter, the model and `disable_adapter` raise KeyError.

PeftModel keeps the name of the deleted adapter as the active one, and looks its config up. Seen in 0.21.2.
"""

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

model = get_peft_model(nn.Sequential(nn.Linear(12, 12)), LoraConfig(r=4, target_modules=["0"]))
model.delete_adapter("default")
print("active adapter:", model.active_adapter, "configs:", model.peft_config)
try:
    with model.disable_adapter():
        model(torch.randn(1, 12))
    print("the base can be called")
except KeyError as error:
    print(f"raised KeyError {error}")
