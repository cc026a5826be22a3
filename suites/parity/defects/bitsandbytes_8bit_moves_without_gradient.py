"""bitsandbytes' 8-bit optimizers on the CPU move a weight with a zero gradient if its block of 256 has other gradients.

A moment of zero is stored as the code of about 2e-5 absmax. In AdamW8bit the quotient of two such moments is not small.
Lion8bit takes the sign of such a moment, so that it moves the weight by lr at every step. Seen in 0.50.2. torch's AdamW
does not move the weight.
"""

import bitsandbytes
import torch

for kind in (bitsandbytes.optim.AdamW8bit, bitsandbytes.optim.Lion8bit, torch.optim.AdamW):
    p = torch.nn.Parameter(torch.zeros(4096))
    optimizer = kind([p], lr=1e-3, weight_decay=0.0)
    for _ in range(1000):
        p.grad = torch.zeros(4096)
        p.grad[0] = 1.0
        optimizer.step()
    print(
        f"{kind.__module__}.{kind.__name__}",
        "p[0]",
        float(p.detach()[0]),
        "p[1], no gradient:",
        float(p.detach()[1]),
        "p[300], another block:",
        float(p.detach()[300]),
    )
