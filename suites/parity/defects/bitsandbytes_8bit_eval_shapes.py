"""bitsandbytes: on the CPU in eval mode, a Linear8bitLt raises for a vector and for an input of four dimensions.

The quantiser of the input takes the absmax over dimension 1 in place of the last one; only three dimensions are reshaped
before. Training mode takes any shape, as nn.Linear does. Seen in 0.50.2.
"""

import bitsandbytes
import torch

layer = bitsandbytes.nn.Linear8bitLt(64, 32, has_fp16_weights=False).to("cpu")
for training in (True, False):
    for shape in ((64,), (5, 64), (2, 5, 64), (2, 3, 5, 64)):
        try:
            result = tuple(layer.train(training)(torch.randn(shape)).shape)
        except (IndexError, RuntimeError) as error:
            result = f"raised {type(error).__name__}: {error}"
        print(f"training={training}, input {shape}: {result}")
