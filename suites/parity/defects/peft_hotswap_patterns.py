"""peft: `hotswap_adapter` ignores rank_pattern and alpha_pattern, so the layers that they match get a wrong scaling.

The patterns are matched with keys that end in `.lora_A.default.weight`, so none matches, and each layer gets lora_alpha
/ r. Even a swap of an adapter for itself changes it. peft#3738. Seen in 0.21.2.
"""

import tempfile

import torch
from peft import LoraConfig, get_peft_model
from peft.utils.hotswap import hotswap_adapter
from torch import nn

torch.manual_seed(0)
x = torch.randn(3, 12)
for patterns in ({}, {"rank_pattern": {"0": 2}}, {"alpha_pattern": {"0": 32}}):
    config = LoraConfig(r=4, target_modules=["0"], init_lora_weights=False, **patterns)
    model = get_peft_model(nn.Sequential(nn.Linear(12, 12)), config)
    before = model(x)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        hotswap_adapter(model, folder, "default", torch_device="cpu")
    error = float((model(x) - before).norm() / before.norm())
    print(f"{patterns or 'no pattern'}: swapped for itself, the output is off by {error:.2g} (should be 0)")
