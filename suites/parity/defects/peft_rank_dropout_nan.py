"""peft: if rank dropout drops every row of LoHa's update, the output is NaN. LoKr's is NaN too with rank_dropout_scale.

The mask is divided by its mean, which is then 0 / 0. This happens more often in a narrow layer and with a large
probability: in half of the calls with one output and a probability of 0.5. Seen in 0.21.2.
"""

import torch
from peft import LoHaConfig, LoKrConfig, get_peft_model
from torch import nn

torch.manual_seed(0)
configs = {
    "LoHa": LoHaConfig(r=2, rank_dropout=0.5, target_modules=["0"]),
    "LoKr": LoKrConfig(r=2, rank_dropout=0.5, rank_dropout_scale=True, target_modules=["0"]),
}
for name, config in configs.items():
    for outputs in (1, 4):
        model = get_peft_model(nn.Sequential(nn.Linear(8, outputs)), config).train()
        calls = [model(torch.randn(3, 8)) for _ in range(1000)]
        print(f"{name}, {outputs} outputs: {sum(bool(y.isnan().any()) for y in calls)} of 1,000 calls give NaN")
