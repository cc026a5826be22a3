"""peft: unmerging LoRA from an 8-bit layer subtracts the update and quantises once more, so that the weight changes.

Merging has to quantise the sum, so the codes of the original weight are lost. peft keeps no copy of them. Each further
merge starts from the changed weight. peft warns of rounding errors. Seen in 0.21.2.
"""

import warnings

import bitsandbytes
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

warnings.simplefilter("ignore")
torch.manual_seed(0)
packed = bitsandbytes.nn.Linear8bitLt(256, 512, bias=False, has_fp16_weights=False)
model = nn.Sequential(packed.to("cpu"))
model.is_loaded_in_8bit = True
model = get_peft_model(model, LoraConfig(r=8, target_modules=["0"], init_lora_weights=False)).train()
x = torch.randn(16, 256)
with torch.no_grad():
    y = model(x)
    for times in range(1, 4):
        model.merge_adapter()
        model.unmerge_adapter()
        change = float((model(x) - y).norm() / y.norm())
        print(f"merged and unmerged {times} times: relative change of the output {change:.3g} (should be 0)")
