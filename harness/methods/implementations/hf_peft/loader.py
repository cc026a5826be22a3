"""Load adapter files by HF peft in the way that peft documents: `PeftModel.from_pretrained`, then `load_adapter`."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.errors import Unsupported
from harness.methods.loader import ADAPTER_FILES, Loader
from harness.methods.registry import implements

if TYPE_CHECKING:
    from torch import Tensor


class PeftLoader(Loader):
    """A transformers model, which a PeftModel wraps as soon as an adapter is loaded.

    Raises Unsupported where peft raises a ValueError, and where peft's documentation states a limitation.
    """

    combinations = ("cat", "svd", "linear")

    def __init__(self, base_folder: Path, dtype: str) -> None:
        import torch

        from harness.methods.base_model import load_base

        self.model: Any = load_base(base_folder, getattr(torch, dtype))
        self.merged = False

    @property
    def has_adapters(self) -> bool:
        """True once an adapter has been loaded: `model` is then a PeftModel."""
        return hasattr(self.model, "peft_config")

    def load(self, folder: Path, name: str) -> None:
        """Load the first adapter by `PeftModel.from_pretrained`, and further ones by `load_adapter`.

        Raises Unsupported for several adapters if the config of one of them says that it trains biases.
        """
        from peft import PeftConfig, PeftModel

        if self.has_adapters:
            configs = [PeftConfig.from_pretrained(folder), *self.model.peft_config.values()]
            if any(config.bias != "none" for config in configs):
                raise Unsupported("peft refuses several adapters if one of them has `bias`")
            self.model.load_adapter(folder, name)
        else:
            self.model = PeftModel.from_pretrained(self.model, folder, adapter_name=name)
        self.model.eval()

    def logits(self, prompts: Sequence[Sequence[int]], name: str | None) -> list[Tensor]:
        """Return the logits with one adapter. If `name` is None, no adapter is active except those that are merged."""
        from harness.methods.base_model import logits

        if name is None and self.has_adapters and not self.merged:
            with self.disabled():
                return logits(self.model, prompts)
        if name is not None:
            self.model.set_adapter(name)
        return logits(self.model, prompts)

    def combine(self, names: Sequence[str], weights: Sequence[float], new_name: str, way: str) -> None:
        """Combine by `add_weighted_adapter`.

        Raises Unsupported if peft refuses, and for several adapters with way="linear", which sums A and B instead of B A.
        """
        if way == "linear" and len(names) > 1:
            raise Unsupported("combine: `linear` of peft adds the factors A and B, not the updates")
        rank = sum(max([config.r, *config.rank_pattern.values()]) for config in map(self.model.peft_config.get, names))
        try:
            self.model.add_weighted_adapter(
                list(names), list(weights), new_name, way, svd_rank=rank if way == "svd" else None
            )
        except ValueError as error:
            raise Unsupported(f"combine: {error}") from error

    def merge(self, names: Sequence[str]) -> None:
        """Make the first adapter the active one, so that its modules_to_save are used, and merge by `merge_adapter`.

        Raises Unsupported for several adapters if one of them has modules_to_save.
        """
        if len(names) > 1 and any(self.model.peft_config[name].modules_to_save for name in names):
            raise Unsupported("merge: peft can use the modules_to_save of one adapter only")
        self.model.set_adapter(names[0])
        self.model.merge_adapter(list(names))
        self.merged = True

    def unmerge(self) -> None:
        """Undo `merge` by `unmerge_adapter`. Raises RuntimeError if a layer is still merged.

        peft would unmerge such a layer by itself when the adapters are disabled, so the logits would not show the error.
        """
        self.model.unmerge_adapter()
        if any(getattr(module, "merged", False) is True for module in self.model.modules()):
            raise RuntimeError("unmerge_adapter left a layer merged")
        self.merged = False

    def hotswap(self, folder: Path, name: str) -> None:
        """Replace an adapter by `hotswap_adapter`. Raises Unsupported if peft refuses the new adapter."""
        from peft.utils.hotswap import hotswap_adapter

        if not self.merged:  # peft compares the new config with that of the active adapter
            self.model.set_adapter(name)
        try:
            hotswap_adapter(self.model, str(folder), name, torch_device="cpu")
        except (ValueError, RuntimeError) as error:  # peft documents these errors for unsuitable adapters
            raise Unsupported(f"hotswap: {error}") from error

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Disable all adapters within the context, by `disable_adapter`. Raises Unsupported if one has trained biases."""
        if any(config.bias != "none" for config in self.model.peft_config.values()):
            raise Unsupported("disabled: peft documents that disabling leaves the biases that it trained")
        with self.model.disable_adapter():
            yield

    def set_scale(self, name: str, factor: float) -> None:
        """Set the scaling to `factor` times the scaling that the file gives, by `set_scale` of each layer."""
        from peft.tuners.lora import LoraLayer

        for module in self.model.modules():
            if isinstance(module, LoraLayer):
                module.set_scale(name, factor)

    def train(self, mode: bool) -> None:
        """Set the model to training mode if `mode` is True, else to evaluation mode."""
        self.model.train(mode)

    def copy(self) -> PeftLoader:
        """Return a deep copy."""
        return copy.deepcopy(self)

    def delete(self, name: str) -> None:
        """Delete an adapter by `delete_adapter`."""
        self.model.delete_adapter(name)


@implements(ADAPTER_FILES, name="hf-peft", requires=["peft", "transformers"])
def load_base(base_folder: Path, dtype: str) -> Loader:
    """Load a base model, to which adapters can be added."""
    return PeftLoader(base_folder, dtype)
