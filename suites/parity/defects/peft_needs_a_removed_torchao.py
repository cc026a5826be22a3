"""peft 0.20: if torchao is installed, VeRA imports a class that torchao 0.18 no longer has, so attaching raises.

The layer has nothing to do with torchao. Seen in 0.20.0 beside torchao 0.18.0; absent in 0.19.1 and in 0.21.
"""

from importlib.metadata import version

import torch
from peft import VeraConfig, get_peft_model

print("peft", version("peft"), "torchao", version("torchao"))
try:
    get_peft_model(torch.nn.Sequential(torch.nn.Linear(8, 8)), VeraConfig(r=2, target_modules=["0"]))
    print("attached")
except ImportError as error:
    print("ImportError:", error)
