"""Tensors for caches, which must hold values whatever mode of torch is active when they are made."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack

import torch
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.utils._python_dispatch import _disable_current_modes


def real_tensors() -> AbstractContextManager[object]:
    """Return a context without inference mode, FakeTensorMode and other modes, torch.export and torch.func.

    A table that is cached in one of these would be unusable after it. torch.compile cannot trace the context, and gets
    one without inference mode only.
    """
    if torch.compiler.is_compiling():
        return torch.inference_mode(False)
    stack = ExitStack()
    for context in (torch.inference_mode(False), _disable_current_modes(), temporarily_clear_interpreter_stack()):
        stack.enter_context(context)
    return stack
