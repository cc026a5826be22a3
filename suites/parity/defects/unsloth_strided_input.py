"""unsloth: the kernels raise for an input whose batch and tokens cannot be viewed as one dimension.

`matmul_lora` and the backward passes call `view(-1, features)`. A model that transposes batch and tokens, or that cuts off
tokens, makes such inputs; every layer of torch and of peft takes them. An input without tokens raises too. Seen in
2026.10.9. Runs on a CPU, without the patches of `import unsloth`.
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
for name, x in (
    ("contiguous", torch.randn(2, 5, 16)),
    ("batch and tokens transposed", torch.randn(5, 2, 16).transpose(0, 1)),
    ("without the last token", torch.randn(2, 6, 16)[:, :-1]),
    ("without tokens", torch.randn(1, 0, 16)),
):
    try:
        q, _, _ = LoRA_QKV.apply(x, *layer, *layer, *layer)
        print(f"{name}: an output of shape {tuple(q.shape)}")
    except RuntimeError as error:
        print(f"{name}: raises {str(error).partition('.')[0].partition(' because')[0]}")
