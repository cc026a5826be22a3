"""The Methods that peft's LoraConfig offers: LoRA on every kind of layer, DoRA and PiSSA."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from harness.errors import Unsupported
from harness.methods.implementations.hf_peft.adapted import (
    ADAPTER,
    PeftAdapted,
    has_conv1d,
    peft_model,
    tuner,
    wrappers,
)
from harness.methods.registry import DTYPES, implements

if TYPE_CHECKING:
    from torch import Generator, Tensor, nn

    from reference import dora as reference_dora
    from reference import lora as reference_lora
    from reference import pissa as reference_pissa


@implements("lora", name="hf-peft", dtypes=DTYPES, requires=["peft"], offers=["lora_bias", "nn.Conv1d", "Conv3d"])
def lora(model: nn.Module, config: reference_lora.Config, generator: Generator) -> PeftAdapted:
    """Attach peft's LoRA to linear layers, Conv1D, embeddings, convolutions and stacked experts.

    Raises Unsupported for a convolution with conv=loralib, for init=orthogonal with a convolution or with experts, for
    init=orthogonal in float64, for dropout with experts, and for lora_bias with another init than kaiming.
    """
    from reference.shared.layers import CONVOLUTIONS, KINDS, floating_dtype, kind_of, stacked_weights, targets

    found = targets(model, config.targets, KINDS)
    kinds = {path: kind_of(layer) for path, layer in found.items()}
    if config.lora_bias and config.init != "kaiming":
        raise Unsupported(f"peft supports lora_bias with init=kaiming only, not with init={config.init}")
    for path, layer in found.items():
        if config.init == "orthogonal" and str(floating_dtype(layer)) == "torch.float64":
            raise Unsupported(f"{path}: peft draws init=orthogonal in float32, and B A is not zero in float64")
    for path in (path for path, kind in kinds.items() if kind in CONVOLUTIONS):
        if config.conv != "peft":
            raise Unsupported(f"{path}: peft's LoRA of a convolution is conv=peft, not conv={config.conv}")
        if config.init == "orthogonal":
            raise Unsupported(f"{path}: peft supports init=orthogonal for linear layers only")
    stacks = [f"{path}.{name}" for path, layer in found.items() for name in stacked_weights(layer)]
    if stacks and config.init == "orthogonal":
        raise Unsupported(f"{stacks[0]}: peft supports init=orthogonal for linear layers only")
    if stacks and config.dropout:
        raise Unsupported(f"{stacks[0]}: peft's LoRA of stacked experts has no dropout")
    peft_config = lora_config(
        config,
        [path for path, kind in kinds.items() if kind != "experts"],
        target_parameters=stacks or None,
        use_rslora=config.rslora,
        init_lora_weights=True if config.init == "kaiming" else config.init,
        fan_in_fan_out=has_conv1d(found),
    )
    return PeftLora(peft_model(model, peft_config, generator), peft_config)


class PeftLora(PeftAdapted):
    """A model with peft's LoRA, which can mix several adapters in one batch.

    peft refuses to merge a convolution with groups. With such a layer, `can_merge` is false.
    """

    def __init__(self, peft_model: Any, peft_config: Any) -> None:
        super().__init__(peft_model.get_base_model(), lora_tensors)
        self.can_merge = all(getattr(layer.get_base_layer(), "groups", 1) == 1 for layer in self.layers.values())
        self.peft_model, self.peft_config = peft_model, peft_config

    @contextmanager
    def mixed(self, adapters: Sequence[Mapping[str, Tensor]]) -> Iterator[None]:
        """Send row n of each batch through adapter n while the context is open. An adapter is a result of `tensors()`.

        peft calls this feature `adapter_names`. At every call, peft's wrapper sets hooks that pass the names to the
        layers. The harness calls the inner model, so this context sets such hooks itself.
        """
        import torch

        names = [f"row{n}" for n in range(len(adapters))]
        hooks = []
        try:
            for name, adapter in zip(names, adapters, strict=True):
                with torch.random.fork_rng():
                    self.peft_model.add_adapter(name, self.peft_config)
                for path, layer in self.layers.items():
                    for letter, tensor in lora_tensors(layer, name).items():
                        tensor.data.copy_(adapter[f"{path}.{letter}"])

            def named(_: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
                return inputs, options | {"adapter_names": names}

            hooks = [layer.register_forward_pre_hook(named, with_kwargs=True) for layer in self.layers.values()]
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for name in names:
                if name in self.peft_model.peft_config:
                    self.peft_model.delete_adapter(name)


@implements("dora", name="hf-peft", dtypes=DTYPES, requires=["peft"], offers=["nn.Conv1d", "Conv3d"])
def dora(model: nn.Module, config: reference_dora.Config, generator: Generator) -> PeftAdapted:
    """Attach peft's DoRA to linear layers, Conv1D, embeddings and convolutions.

    Raises Unsupported for per=input, for detach_norm=false, and for a convolution with groups.
    """
    from reference.dora import KINDS
    from reference.shared.layers import targets

    found = targets(model, config.targets, KINDS)  # raises for other kinds of layers
    if config.per != "output":
        raise Unsupported(f"peft's DoRA has one magnitude per output feature, not per {config.per}")
    if not config.detach_norm:
        raise Unsupported("peft's DoRA treats the norm as a constant in the backward pass")
    for path, base in found.items():
        if getattr(base, "groups", 1) != 1:
            why = f"for a convolution with {base.groups} groups, peft's DoRA computes the norms of a wrongly reshaped kernel"
            raise Unsupported(f"{path}: {why}")
    tuner(model, lora_config(config, found, use_dora=True, fan_in_fan_out=has_conv1d(found)), generator)
    return PeftAdapted(model, lambda layer: {**lora_tensors(layer), "m": layer.lora_magnitude_vector[ADAPTER].weight})


@implements("pissa", name="hf-peft", requires=["peft"])
def pissa(model: nn.Module, config: reference_pissa.Config, generator: Generator) -> PeftAdapted:
    """Attach peft's PiSSA to linear layers, Conv1D and embeddings. peft refuses to split a float64 weight.

    peft overwrites the base weight with the residual, so `detach` leaves a base without its principal part.
    """
    from reference.pissa import KINDS
    from reference.shared.layers import targets

    found = targets(model, config.targets, KINDS)  # raises for every other kind
    tuner(model, _pissa(config, found), generator)
    return PeftAdapted(model, lora_tensors, lambda layer: {"residual": _residual(layer)})


@implements("pissa", name="hf-peft-reloaded", dtypes=["float32"], requires=["peft"])
def reloaded_pissa(model: nn.Module, config: reference_pissa.Config, generator: Generator) -> PeftAdapted:
    """Attach peft's PiSSA, save the adapter, and load it into the original model with another state of torch's generator.

    Raises Unsupported for embeddings and for niter=0. In these cases, loading draws no random numbers, so there is
    nothing to check.
    """
    from tempfile import TemporaryDirectory

    import torch
    from peft import PeftModel

    from reference.pissa import KINDS
    from reference.shared.layers import kind_of, targets

    bases = targets(model, config.targets, KINDS)
    if not config.niter or any(kind_of(layer) == "embedding" for layer in bases.values()):
        raise Unsupported("loading draws no random numbers without niter or for embeddings; check hf-peft instead")
    weights = {layer: layer.weight.detach().clone() for layer in bases.values()}
    saved = peft_model(model, _pissa(config, bases), generator)
    with TemporaryDirectory() as folder, torch.random.fork_rng():
        saved.save_pretrained(folder)
        PeftAdapted(model, lora_tensors).detach()
        for layer, weight in weights.items():
            layer.weight.data = weight
        torch.manual_seed(generator.initial_seed() + 1)
        PeftModel.from_pretrained(model, folder, adapter_name=ADAPTER, is_trainable=True)
    return PeftAdapted(model, lora_tensors, lambda layer: {"residual": _residual(layer)})


def _pissa(config: reference_pissa.Config, found: Mapping[str, nn.Module]) -> Any:
    """Return peft's config of PiSSA for these layers."""
    start = f"pissa_niter_{config.niter}" if config.niter else "pissa"
    return lora_config(config, found, init_lora_weights=start, fan_in_fan_out=has_conv1d(found))


def lora_config(config: Any, paths: Iterable[str], **options: Any) -> Any:
    """Return peft's LoraConfig for the layers at `paths`. config: the Config of LoRA, DoRA, PiSSA or QLoRA."""
    from peft import LoraConfig

    dropout, bias = getattr(config, "dropout", 0.0), getattr(config, "lora_bias", False)
    return LoraConfig(
        r=config.rank, lora_alpha=config.alpha, lora_dropout=dropout, lora_bias=bias, target_modules=list(paths),
        **options,
    )  # fmt: skip


def _residual(layer: Any) -> Tensor:
    """Return a layer's residual, shape (out, in). An embedding and a Conv1D store it transposed."""
    from reference.shared.layers import kind_of

    weight: Tensor = layer.base_layer.weight.data
    return weight if kind_of(layer.base_layer) == "linear" else weight.T


def lora_tensors(layer: Any, name: str = ADAPTER) -> dict[str, Tensor]:
    """Return peft's parameters A and B of a LoRA layer of any kind, and c, the bias of B, if there is one.

    Their shapes are those of the reference:

    Linear and Conv1D: A (R, D), B (E, R), c (E,).
    Embedding: A (R, num), B (dim, R).
    Convolution: A (R, in, *kernel), B (out, R/groups, 1, ...), c (out,).
    Stacked experts: A (K R, D) and B (E, R K) of each parameter, see `reference/lora_experts.py`.
    """
    if hasattr(layer, "parameter_name"):
        pairs = {one.parameter_name: (one.lora_A[name].weight, one.lora_B[name].weight) for one in wrappers(layer)}
        return {f"{own}.{letter}": t for own, pair in pairs.items() for letter, t in zip("AB", pair, strict=True)}
    if name in layer.lora_embedding_A:
        return {"A": layer.lora_embedding_A[name], "B": layer.lora_embedding_B[name]}
    B = layer.lora_B[name]
    return {"A": layer.lora_A[name].weight, "B": B.weight} | ({} if B.bias is None else {"c": B.bias})
