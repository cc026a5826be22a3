"""peft: `merge_adapter` adds the update to the weight in place and `unmerge_adapter` subtracts it, which leaves an error.

The sum is rounded, so the restored base weight differs: in 16 bits often in a fifth of its elements. The larger the update,
the more digits of W are lost, and every further round trip adds an error. peft keeps no copy of the weight. This holds for
LoRA, DoRA, PiSSA, VeRA, AdaLoRA, LoHa and LoKr. Seen in 0.21.2.
"""

import torch
from peft import AdaLoraConfig, LoHaConfig, LoKrConfig, LoraConfig, VeraConfig, get_peft_model
from torch import nn

lora = {"r": 4, "target_modules": ["0"]}
configs = {
    "LoRA": lambda: LoraConfig(**lora),
    "LoRA, alpha=512": lambda: LoraConfig(**lora, lora_alpha=512),
    "DoRA": lambda: LoraConfig(**lora, use_dora=True),
    "PiSSA": lambda: LoraConfig(**lora, init_lora_weights="pissa"),
    "VeRA": lambda: VeraConfig(r=4, target_modules=["0"]),
    "AdaLoRA": lambda: AdaLoraConfig(init_r=4, target_modules=["0"], total_step=9),
    "LoHa": lambda: LoHaConfig(r=4, target_modules=["0"]),
    "LoKr": lambda: LoKrConfig(r=4, target_modules=["0"]),
}
for dtype in (torch.float32, torch.float16):
    for name, config in configs.items():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 48))
        model = get_peft_model(model, config()).to(dtype)
        for parameter in model.parameters():
            if parameter.requires_grad:  # as if it had been trained
                parameter.data += 0.05 * torch.randn_like(parameter)
        base = model.base_model.model[0].base_layer
        W = base.weight.detach().clone()
        model.merge_adapter()
        model.unmerge_adapter()
        error = float((base.weight.double() - W.double()).norm() / W.double().norm())
        share = float((base.weight != W).double().mean())
        print(f"{dtype} {name}: after merging and unmerging {share:.0%} of W differ, by {error:.2g} of W")
