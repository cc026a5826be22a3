"""peft: AdaLoRA's averages of sensitivity and uncertainty are in no state_dict.

The allocator holds them in dicts of its own. A run that is resumed from a state_dict starts with averages of zero, so that
its next pruning keeps other triplets than the uninterrupted run. Seen in 0.21.2.
"""

import torch
from peft import AdaLoraConfig, get_peft_model
from torch import nn


def _tuner() -> nn.Module:
    config = AdaLoraConfig(init_r=4, target_r=2, target_modules=["0"], total_step=20, tfinal=5)
    return get_peft_model(nn.Sequential(nn.Linear(12, 12)), config).base_model


torch.manual_seed(0)
trained, resumed = _tuner(), _tuner()
trained.model(torch.randn(3, 12)).sum().backward()
trained.update_and_allocate(1)
resumed.load_state_dict(trained.state_dict())
for name, one in (("trained", trained), ("resumed", resumed)):
    print(f"averages of the {name} model: {len(one.rankallocator.exp_avg_ipt)} tensors")
print("both should have 3: one for each of A, B and E")
