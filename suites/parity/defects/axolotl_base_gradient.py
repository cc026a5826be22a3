"""axolotl: the kernels give the base weight no gradient, and do not say so.

Their backward passes return None for W; that of LoRA_Embedding has the comment "base embedding weight grad handled by
PyTorch", but torch has no other way to it. So a base weight that trains beside its adapter gets no gradient. Seen in
0.19.0.
"""

import torch
from axolotl.kernels.lora import LoRA_Embedding, LoRA_O
from torch.nn import functional as F  # noqa: N812

torch.manual_seed(0)
x, tokens, A, B = torch.randn(1, 3, 16), torch.arange(5), torch.randn(2, 16), torch.randn(8, 2)
for name, function in (
    ("a linear layer by torch", lambda W: x @ (W + B @ A).T),
    ("the same by LoRA_O", lambda W: LoRA_O.apply(x, None, W, None, None, A, B, 1.0, None, None)),
    ("an embedding by torch", lambda W: F.embedding(tokens, W + B @ A)),
    (
        "the same by LoRA_Embedding",
        lambda W: LoRA_Embedding.apply(tokens, W, B.T, A.T, 1.0, None, None, None, 2.0, False, False),
    ),
):
    W = torch.randn(8, 16, requires_grad=True)
    function(W).sum().backward()
    print(f"{name}:", "no gradient of W" if W.grad is None else f"a gradient of W of norm {float(W.grad.norm()):.3g}")
