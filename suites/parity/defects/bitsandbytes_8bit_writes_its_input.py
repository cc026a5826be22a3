"""bitsandbytes: in eval mode with a threshold, a Linear8bitLt writes to its float16 input, so that autograd raises.

The quantiser sets the outliers to 0 and restores them. Inputs of other dtypes are copied, since they are cast to float16. If
the function before the layer needs its output in the backward pass, as tanh does, the backward pass raises. Seen in 0.50.2.
"""

import bitsandbytes
import torch

layer = bitsandbytes.nn.Linear8bitLt(64, 32, has_fp16_weights=False, threshold=0.5).to("cpu").eval()
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    x = torch.randn(5, 64, dtype=dtype, requires_grad=True)
    try:
        layer(torch.tanh(x)).sum().backward()
        print(f"{dtype}: the backward pass works")
    except RuntimeError as error:
        print(f"{dtype}: raised RuntimeError: {str(error)[:110]} ...")
