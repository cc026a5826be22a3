"""axolotl: for models with GELU's tanh approximation (Gemma), the feed-forward kernel computes the exact GELU.

`axolotl.monkeypatch.lora_kernels` uses the kernel of GEGLU for every activation whose name contains gelu, and this
kernel computes `erf`. The two forms of GELU differ by up to 4.7e-4. Run with TRITON_INTERPRET=1 on a CPU. Seen in
0.19.0. Axolotl closed a request for a kernel with tanh, because it was not faster.
"""

from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import torch
from axolotl.kernels import geglu
from torch.nn.functional import gelu

patch = Path(find_spec("axolotl").origin).parent / "monkeypatch" / "lora_kernels.py"
lines = patch.read_text().splitlines()
at = next(n for n, line in enumerate(lines) if '"gelu" in activation' in line)
print("\n".join(line.strip() for line in lines[at : at + 3]))
if not torch.cuda.is_available():
    geglu.torch = SimpleNamespace(
        **vars(torch) | {"empty": lambda *shape, **options: torch.empty(*shape, **{**options, "device": "cpu"})}
    )
gate = torch.linspace(-4, 4, 4001, device="cuda" if torch.cuda.is_available() else "cpu")[None, None]
h = geglu.geglu_forward(gate, torch.ones_like(gate))
print("largest difference to the exact GELU:", float((h - gelu(gate)).abs().max()))
print("largest difference to the one by tanh:", float((h - gelu(gate, approximate="tanh")).abs().max()))
