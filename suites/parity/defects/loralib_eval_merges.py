"""loralib: eval() adds the update to the weight and train() subtracts it, so in eval mode the output ignores A and B.

merge_weights=True is the default. Values that are loaded into A and B in eval mode have no effect, and A and B get no
gradient. The next train() subtracts the update of the new values, which was never added, so the frozen weight stays wrong.
The defect is as old as merging in loralib. Seen in 0.1.2.
"""

import loralib
import torch

torch.manual_seed(0)
layer = loralib.Linear(64, 48, r=4, lora_alpha=8)
torch.nn.init.normal_(layer.lora_B)
W, x = layer.weight.detach().clone(), torch.randn(5, 64)
layer.eval()
print(f"eval() changed the weight by {float((layer.weight - W).norm() / W.norm()):.3g} (relative)")
layer.train()
print(f"and train() back, but for {float((layer.weight - W).norm() / W.norm()):.3g}")

layer = loralib.Linear(64, 48, r=4, lora_alpha=8)
W = layer.weight.detach().clone()
layer.eval()
before = layer(x).detach()
torch.nn.init.normal_(layer.lora_B)  # as load_state_dict of a checkpoint of A and B would
print(f"A and B loaded in eval mode change the output by {float((layer(x).detach() - before).norm()):.3g}")
layer.train()
print(f"and with the next train() the frozen weight is off by {float((layer.weight - W).norm() / W.norm()):.3g}")
