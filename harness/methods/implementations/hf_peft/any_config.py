"""Any method of peft, configured by an adapter_config.json. There is no reference for such a method."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from harness.errors import ImplementationError, Unsupported, plural
from harness.methods.implementations.hf_peft import prompts
from harness.methods.implementations.hf_peft.adalora import orthogonality
from harness.methods.implementations.hf_peft.adapted import ADAPTER, PeftAdapted
from harness.methods.peft_config import AdapterConfig
from harness.methods.registry import DTYPES, implements
from harness.process.out_of_memory import shortage

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Generator, Tensor, nn
_REWRITING = ("pissa", "olora", "loftq")
"""If LoRA's `init_lora_weights` begins with one of these, peft overwrites the base weight."""
_NEAR_THE_BASE = ("VBLORA", "UNILORA")
"""Values of `peft_type`. With these, the output before training is near the base model's output, but not equal to it."""
_NAMED_STARTS = ("LORA", "LOKR")
"""Values of `peft_type`. With these, the output before training equals the base model's, whichever initialisation the
config names. With other types, a named initialisation may change the output, e.g. `gaussian` of C3A."""
_ACT_BETWEEN_STEPS = ("ADALORA", "ADAMSS")
"""Values of `peft_type` that need a call of peft's `update_and_allocate` between optimizer steps."""
_STARTS = ("init_weights", "init_lora_weights", "init_ia3_weights")


@implements("peft", name="hf-peft", dtypes=DTYPES, requires=["peft"])
def any_method(model: nn.Module, config: AdapterConfig, generator: Generator) -> AnyPeft:
    """Attach the adapter that `config.adapter_config` describes.

    Raises ImplementationError with peft's message if peft refuses the config, for example for unknown layers or values
    out of range. Raises Unsupported for LoftQ without a GPU, because peft quantises only on a GPU.
    """
    import torch
    from peft import PeftConfig, PeftModel

    keys = {**config.adapter_config, "inference_mode": False}  # saved adapters have true, with which nothing trains
    # The harness itself trains the head, whatever its name. peft must not wrap it.
    keys |= {"modules_to_save": None} if "modules_to_save" in keys else {}
    if keys.get("init_lora_weights") == "loftq" and not _gpu():
        raise Unsupported("peft's LoftQ quantises on a GPU, and there is none")
    _check_target_parameters(keys.get("target_parameters"), {name for name, _ in model.named_parameters()})
    with warnings.catch_warnings(record=True) as caught, torch.random.fork_rng():
        warnings.simplefilter("always")
        torch.manual_seed(generator.initial_seed())
        try:
            peft_config = PeftConfig.from_peft_type(**keys)
            if peft_config.is_prompt_learning:
                wrapper = prompts.attach(model, peft_config, ADAPTER)
                _check_forward(model)
            else:
                wrapper = PeftModel(model, peft_config, ADAPTER)  # like get_peft_model, but the head is not wrapped
        except (TypeError, ValueError, KeyError, OSError, RuntimeError) as error:
            if shortage(error):
                raise
            what = f"peft refuses this adapter_config: {error}"
            raise ImplementationError(
                what, where=str(keys["peft_type"]), hint="correct its keys, or choose another model"
            ) from error
    ignored = [str(w.message) for w in caught if "Unexpected keyword arguments" in str(w.message)]
    return (PromptPeft if peft_config.is_prompt_learning else AnyPeft)(model, wrapper, ignored)


def _check_target_parameters(names: object, parameters: set[str]) -> None:
    """Raise ImplementationError for a name that matches no parameter, because peft would ignore it silently."""
    for name in names if isinstance(names, list) else ():
        if not any(parameter == name or parameter.endswith(f".{name}") for parameter in parameters):
            ends = sorted({parameter.rpartition(".")[2] for parameter in parameters})
            what = f"target_parameters has `{name}`, which matches no parameter of the model"
            raise ImplementationError(what, where="peft", hint=f"its parameters end in {', '.join(ends)}")


def _gpu() -> bool:
    import torch

    return torch.cuda.is_available() or torch.xpu.is_available()


def _check_forward(model: Any) -> None:
    """Run the model on two tokens. If the model cannot use virtual tokens, peft raises an error only in this pass."""
    import torch

    with torch.no_grad():
        model(input_ids=torch.zeros((1, 2), dtype=torch.long, device=model.device))


def _select_task(model: nn.Module) -> None:
    """Add hooks that pass the task of each text to Poly's layers, as the forward pass of Poly's tuner does.

    A Cell has one task, so every text has task 0.
    """
    for module in model.modules():
        if hasattr(module, "poly_router"):
            module.register_forward_pre_hook(_with_first_task, with_kwargs=True)


def _with_first_task(_: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    import torch

    return inputs, options | {"task_ids": torch.zeros(len(inputs[0]), dtype=torch.long, device=inputs[0].device)}


class AnyPeft(PeftAdapted):
    """A model with any of peft's methods. Tensors keep peft's names, because a shared tensor belongs to several layers."""

    starts_as_base: bool
    """True if the output before training equals the output of the base model."""
    rewrites_base: bool
    """True if peft changes the base weight when it attaches the adapter."""
    notes: list[str]
    """Warnings of peft about keys of the config that it ignores. The Record shows them."""

    def __init__(self, model: nn.Module, wrapper: Any, notes: list[str]) -> None:
        super().__init__(model, lambda _: {})
        self.wrapper, self.notes = wrapper, notes
        self.trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        config = wrapper.peft_config[ADAPTER]
        self.kind = config.peft_type.value
        # Adaption prompts wrap whole attention blocks, which are no tuner layers.
        self.layers |= {path: module for path, module in model.named_modules() if hasattr(module, "adaption_prompt")}
        _select_task(model)
        starts = [getattr(config, name, True) for name in _STARTS]
        approximates = "loftq" in starts or getattr(config, "kasa_config", None) is not None
        self.starts_as_base = not (approximates or config.peft_type in _NEAR_THE_BASE) and all(
            start is True or (config.peft_type in _NAMED_STARTS and start is not False) for start in starts
        )
        self.rewrites_base = approximates or any(str(start).lower().startswith(_REWRITING) for start in starts)

    def bases(self) -> dict[str, nn.Module]:
        """Map the paths of the adapted layers to their base layers."""
        return {path: getattr(layer, "base_layer", None) or layer.model for path, layer in self.layers.items()}

    def tensors(self) -> dict[str, Tensor]:
        """Map peft's names to the parameters that were trainable after attaching."""
        return dict(self.trainable)

    def load_saved(self, folder: Path) -> None:
        """Load the tensors in a folder that peft wrote. Raises ImplementationError if the adapter lacks one of them."""
        from peft import set_peft_model_state_dict
        from safetensors.torch import load_file

        path = folder / "adapter_model.safetensors"
        tensors = load_file(path)
        result = set_peft_model_state_dict(self.wrapper, tensors, adapter_name=ADAPTER)
        if strange := list(result.unexpected_keys):
            what = f"peft has no place for {plural(len(strange), 'tensor')} of the file, e.g. {strange[0]}"
            hint = "`import` loads adapters only, without modules_to_save or trained biases"
            raise ImplementationError(what, where=str(path), hint=hint)

    def saved(self) -> dict[str, Tensor]:
        """Map names to the tensors that peft's `save_pretrained` saves."""
        from peft import get_peft_model_state_dict

        tensors: dict[str, Any] = get_peft_model_state_dict(
            self.wrapper, adapter_name=ADAPTER, save_embedding_layers=False
        )
        return tensors

    def regularizer(self) -> Tensor | None:
        """Return the scalar that AdaLoRA adds to the loss. For other methods return None, because they add nothing."""
        return orthogonality(self.wrapper.base_model, self.model) if self.kind == "ADALORA" else None

    def after_step(self, step: int) -> None:
        """Call peft's `update_and_allocate` for methods that act between steps."""
        if self.kind in _ACT_BETWEEN_STEPS:
            self.wrapper.base_model.update_and_allocate(step)

    def merge(self) -> None:
        """Merge as peft's `merge_adapter` does. Raises NotImplementedError if peft cannot merge."""
        if not hasattr(self.wrapper.base_model, "merge_adapter"):
            raise NotImplementedError("it has no `merge_adapter`")
        try:
            self.wrapper.merge_adapter()
        except RuntimeError as error:
            if shortage(error):
                raise
            raise NotImplementedError(str(error)) from error

    def unmerge(self) -> None:
        """Unmerge as peft's `unmerge_adapter` does."""
        self.wrapper.unmerge_adapter()

    def reloaded(self, base: nn.Module) -> nn.Module:
        """Save the adapter, load it from its files into the original model `base`, and return `base`."""
        from tempfile import TemporaryDirectory

        from peft import PeftConfig

        with TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.wrapper.save_pretrained(folder, save_embedding_layers=False)
            self._load(base, folder, PeftConfig.from_pretrained(folder))
        return base

    def _load(self, base: nn.Module, folder: str, config: Any) -> None:
        from peft import PeftModel

        config.task_type = None  # otherwise peft would wrap a classifier's head
        # Load it as trainable: for weights without gradients torch may choose kernels that differ in the last digits.
        PeftModel.from_pretrained(base, folder, adapter_name=ADAPTER, config=config, is_trainable=True)
        _select_task(base)


class PromptPeft(AnyPeft):
    """A model with virtual tokens before every text. It has no adapted layers and nothing to merge."""

    def __init__(self, model: nn.Module, wrapper: Any, notes: list[str]) -> None:
        super().__init__(model, wrapper, notes)
        self.starts_as_base = False

    def merge(self) -> None:
        """Raise NotImplementedError: virtual tokens cannot be merged."""
        raise NotImplementedError("virtual tokens are a part of the input, not of the weights")

    def detach(self) -> None:
        """Remove the virtual tokens."""
        prompts.remove(self.model)

    def attach_again(self) -> None:
        """Attach the virtual tokens again after `detach`."""
        prompts.restore(self.model, self.wrapper)

    def _load(self, base: nn.Module, folder: str, config: Any) -> None:
        prompts.attach(base, config, ADAPTER).load_adapter(folder, ADAPTER)
