"""peft: over an 8-bit layer, the adapter is in torch's default dtype, so that another default dtype changes it.

Over a plain layer or a Linear4bit it is not: there peft takes the dtype of the weight, or the compute dtype. peft makes a
16-bit adapter float32, but leaves float64. Seen in 0.21.2.
"""

import bitsandbytes
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

for name in ("plain", "4 bits", "8 bits"):
    layer = nn.Linear(64, 32)
    if name == "4 bits":
        layer = bitsandbytes.nn.Linear4bit(64, 32, compute_dtype=torch.float32, quant_type="nf4").to("cpu")
    if name == "8 bits":
        layer = bitsandbytes.nn.Linear8bitLt(64, 32, has_fp16_weights=False).to("cpu")
    model = nn.Sequential(layer)
    model.is_loaded_in_4bit, model.is_loaded_in_8bit = name == "4 bits", name == "8 bits"
    torch.set_default_dtype(torch.float64)
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["0"]))
    torch.set_default_dtype(torch.float32)
    print(
        f"{name}: the adapter is {model.base_model.model[0].lora_A['default'].weight.dtype} (should be torch.float32)"
    )
