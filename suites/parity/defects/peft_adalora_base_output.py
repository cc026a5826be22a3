"""peft: AdaLoRA adds its update to the base layer's output in place.

A forward hook of the base layer that keeps the output (to record activations, for example) then holds the sum. A base
layer that needs its output in backward raises. LoRA of the same release adds out of place. Seen in 0.21.2.
"""

import torch
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from torch import nn


class Squashed(nn.Linear):
    """A linear layer followed by a tanh, whose backward pass needs the output."""

    def forward(self, x):
        """Compute the output."""
        return super().forward(x).tanh()


kept = []


def keep(module, inputs, output):
    """Keep the output and a copy of it."""
    kept.extend([output, output.clone()])


for kind, config in (("LoRA", LoraConfig(r=2)), ("AdaLoRA", AdaLoraConfig(init_r=2, total_step=10))):
    for layer in (nn.Linear(4, 3), Squashed(4, 3)):
        torch.manual_seed(0)
        config.target_modules, config.init_lora_weights = ["0"], False
        model = get_peft_model(nn.Sequential(layer), config)
        kept.clear()
        layer.register_forward_hook(keep)
        y = model(torch.ones(2, 4, requires_grad=True))
        print(f"{kind} of {type(layer).__name__}: the kept output is unchanged: {torch.equal(*kept)} (should be True)")
        try:
            y.sum().backward()
        except RuntimeError as error:
            print("  backward raised:", str(error).split("[")[0])
