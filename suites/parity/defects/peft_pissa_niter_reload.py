"""peft: an adapter that began with pissa_niter_N is, saved and loaded again, another model, without a word.

Loading splits the base weight anew, by a sketch from torch's global generator, and then puts the saved A and B beside a
residual that they do not belong to. The exact SVD ("pissa") gives the same residual again. How far off it is depends on the
spectrum: most on a flat one, as here, where nothing has trained yet. Here on 0.21.2.
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
