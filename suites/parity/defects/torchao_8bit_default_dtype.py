"""torchao: 8-bit optimizers keep a table that the first step computes in torch's default dtype.

A program that trains while bfloat16 is the default dtype gets a table of bfloat16 values. The process keeps it, so that
later optimizers round their moments to other numbers. Seen in 0.18.0.
"""

import torch
from torchao.optim import subclass_8bit

right = torch.tensor(subclass_8bit.get_qmap_signed())
subclass_8bit.get_qmap_signed.cache_clear()
torch.set_default_dtype(torch.bfloat16)
subclass_8bit.get_qmap_signed()
torch.set_default_dtype(torch.float32)
kept = torch.tensor(subclass_8bit.get_qmap_signed())
print((kept != right).sum().item(), "of", right.numel(), "values of the table differ (should be 0)")
