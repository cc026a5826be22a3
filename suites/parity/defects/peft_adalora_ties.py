"""peft: AdaLoRA prunes every triplet whose score equals the threshold, so of several equal scores none stays.

The threshold is the k-th smallest score, and peft prunes where score <= threshold. Scores are zero, and so equal, in a
layer without a gradient, such as an expert that no token reached. They are also zero if beta1 is nearly 0, as here, because
the uncertainty is then 0. Fewer triplets stay than the budget allows, possibly none. Once the mask is final, an update of
rank 0 stays 0. The authors' code does the same. Seen in 0.21.2.
"""

import torch
from peft import AdaLoraConfig, get_peft_model
from torch import nn

for beta1 in (0.85, 1e-300):
    torch.manual_seed(0)
    config = AdaLoraConfig(init_r=8, target_r=4, target_modules=["0"], total_step=20, tfinal=5, beta1=beta1)
    tuner = get_peft_model(nn.Sequential(nn.Linear(32, 16)), config).base_model
    left = []
    for step in range(1, 20):
        torch.nn.init.ones_(tuner.model[0].lora_E["default"])
        tuner(torch.randn(4, 32)).square().mean().backward()
        tuner.update_and_allocate(step)
        tuner.zero_grad()
        left.append(int(tuner.model[0].lora_E["default"].count_nonzero()))
    print(f"beta1={beta1}: triplets left after each step {left}; should fall from 8 to 4")
