"""axolotl: LoRA_Embedding computes its gradients in float32, even for float64 tensors. Seen in 0.19.0."""

import torch
from axolotl.kernels.lora import LoRA_Embedding
from torch.nn import functional as F  # noqa: N812

torch.manual_seed(0)
tokens = torch.randint(0, 32, (1, 64))
for dtype in (torch.float32, torch.float64):
    W, A, B = (torch.randn(*shape, dtype=dtype) for shape in ((32, 16), (4, 32), (16, 4)))
    A.requires_grad_()
    B.requires_grad_()
    want = F.embedding(tokens, W) + 2 * F.embedding(tokens, A.T) @ B.T
    have = LoRA_Embedding.apply(tokens, W, A, B, 2.0, None, None, None, 2.0, False, False)
    weights = torch.randn_like(want)
    truth = torch.autograd.grad((want * weights).sum(), (A, B))
    found = torch.autograd.grad((have * weights).sum(), (A, B))
    errors = [float((a - b).norm() / b.norm()) for a, b in zip(found, truth, strict=True)]
    print(
        f"{dtype}: relative error of the output {float((have - want).detach().norm() / want.detach().norm()):.1g}, "
        f"of the gradients of A and B {errors[0]:.1g} and {errors[1]:.1g}"
    )
