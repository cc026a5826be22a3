"""torch: on CPUs with AVX-512, torch._int_mm leaves its result unwritten if the second factor is a transposed column.

The strides of such a factor are (1, 1). oneDNN refuses them, and torch ignores the status. So a Linear8bitLt of bitsandbytes
with one input feature returns what was in memory, in eval mode. See also pytorch#195066. Seen in torch 2.13.0.
"""

import bitsandbytes
import torch

a = torch.tensor([[1], [2], [3]], dtype=torch.int8)
b = torch.tensor([[5], [6], [7], [8]], dtype=torch.int8)
out = torch.full((3, 4), -1, dtype=torch.int32)
torch._int_mm(a, b.t(), out=out)
print("torch._int_mm of [1, 2, 3] and [5, 6, 7, 8]:", out.tolist())

layer = bitsandbytes.nn.Linear8bitLt(1, 4, bias=False, has_fp16_weights=False).to("cpu")
x = torch.tensor([[1.0], [2.0]])
print("a layer with one input, in training mode:", layer(x).tolist())
print("in eval mode:", layer.eval()(x).tolist())
