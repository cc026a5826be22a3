"""peft: OFT's series with fewer than 4 terms is not (I + Q) (I + Q + ... + Q^k), which the paper has.

This product is I + 2 Q + ... + 2 Q^k + Q^(k+1), so that the factor of the last term is 1. peft's default of
5 terms has k = 3. With num_cayley_neumann_terms=2 the factor of the last term is 2, and 3 gives the same as 4. Seen in
0.21.2.
"""

import torch
from peft import OFTConfig, get_peft_model
from torch import nn

Q = torch.tensor([[0.0, 0.1], [-0.1, 0.0]], dtype=torch.float64)
one = torch.eye(2, dtype=torch.float64)
for terms in (2, 3, 4, 5):
    config = OFTConfig(oft_block_size=2, num_cayley_neumann_terms=terms, target_modules=["0"])
    model = get_peft_model(nn.Sequential(nn.Linear(2, 2, bias=False, dtype=torch.float64)), config)
    layer = model.base_model.model[0]
    layer.oft_R["default"].weight.data.fill_(0.1)  # the number above the diagonal of Q
    powers = [torch.linalg.matrix_power(Q, power) for power in range(terms - 1)]
    error = (layer.get_delta_weight("default").detach() - (one + Q) @ sum(powers[1:], start=one)).norm()
    print(f"{terms} terms: R differs from the paper's series by {error:.1e}")
