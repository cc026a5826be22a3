"""bitsandbytes' paged optimizers page nothing on the CPU: they warn, and work like the plain optimizers. Seen in 0.50.2."""

import warnings

import bitsandbytes
import torch

p = torch.nn.Parameter(torch.zeros(100_000))
p.grad = torch.ones_like(p)
optimizer = bitsandbytes.optim.PagedAdamW([p])
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    optimizer.step()
print([str(w.message) for w in caught], "paged tensors:", len(optimizer.page_mng.paged_tensors))
