"""peft: LoRA-FA and Riemannian LoRA take the A of all stacked experts (`target_parameters`) for the A of one layer.

Their r x r inverse becomes (experts * r) x (experts * r), so that the gradients of different experts are mixed. The
rows of the inverse are ordered expert by expert, like the rows of A. But the inverse multiplies the gradient of B,
whose columns are ordered rank by rank. Each expert should be stepped as a linear layer of its own. Seen in 0.21.2.
"""

import torch
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_lorafa_optimizer, create_riemannian_optimizer
from torch import nn

EXPERTS, RANK, INPUTS, OUTPUTS = 3, 2, 16, 8
torch.manual_seed(0)
A, B = torch.randn(EXPERTS, RANK, INPUTS).double(), torch.randn(EXPERTS, OUTPUTS, RANK).double()
G = torch.randn(EXPERTS, OUTPUTS, INPUTS).double()  # gradient of the weight of each expert


def step(layer, config, a, b, g_a, g_b, create):
    """Adapt `layer`, set A, B and their gradients, step the optimizer that `create` makes, and return the new B."""
    layer = nn.Sequential(layer).double()
    model = get_peft_model(layer, config, autocast_adapter_dtype=False)
    tensors = [layer[0].lora_A["default"].weight, layer[0].lora_B["default"].weight]
    for p, value, gradient in zip(tensors, (a, b), (g_a, g_b), strict=True):
        p.data, p.grad = value.clone(), gradient.clone()
    create(model).step()
    return tensors[1].detach()


for name, create in {
    "LoRA-FA": lambda model: create_lorafa_optimizer(model, r=RANK, lora_alpha=RANK, lr=0.1),
    "Riemannian LoRA": lambda model: create_riemannian_optimizer(model, torch.optim.SGD, lr=0.1, reg=1e-6),
}.items():
    g_a, g_b = B.mT @ G, G @ A.mT
    stack = nn.Linear(INPUTS, OUTPUTS, bias=False)
    stack.weight = nn.Parameter(torch.zeros(EXPERTS, OUTPUTS, INPUTS))
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=[], target_parameters=["0.weight"])
    packed = [t.flatten(0, 1) if t.shape[1] == RANK else t.permute(1, 2, 0).flatten(1) for t in (A, B, g_a, g_b)]
    together = step(stack, config, *packed, create).view(OUTPUTS, RANK, EXPERTS).permute(2, 0, 1)
    for k in range(EXPERTS):
        config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["0"])
        alone = step(nn.Linear(INPUTS, OUTPUTS, bias=False), config, A[k], B[k], g_a[k], g_b[k], create)
        moved, off = (alone - B[k]).norm(), (together[k] - alone).norm()
        print(f"{name}, expert {k}: alone B moves by {moved:.3f}; in a stack it ends {off:.3f} elsewhere")
