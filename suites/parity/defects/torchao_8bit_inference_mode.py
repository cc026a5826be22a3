"""torchao: AdamW8bit raises under torch.inference_mode, where torch's own AdamW can step.

In inference mode, torch dispatches `Tensor.to` as an operator of its own to the class of the 8-bit state, OptimState8bit,
which does not implement this operator. Under no_grad the same step works. Seen in 0.18.0.
"""

import torch
from torchao.optim import AdamW8bit

for kind in (torch.optim.AdamW, AdamW8bit):
    for mode in (torch.no_grad, torch.inference_mode):
        p = torch.nn.Parameter(torch.zeros(4096))
        optimizer = kind([p], lr=0.1)
        try:
            with torch.compiler.set_stance("force_eager"):
                for _ in range(2):
                    p.grad = torch.ones(4096)
                    with mode():
                        optimizer.step()
                print(f"{kind.__name__} under {mode.__name__}: p is {float(p.detach()[0]):.3g} after two steps")
        except NotImplementedError as error:
            print(f"{kind.__name__} under {mode.__name__}: NotImplementedError: {str(error)[:150]}")
