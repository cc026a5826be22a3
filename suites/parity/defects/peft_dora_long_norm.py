"""peft: on a CPU, DoRA's norms of an embedding lose accuracy with the number of entries.

A norm runs over all entries, and these numbers are not adjacent in memory. torch adds such numbers one after the other,
but adjacent ones in a tree. Gemma has 262,144 entries. Seen in 0.21.2.
"""

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

torch.manual_seed(0)
for entries in (1_024, 65_600, 262_144):
    table = nn.Embedding(entries, 8)
    truth = torch.linalg.norm(table.weight.detach().double(), dim=0)
    model = get_peft_model(nn.Sequential(table), LoraConfig(r=4, target_modules=["0"], use_dora=True))
    norms = model.base_model.model[0].lora_magnitude_vector["default"].weight.detach()
    eps = torch.finfo(torch.float32).eps
    adjacent = torch.linalg.norm(table.weight.detach().T.contiguous(), dim=1)
    found, possible = (float((one - truth).norm() / truth.norm()) / eps for one in (norms, adjacent))
    print(f"{entries} entries: error {found:.3g} eps of float32; of adjacent numbers {possible:.2g} eps")
