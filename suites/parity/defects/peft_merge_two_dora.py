"""peft: two DoRA adapters on one layer are applied in turn, so the result depends on their order.

The second adapter multiplies the weight, which the first has already changed, by its own m / ||W + s B A||. A sum of the two
changes would not depend on the order. Since 0.21, merged and unmerged outputs agree for one order (peft#3608). In training
mode with dropout, the unmerged layer does add the changes, so its output differs. Seen in 0.21.2.
"""

import copy

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

torch.manual_seed(0)
config = LoraConfig(r=2, target_modules=["0"], use_dora=True, lora_dropout=1e-9)
model = get_peft_model(nn.Sequential(nn.Linear(12, 12)), config, adapter_name="a")
model.add_adapter("b", config)
for name, parameter in model.named_parameters():
    if "lora_" in name:  # as if it had been trained
        parameter.data += 0.3 * torch.randn_like(parameter)
weights = []
for order in (["a", "b"], ["b", "a"]):
    merged = copy.deepcopy(model)
    merged.merge_adapter(order)
    weights.append(merged.base_model.model[0].base_layer.weight)
error = float((weights[0] - weights[1]).norm() / weights[0].norm())
print(f"the two orders differ by {error:.2g} of the weight (should be 0)")

outputs = []
for training in (False, True):
    model.train(training).base_model.set_adapter(["a", "b"])
    outputs.append(model(torch.ones(1, 12)))
error = float((outputs[0] - outputs[1]).norm() / outputs[1].norm())
print(f"evaluation and training mode, where nothing is dropped, differ by {error:.2g} (should be 0)")
