"""peft: `hotswap_adapter` sets other adapters to zero if their names contain the name of the swapped one.

The keys of the swapped adapter are those that contain its name anywhere, so the tensors of `style-2` count as tensors of
`style` that the new file lacks. peft#3780. Seen in 0.21.2.
"""

import tempfile

from peft import LoraConfig, get_peft_model
from peft.utils.hotswap import hotswap_adapter
from torch import nn

config = LoraConfig(r=4, target_modules=["0"], init_lora_weights=False)
model = get_peft_model(nn.Sequential(nn.Linear(12, 12)), config, adapter_name="style")
model.add_adapter("style-2", config)
with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder, selected_adapters=["style"])
    hotswap_adapter(model, f"{folder}/style", "style", torch_device="cpu")
for name in ("style", "style-2"):
    B = model.base_model.model[0].lora_B[name].weight
    print(f"{name}: {int((B == 0).sum())} of {B.numel()} elements of B are zero (should be 0)")
