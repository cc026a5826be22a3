"""peft: `hotswap_adapter` raises KeyError for a file that has more than lora_A and lora_B.

DoRA's magnitude, modules_to_save, biases and the saved weight of an adapted embedding have keys that the search for missing
keys does not know. For modules_to_save see peft#3581. Seen in 0.21.2.
"""

import tempfile

from peft import LoraConfig, get_peft_model
from peft.utils.hotswap import hotswap_adapter
from torch import nn

for settings in ({}, {"use_dora": True}, {"bias": "all"}, {"modules_to_save": ["1"]}):
    model = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 12))
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["0"], **settings))
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        try:
            hotswap_adapter(model, folder, "default", torch_device="cpu")
            print(f"{settings or 'plain'}: works")
        except KeyError as error:
            print(f"{settings}: raised KeyError {error}")
