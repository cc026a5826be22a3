"""peft: after saving and loading, a model with pissa_niter_N gives other outputs, without a warning.

Loading splits the base weight again, with a sketch drawn from torch's global generator. So the residual does not belong to
the saved A and B. The exact SVD ("pissa") gives the same residual again. The error depends on the spectrum, and is largest
for a flat one, as here. Seen in 0.21.2.
"""

import copy
from tempfile import TemporaryDirectory

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

for start in ("pissa", "pissa_niter_4", "pissa_niter_16"):
    torch.manual_seed(0)
    base, x = nn.Sequential(nn.Linear(256, 256)), torch.randn(8, 256)
    untouched = copy.deepcopy(base)
    model = get_peft_model(base, LoraConfig(r=16, lora_alpha=16, init_lora_weights=start, target_modules=["0"]))
    with TemporaryDirectory() as folder, torch.no_grad():
        model.save_pretrained(folder)
        loaded = PeftModel.from_pretrained(untouched, folder)
        change = float((loaded(x) - model(x)).norm() / model(x).norm())
    print(f"init_lora_weights={start}: relative change of the output by saving and loading {change:.3g}")
