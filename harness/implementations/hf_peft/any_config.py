"""Any layer-wise method of peft's, by its adapter_config.json: no names of ours, no reference to hold it to."""

from __future__ import annotations

import warnings
from typing import Any

from harness.errors import ImplementationError
from harness.implementations.hf_peft.adapted import ADAPTER, DTYPES, PeftAdapted
from harness.registry import implements

_REWRITING = ("pissa", "olora", "corda", "loftq", "lora_ga", "mica")
"""LoRA's `init_lora_weights` that put a residual in the place of the base weight."""
_NOT_THE_BASE = ("VBLORA", "UNILORA")
"""Methods whose start is near the base model, and not the base model."""
_NAMED_STARTS = ("LORA", "LOKR")
"""Methods whose starts by name are the base model too; another's (C3A's `gaussian`) is random."""
_STARTS = ("init_weights", "init_lora_weights", "init_ia3_weights")


@implements("peft", name="hf-peft", dtypes=DTYPES, requires=["peft"])
def any_method(model: Any, config: Any, generator: Any) -> AnyPeft:
    """Attach what `config.adapter_config` describes; config as `harness.adapter_config.AdapterConfig`.

    Raises ImplementationError with peft's own words for what peft refuses: unknown layers, values out of range.
    """
    import torch
    from peft import PeftConfig, PeftModel

    keys = {**config.adapter_config, "inference_mode": False}  # saved adapters say true
    # A new head is the harness's to train, whatever its name.
    keys |= {"modules_to_save": None} if "modules_to_save" in keys else {}
    with warnings.catch_warnings(record=True) as said, torch.random.fork_rng():
        warnings.simplefilter("always")
        torch.manual_seed(generator.initial_seed())
        try:
            wanted = PeftConfig.from_peft_type(**keys)
            around = PeftModel(model, wanted, ADAPTER)  # as get_peft_model makes it, but for a wrapper around the head
        except (TypeError, ValueError, KeyError) as error:
            what = f"peft refuses this adapter_config: {error}"
            raise ImplementationError(
                what, where=str(keys["peft_type"]), mend="change its keys, or the model"
            ) from error
    ignored = [str(w.message) for w in said if "Unexpected keyword arguments" in str(w.message)]
    return AnyPeft(model, around, ignored)


class AnyPeft(PeftAdapted):
    """A model with layers of any of peft's methods. What trains has peft's own names: a method may share tensors.

    starts_as_base: whether peft says that the start changes nothing; rewrites_base: whether it changes the base weight.
    notes: what a reader of the Record must know.
    """

    def __init__(self, model: Any, around: Any, notes: list[str]) -> None:
        super().__init__(model, lambda _: {})
        self.around, self.notes = around, notes
        self.trains_now = {name: p for name, p in model.named_parameters() if p.requires_grad}
        config = around.peft_config[ADAPTER]
        starts = [getattr(config, name, True) for name in _STARTS]
        self.starts_as_base = config.peft_type not in _NOT_THE_BASE and all(
            start is True or (config.peft_type in _NAMED_STARTS and start not in (False, "loftq")) for start in starts
        )
        self.rewrites_base = any(str(start).lower().startswith(_REWRITING) for start in starts)

    def tensors(self) -> dict[str, Any]:
        """Map peft's names to all that trained as it was attached."""
        return dict(self.trains_now)

    def merge(self) -> None:
        """Merge as peft's `merge_adapter` does."""
        self.around.merge_adapter()

    def unmerge(self) -> None:
        """Unmerge as peft's `unmerge_adapter` does."""
        self.around.unmerge_adapter()

    def reloaded(self, base: Any) -> Any:
        """Save the adapter and load it into `base`, the model of before attaching, as another process would; return it."""
        from tempfile import TemporaryDirectory

        from peft import PeftConfig, PeftModel

        with TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.around.save_pretrained(folder, save_embedding_layers=False)
            config = PeftConfig.from_pretrained(folder)
            config.task_type = None  # or peft would wrap a classifier's head
            PeftModel.from_pretrained(base, folder, adapter_name=ADAPTER, config=config)
        return base
