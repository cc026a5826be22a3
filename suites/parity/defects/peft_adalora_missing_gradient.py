"""peft: AdaLoRA's update_and_allocate raises TypeError after a step in which an adapted layer got no gradient.

It multiplies each weight by its gradient, which is None for a layer that took no part in the step, such as an expert that
no token reached. The paper's sensitivity |w dL/dw| is zero there. Seen in 0.21.2.
"""

import torch
from peft import AdaLoraConfig, get_peft_model
from torch import nn

config = AdaLoraConfig(init_r=4, target_r=2, target_modules=["0", "1"], total_step=20, tfinal=5)
tuner = get_peft_model(nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 12)), config).base_model
tuner.model[0](torch.randn(3, 12)).sum().backward()
try:
    tuner.update_and_allocate(1)
except TypeError as error:
    print(f"TypeError: {error}; should update the averages")
else:
    print("the averages are updated")
