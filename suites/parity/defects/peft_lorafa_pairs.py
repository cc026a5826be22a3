"""peft: LoRA-FA takes the adapter's tensors two by two, in the order of the model, as A and B.

It raises TypeError if one of two layers has a third tensor (DoRA, `lora_bias`), if there are two adapters, or if the B of a
layer has no gradient because the layer did not run. In a model with a single DoRA layer, the magnitude never trains. Seen in
0.21.2.
"""

import torch
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_lorafa_optimizer
from torch import nn


def step(title, layers=2, second_adapter=False, runs=2, **options):
    """Train for one step, and print the tensors that did not move although they have a gradient."""
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(layers)))
    config = LoraConfig(r=2, target_modules=[str(n) for n in range(layers)], **options)
    model = get_peft_model(model, config)
    if second_adapter:
        model.add_adapter("second", config)
    optimizer = create_lorafa_optimizer(model, r=2, lora_alpha=8, lr=0.1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    x = torch.randn(4, 8)
    for n in range(runs):
        x = model.base_model.model[n](x)
    x.square().sum().backward()
    try:
        optimizer.step()
    except TypeError as error:
        print(f"{title}: TypeError: {error}")
        return
    still = [name for name, p in model.named_parameters() if p.grad is not None and torch.equal(p, before[name])]
    print(f"{title}: tensors that have a gradient and did not move: {still}")


for times in (1, 2):
    print(f"{times} adapted layers")
    step("  plain", times, runs=times)
    step("  DoRA", times, runs=times, use_dora=True)
    step("  lora_bias", times, runs=times, lora_bias=True)
    step("  two adapters", times, runs=times, second_adapter=True)
step("two adapted layers, the second does not run", runs=1)
