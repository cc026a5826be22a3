"""peft: LoRA on experts that bitsandbytes packs into 4 bits trains one of the two projections, and its second call fails.

bitsandbytes' replace_parameter_4bit packs a stacked parameter and decodes it by a parametrization. For each call,
peft's `target_parameters` adds a parametrization, and does not remove it if the parameter has another one. The inner of
the two wrappers gets no gradient. The second call raises or, under no_grad, applies the update twice. Seen in peft
0.21.2 with bitsandbytes 0.50.2.
"""

import warnings

import torch
from bitsandbytes.nn.parametrize import replace_parameter_4bit
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

warnings.simplefilter("ignore")
NAMES = ("gate_up_proj", "down_proj")
torch.manual_seed(0)
config = MixtralConfig(hidden_size=64, intermediate_size=48, num_local_experts=4)
config._experts_implementation = "eager"
experts = MixtralExperts(config)
for parameter in experts.parameters():
    parameter.data = torch.randn(parameter.shape) / 8
for name in NAMES:
    replace_parameter_4bit(experts, name, quant_type="nf4")
model = nn.Sequential(experts)
get_peft_model(model, LoraConfig(r=3, target_modules=[], target_parameters=[f"0.{name}" for name in NAMES]))
for name, parameter in model.named_parameters():
    if "lora" in name:
        parameter.data = torch.randn(parameter.shape) / 8

x, chosen, weights = torch.randn(5, 64), torch.tensor([[0, 1]] * 5), torch.full((5, 2), 0.5)
first = model[0](x, chosen, weights)
first.sum().backward()
for name, parameter in model.named_parameters():
    if "lora_A" in name:
        print(f"{name}: {'no gradient' if parameter.grad is None else f'gradient {float(parameter.grad.norm()):.3g}'}")
try:
    second = model[0](x, chosen, weights)
    print(f"relative difference of the second call: {float((second - first).norm() / first.norm()):.2g}")
except RuntimeError as error:
    print(f"the second call raises: {error}")
