"""peft: merging LoRA into a 4-bit layer quantises the sum again, so the outputs of the merged model differ.

The error is as large as the error of the first quantisation. Unmerging subtracts and quantises a third time, so it does
not restore the layer. peft warns of rounding errors. Seen in 0.21.2.
"""

import bitsandbytes
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

torch.manual_seed(0)
dense = nn.Linear(256, 512, bias=False)
packed = bitsandbytes.nn.Linear4bit(256, 512, bias=False, compute_dtype=torch.float32, quant_type="nf4", device="meta")
packed.weight = bitsandbytes.nn.Params4bit(dense.weight.detach(), quant_type="nf4", module=packed).to("cpu")
packed.support_avx512bf16_for_cpu = False  # or eval mode would compute in bfloat16
model = nn.Sequential(packed)
model.is_loaded_in_4bit = True
model = get_peft_model(model, LoraConfig(r=8, target_modules=["0"], init_lora_weights=False)).eval()
x = torch.randn(16, 256)
with torch.no_grad():
    y = model(x)
    model.merge_adapter()
    merged = model(x)
    model.unmerge_adapter()
    unmerged = model(x)
for name, other in (("merged", merged), ("unmerged", unmerged)):
    print(f"{name}: relative change of the output {float((other - y).norm() / y.norm()):.3g}")
