"""unsloth: the backward passes of LoRA_QKV and LoRA_MLP write the gradient of x over x, by default (inplace=True).

This saves memory, and torch raises if one of its own operations has saved x. But other code that keeps x finds the gradient
in it, and a second backward pass through the same graph raises. Seen in 2026.10.9. The script runs on a CPU, without the
patches of `import unsloth`.
"""

import os
import sys
import tempfile
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

os.environ |= {"UNSLOTH_ALLOW_CPU": "1", "UNSLOTH_IS_PRESENT": "1", "UNSLOTH_COMPILE_LOCATION": tempfile.mkdtemp()}
folder = Path(find_spec("unsloth").origin).parent
for name, path in (("unsloth", folder), ("unsloth.kernels", folder / "kernels")):
    sys.modules[name] = ModuleType(name)
    sys.modules[name].__path__, sys.modules[name].__spec__ = [str(path)], ModuleSpec(name, None, is_package=True)

import torch  # noqa: E402
from unsloth.kernels.fast_lora import LoRA_QKV  # noqa: E402

torch.manual_seed(0)
layer = (torch.randn(8, 16), None, torch.randn(2, 16), torch.randn(8, 2), 1.0)
x = torch.randn(2, 5, 16, requires_grad=True)
before = x.detach().clone()
q, _, _ = LoRA_QKV.apply(x, *layer, *layer, *layer)
q.sum().backward(retain_graph=True)
print(
    "x after the backward pass equals x before:",
    torch.equal(x, before),
    "; equals its gradient:",
    torch.equal(x, x.grad),
)
try:
    q.sum().backward()
except RuntimeError as error:
    print("a second backward pass raises:", str(error).partition(":")[0])
