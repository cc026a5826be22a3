"""Loading of adapter files by HF peft, as its documentation shows it: `PeftModel.from_pretrained`, then `load_adapter`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.methods.loader import ADAPTER_FILES, Loader
from harness.methods.registry import implements

if TYPE_CHECKING:
    from torch import Tensor


class PeftLoader(Loader):
    """A transformers model with a PeftModel around it, once an adapter is loaded."""

    def __init__(self, base_folder: Path, dtype: str) -> None:
        import torch

        from harness.methods.base_model import load_base

        self.model: Any = load_base(base_folder, getattr(torch, dtype))

    @property
    def has_adapters(self) -> bool:
        """True once an adapter has been loaded: `model` is then a PeftModel."""
        return hasattr(self.model, "peft_config")

    def load(self, folder: Path, name: str) -> None:
        """Load an adapter."""
        from peft import PeftModel

        if self.has_adapters:
            self.model.load_adapter(folder, name)
        else:
            self.model = PeftModel.from_pretrained(self.model, folder, adapter_name=name)
        self.model.eval()

    def logits(self, prompts: Sequence[Sequence[int]], name: str | None) -> list[Tensor]:
        """Compute logits with one adapter, or with all adapters disabled."""
        from harness.methods.base_model import logits

        if name is None and self.has_adapters:
            with self.model.disable_adapter():
                return logits(self.model, prompts)
        if name is not None:
            self.model.set_adapter(name)
        return logits(self.model, prompts)


@implements(ADAPTER_FILES, name="hf-peft", requires=["peft", "transformers"])
def load_base(base_folder: Path, dtype: str) -> Loader:
    """Load a base model, to which adapters can be added."""
    return PeftLoader(base_folder, dtype)
