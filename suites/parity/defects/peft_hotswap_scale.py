"""peft: after `hotswap_adapter`, `set_scale` and `unscale_layer` use the alpha of the old adapter.

The swap changes the scaling of a layer, but not its lora_alpha and r, which both functions use. The model also keeps the
old config, so saving gives a wrong file (peft#3581). Seen in 0.21.2.
"""

import tempfile

from peft import LoraConfig, get_peft_model
from peft.utils.hotswap import hotswap_adapter
from torch import nn


def adapted(alpha):
    """Return a model with an adapter of this alpha."""
    config = LoraConfig(r=4, lora_alpha=alpha, target_modules=["0"], init_lora_weights=False)
    return get_peft_model(nn.Sequential(nn.Linear(12, 12)), config)


model = adapted(alpha=4)
layer = model.base_model.model[0]
with tempfile.TemporaryDirectory() as folder:
    adapted(alpha=32).save_pretrained(folder)
    hotswap_adapter(model, folder, "default", torch_device="cpu")
print("after the swap:      ", layer.scaling["default"], "(should be 8.0)")
layer.set_scale("default", 1.0)
print("after set_scale(1.0):", layer.scaling["default"], "(should be 8.0)")
print("alpha in the config: ", model.peft_config["default"].lora_alpha, "(should be 32)")
