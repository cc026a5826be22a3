"""peft: `add_weighted_adapter` of one adapter gives the new adapter the base's modules, not the trained ones.

Two adapters that replace the same module are refused with a ValueError. One adapter is not, and its trained module is
lost: the new adapter has a fresh copy of the base's module. The head of a classifier is such a module. Seen in 0.21.2.
"""

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 3))
model = get_peft_model(model, LoraConfig(r=4, target_modules=["0"], modules_to_save=["1"]))
for parameter in model.parameters():
    if parameter.requires_grad:  # as if it had been trained
        parameter.data += 0.3 * torch.randn_like(parameter)
head = model.base_model.model[1]
model.add_weighted_adapter(["default"], [1.0], "same")
print(
    "head is that of the adapter:",
    torch.equal(head.modules_to_save["same"].weight, head.modules_to_save["default"].weight),
)
print("head is that of the base:   ", torch.equal(head.modules_to_save["same"].weight, head.original_module.weight))
