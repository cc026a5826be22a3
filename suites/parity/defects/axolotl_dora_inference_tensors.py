"""axolotl: DoRA's kernels raise for an adapter that was made or loaded under torch.inference_mode.

The kernels read `_version` of A and B, and tensors from inference mode do not have it. peft's own layer does not raise.
Seen in 0.19.0.
"""

import torch
from axolotl.kernels.lora import LoRA_O

with torch.inference_mode():
    W, x, A, B, m = (torch.randn(*shape) for shape in ((10, 12), (1, 2, 12), (3, 12), (10, 3), (10,)))
    for name, magnitude in (("LoRA", None), ("DoRA", m)):
        try:
            print(
                f"{name}: an output of shape",
                tuple(LoRA_O.apply(x, None, W, None, None, A, B, 2.0, None, magnitude).shape),
            )
        except RuntimeError as error:
            print(f"{name}: raises {error}")
