"""`loralib`: LoRA's layers by its authors, in place of the model's, with the same weight tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from harness.errors import Unsupported
from harness.methods.registry import Implementation, implements

if TYPE_CHECKING:
    from torch import Generator, Tensor, nn

    from reference.lora import Config
_HOW: dict[str, Any] = {"dtypes": ("float64", "float32", "bfloat16", "float16"), "requires": ["loralib"]}


@implements("lora", name="loralib", **_HOW)
def lora(model: nn.Module, config: Config, generator: Generator) -> Loralib:
    """Replace the targets by loralib's Linear, Embedding or Conv2d.

    A Conv1D becomes a Linear with fan_in_fan_out. loralib draws from torch's global generator, seeded here. Raises
    Unsupported for rslora, conv=peft, packed weights, and subclasses with another forward pass.
    """
    return _attached(model, config, generator)


@implements("lora", name="loralib-merging", dtypes=["float32"], requires=["loralib"])
def merging(model: nn.Module, config: Config, generator: Generator) -> Loralib:
    """Attach as `lora` does, with loralib's default merge_weights=True: `eval()` merges, `train()` unmerges."""
    adapted = _attached(model, config, generator)
    for layer in adapted.layers.values():
        layer.merge_weights = True
        layer.train(layer.training)
    return adapted


def _attached(model: nn.Module, config: Config, generator: Generator) -> Loralib:
    import torch
    from loralib import mark_only_lora_as_trainable

    from reference.shared.layers import KINDS, kind_of, replace, targets
    from reference.shared.lora_start import write_initial_factors

    if config.rslora:
        raise Unsupported("loralib has no rslora: its scaling is alpha / r")
    bases = targets(model, config.targets, KINDS)
    with torch.random.fork_rng():
        torch.manual_seed(generator.initial_seed())
        layers = {path: _layer(path, base, config) for path, base in bases.items()}
    for path, layer in layers.items():
        if config.init != "kaiming":  # loralib's own; its users write any other
            if kind_of(bases[path]) not in ("linear", "Conv1D"):
                raise Unsupported(f"{path}: init={config.init} with loralib supports linear layers only")
            write_initial_factors(config.init, layer.lora_A, layer.lora_B, generator)
    for path, layer in layers.items():
        replace(model, path, layer)
    mark_only_lora_as_trainable(model)
    return Loralib(model, bases, layers)


def _layer(path: str, base: Any, config: Config) -> Any:
    """Return loralib's layer with the weight and the bias of `base`. Raises Unsupported for another kind of layer."""
    import loralib
    from torch import nn

    from reference.shared.layers import kind_of

    kind = kind_of(base)
    if kind != "Conv1D" and type(base) not in (nn.Linear, nn.Embedding, nn.Conv2d):
        raise Unsupported(f"{path}: loralib has no layer that computes as {type(base).__name__} does")
    like = {"device": base.weight.device, "dtype": base.weight.dtype}
    # loralib merges at every eval() by default. The harness writes A and B in eval mode too; unmerging would then subtract
    # an update that was never added. So merging is on only inside `Loralib.merge` and `Loralib.unmerge`.
    ours = {"r": config.rank, "lora_alpha": config.alpha, "merge_weights": False}
    holder: Any
    if kind == "embedding":
        same = ("padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")
        options = {name: getattr(base, name) for name in same}
        layer = holder = loralib.Embedding(base.num_embeddings, base.embedding_dim, **ours, **options, **like)
    elif kind == "Conv2d":
        if config.conv != "loralib":
            raise Unsupported(f"{path}: loralib's LoRA of a convolution is conv=loralib, not conv={config.conv}")
        if base.kernel_size[0] != base.kernel_size[1]:
            raise Unsupported(f"{path}: loralib takes square kernels only, and this one is {base.kernel_size}")
        same = ("stride", "padding", "dilation", "groups", "padding_mode")
        options = {name: getattr(base, name) for name in same}
        ours |= {"lora_dropout": config.dropout, "bias": base.bias is not None}
        layer = loralib.Conv2d(base.in_channels, base.out_channels, base.kernel_size[0], **ours, **options, **like)
        holder = layer.conv
    else:
        D, E = (base.nx, base.nf) if kind == "Conv1D" else (base.in_features, base.out_features)
        ours |= {"lora_dropout": config.dropout, "bias": base.bias is not None, "fan_in_fan_out": kind == "Conv1D"}
        layer = holder = loralib.Linear(D, E, **ours, **like)
    holder.weight = base.weight
    if getattr(base, "bias", None) is not None:
        holder.bias = base.bias
    layer.train(base.training)  # loralib's `train` returns None
    return layer


class Loralib:
    """An Adapted with loralib's layers. Names: `<path>.A`, `<path>.B`.

    Linear, Conv1D: A (R, D), B (E, R). Embedding: A (R, num), B (dim, R). Conv2d: A (R k, in k), B (out/groups k, R k).
    """

    can_merge = True

    def __init__(self, model: nn.Module, bases: dict[str, Any], layers: dict[str, Any]) -> None:
        self.model, self.bases, self.layers = model, bases, layers

    def tensors(self) -> dict[str, Tensor]:
        """Map canonical names to loralib's own parameters."""
        return {
            f"{path}.{name}": weight
            for path, layer in self.layers.items()
            for name, weight in (("A", layer.lora_A), ("B", layer.lora_B))
        }

    def state(self) -> dict[str, Tensor]:
        """Return nothing: LoRA has only trainable tensors."""
        return {}

    def parameters(self) -> list[Tensor]:
        """List the parameters that train."""
        return list(self.tensors().values())

    def regularizer(self) -> None:
        """Return None: nothing is added to the loss."""

    def optimizer(self, lr: float, weight_decay: float) -> None:
        """Return None: the caller chooses the optimizer."""

    def after_step(self, step: int) -> None:
        """Do nothing: LoRA has no schedule."""

    def merge(self) -> None:
        """Merge into the base weight, in place, as loralib does in `eval()`."""
        self._switch(training=False)

    def unmerge(self) -> None:
        """Unmerge by subtraction, as loralib does in `train()`."""
        self._switch(training=True)

    def _switch(self, training: bool) -> None:
        for layer in self.layers.values():
            was_training, was_merging = layer.training, layer.merge_weights
            layer.merge_weights = True
            layer.train(training)
            layer.merge_weights = was_merging
            layer.train(was_training)

    def detach(self) -> None:
        """Restore the base layers; they share their weights with loralib's."""
        from reference.shared.layers import replace

        for path, base in self.bases.items():
            replace(self.model, path, base)


def implementations() -> list[Implementation]:
    """Return the Implementations of this file."""
    return [one for one in globals().values() if isinstance(one, Implementation)]
