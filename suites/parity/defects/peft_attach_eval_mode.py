"""peft: the new layers of a model in eval mode are in training mode, so that their dropout is on.

`model.eval()` before `get_peft_model` is not enough: until it is called again, outputs are random. This holds for LoRA,
DoRA, QLoRA, AdaLoRA and VeRA with dropout, and for LoHa and LoKr with rank dropout. Seen in 0.19.1 and 0.21.2.
"""

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 8)).eval()
config = LoraConfig(r=4, target_modules=["0"], lora_dropout=0.5, init_lora_weights=False)
adapted = get_peft_model(model, config)
x = torch.randn(1, 64)
print("the model is in training mode:", adapted.training, "- its new layer is:", adapted.base_model.model[0].training)
with torch.no_grad():
    print("largest difference of two outputs, should be 0:", (adapted(x) - adapted(x)).abs().max().item())
