"""torchao's AdamW8bit computes 1 - beta2^t from a float32 t, so at small t only three or four digits are right.

With beta2 = 0.999 the first correction is 0.001, a difference of two numbers near 1. The relative error of the step is
up to about 1e-5, and in float32 it should be 1e-7. Seen in 0.18.0.
"""

import torch
from torchao.optim import AdamW8bit

p = torch.nn.Parameter(torch.zeros(4096))
p.grad = torch.ones(4096)
optimizer = AdamW8bit([p], lr=1.0)
with torch.compiler.set_stance("force_eager"):
    optimizer.step()
print("a first step of Adam is lr exactly, up to eps; torchao's is off by", abs(float(p.detach()[0]) + 1.0))
t = torch.tensor(1.0)
print("1 - 0.999^t by float32:", float(1 - 0.999**t), "exactly: 0.001")
