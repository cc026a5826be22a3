"""peft's AdaLoRA: its layers, the term that its forward pass adds to the loss, and its allocator."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from harness.errors import Unsupported
from harness.methods.implementations.hf_peft.adapted import ADAPTER, PeftAdapted, has_conv1d, tuner
from harness.methods.registry import DTYPES, implements

if TYPE_CHECKING:
    from torch import Generator, Tensor, nn

    from reference.adalora import Config


@implements("adalora", name="hf-peft", dtypes=DTYPES, requires=["peft"], offers=["Conv2d"])
def adalora(model: nn.Module, config: Config, generator: Generator) -> PeftAdapted:
    """Attach peft's AdaLoRA to linear layers, Conv1D and Conv2d.

    Raises Unsupported for a Conv2d before peft 0.20, for regularization=squared-sum, for betas of 0 or 1, and if step 1 is
    the last pruning (total_steps - tfinal = 1).
    """
    from peft import AdaLoraConfig
    from peft.tuners.adalora import layer as peft_layers

    from reference.adalora import KINDS
    from reference.shared.layers import kind_of, targets

    found = targets(model, config.targets, KINDS)  # raises for other kinds of layers
    for path, base in found.items():
        if kind_of(base) == "Conv2d" and not hasattr(peft_layers, "SVDConv2d"):
            raise Unsupported(f"{path}: peft's AdaLoRA adapts a Conv2d since 0.20")
    if config.regularization != "mean-norm":
        raise Unsupported(f"peft's regulariser is the mean of norms, not {config.regularization}")
    if not 0 < config.beta1 < 1 or not 0 < config.beta2 < 1:
        raise Unsupported("peft refuses a beta of 0 or 1")
    if config.total_steps - config.tfinal == 1:
        raise Unsupported("peft scores only steps before the last pruning; if there is none, it raises KeyError")
    peft_config = AdaLoraConfig(
        init_r=config.rank,
        target_r=config.target_rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=list(found),
        fan_in_fan_out=has_conv1d(found),
        total_step=config.total_steps,
        tinit=config.tinit,
        tfinal=config.tfinal,
        deltaT=config.delta_t,
        beta1=config.beta1,
        beta2=config.beta2,
        orth_reg_weight=config.orthogonality,
    )
    return PeftAdaLora(model, tuner(model, peft_config, generator))


def orthogonality(tuner: Any, model: nn.Module) -> Tensor:
    """Return the scalar that the forward pass of peft's AdaLoraModel adds to a model's loss."""
    # Run the tuner's forward pass on a stand-in with a loss of zero; the pass reads only outputs and parameters.
    factor = next(p for name, p in model.named_parameters() if f"lora_A.{ADAPTER}" in name)
    outputs = SimpleNamespace(loss=factor.detach().new_zeros(()))
    stand_in = SimpleNamespace(
        model=SimpleNamespace(forward=lambda: outputs, named_parameters=model.named_parameters),
        peft_config=tuner.peft_config,
        trainable_adapter_name=ADAPTER,
    )
    loss: Tensor = type(tuner).forward(stand_in).loss
    return loss


def _tensors(layer: Any) -> dict[str, Tensor]:
    return {"A": layer.lora_A[ADAPTER], "E": layer.lora_E[ADAPTER], "B": layer.lora_B[ADAPTER]}


class PeftAdaLora(PeftAdapted):
    """A model with peft's AdaLoRA layers.

    peft's allocator holds the importance averages. `masks` maps each layer's path to a boolean mask (R, 1), True for the
    singular values that the last pruning kept. peft calls this mask the rank pattern.
    """

    def __init__(self, model: nn.Module, adalora_model: Any) -> None:
        import torch

        super().__init__(model, _tensors)
        self.tuner = adalora_model
        self.masks = {
            path: torch.ones_like(layer.lora_E[ADAPTER], dtype=torch.bool) for path, layer in self.layers.items()
        }

    def state(self) -> dict[str, Tensor]:
        """Map names to the averages of sensitivity and of uncertainty, and to the masks of the last pruning."""
        import torch

        tensors, allocator = {}, self.tuner.rankallocator
        for path, layer in self.layers.items():
            for letter, parameter in _tensors(layer).items():
                name = f"{path}.lora_{letter}.{ADAPTER}"
                for averages in (allocator.ipt, allocator.exp_avg_ipt, allocator.exp_avg_unc):
                    averages.setdefault(name, torch.zeros_like(parameter))  # the allocator's first step makes the same
                tensors[f"{path}.exp_avg_ipt_{letter}"] = allocator.exp_avg_ipt[name]
                tensors[f"{path}.exp_avg_unc_{letter}"] = allocator.exp_avg_unc[name]
            tensors[f"{path}.mask"] = self.masks[path]
        return tensors

    def regularizer(self) -> Tensor:
        """Return the scalar that peft's AdaLoRA adds to the loss."""
        return orthogonality(self.tuner, self.model)

    def after_step(self, step: int) -> None:
        """Call peft's allocator, and copy its new rank pattern to the masks.

        The allocator first gets the current masks, because they may come from a checkpoint.
        """
        import torch

        config, names = self.tuner.peft_config[ADAPTER], {path: f"{path}.lora_E.{ADAPTER}" for path in self.layers}
        config.rank_pattern = {names[path]: mask.flatten().tolist() for path, mask in self.masks.items()}
        self.tuner.update_and_allocate(step)
        for path, mask in self.masks.items():
            mask.copy_(torch.tensor(config.rank_pattern[names[path]])[:, None])
