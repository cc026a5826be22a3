"""peft's LoraConfig: LoRA on every kind of layer, DoRA, and PiSSA, which is a start of LoRA."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from harness.errors import Unsupported
from harness.methods.implementations.hf_peft.adapted import ADAPTER, DTYPES, PeftAdapted, peft_model, tuner
from harness.methods.registry import implements


@implements("lora", name="hf-peft", dtypes=DTYPES, requires=["peft"])
def lora(model: Any, config: Any, generator: Any) -> PeftAdapted:
    """Attach peft's LoRA to linear layers, Conv1D, embeddings and convolutions; config as `reference.lora.Config`.

    Raises Unsupported for a convolution with conv=loralib, a parametrisation that peft does not have, or init=orthogonal.
    """
    from peft import LoraConfig

    from reference.shared.layers import KINDS, floating_dtype, kind_of, targets

    found = targets(model, config.targets, KINDS)
    kinds = {path: kind_of(layer) for path, layer in found.items()}
    for path, layer in found.items():
        if config.init == "orthogonal" and str(floating_dtype(layer)) == "torch.float64":
            raise Unsupported(f"{path}: peft makes its orthogonal start in float32, and B A is not zero in float64")
    for path in (path for path, kind in kinds.items() if kind == "Conv2d"):
        if config.conv != "peft":
            raise Unsupported(f"{path}: peft's LoRA of a convolution is conv=peft, not conv={config.conv}")
        if config.init == "orthogonal":
            raise Unsupported(f"{path}: peft's orthogonal start is of linear layers only")
    peft_config = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=list(kinds),
        use_rslora=config.rslora,
        init_lora_weights=True if config.init == "kaiming" else config.init,
        # What a user of GPT-2 sets. peft sets it by itself otherwise, layer by layer, and warns of it.
        fan_in_fan_out="Conv1D" in kinds.values(),
    )
    return PeftLora(peft_model(model, peft_config, generator), peft_config)


class PeftLora(PeftAdapted):
    """A model with peft's LoRA, which can hold several adapters at once and mix them in one batch."""

    def __init__(self, peft_model: Any, peft_config: Any) -> None:
        super().__init__(peft_model.get_base_model(), lora_tensors)
        self.peft_model, self.peft_config = peft_model, peft_config

    @contextmanager
    def mixed(self, adapters: Any) -> Iterator[None]:
        """Within, row n of each batch goes through adapter n (as `tensors()`): peft's `adapter_names` in the forward pass.

        peft hands the names to its layers by hooks that it sets at every call of its own model; here they stay set, since
        it is the model inside that is called.
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

            def named(_: Any, given: Any, options: Any) -> Any:
                return given, options | {"adapter_names": names}

            hooks = [layer.register_forward_pre_hook(named, with_kwargs=True) for layer in self.layers.values()]
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for name in names:
                if name in self.peft_model.peft_config:
                    self.peft_model.delete_adapter(name)


@implements("dora", name="hf-peft", dtypes=DTYPES, requires=["peft"])
def dora(model: Any, config: Any, generator: Any) -> PeftAdapted:
    """Attach peft's DoRA to linear layers; config as `reference.dora.Config`.

    Raises Unsupported for per=input and for a norm with a gradient: peft has one reading of the paper.
    """
    from peft import LoraConfig

    from reference.shared.layers import targets

    found = targets(model, config.targets)  # refuses what is no linear layer
    if config.per != "output":
        raise Unsupported(f"peft's DoRA has one magnitude per output feature, not per {config.per}")
    if not config.detach_norm:
        raise Unsupported("peft's DoRA takes the norm for a constant in the backward pass")
    peft_config = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=list(found),
        use_dora=True,
    )
    tuner(model, peft_config, generator)
    return PeftAdapted(model, lambda layer: {**lora_tensors(layer), "m": layer.lora_magnitude_vector[ADAPTER].weight})


# peft refuses to split a float64 weight.
@implements("pissa", name="hf-peft", dtypes=("float32", "bfloat16", "float16"), requires=["peft"])
def pissa(model: Any, config: Any, generator: Any) -> PeftAdapted:
    """Attach LoRA that starts from the principal part, to linear layers and embeddings; config as `reference.pissa.Config`.

    peft writes the residual into the base weight and keeps no copy, so `detach` leaves a base without its principal part.
    """
    from reference.shared.layers import targets

    found = targets(model, config.targets, ("linear", "embedding"))  # refuses every other kind
    tuner(model, _pissa(config, found), generator)
    return PeftAdapted(model, lora_tensors, lambda layer: {"residual": _residual(layer)})


@implements("pissa", name="hf-peft-reloaded", dtypes=["float32"], requires=["peft"])
def reloaded_pissa(model: Any, config: Any, generator: Any) -> PeftAdapted:
    """Do the same, save the adapter, and load it into the model as it was, as another process would.

    Raises Unsupported without `niter`, since the exact SVD is the same whenever it is taken, and for embeddings.
    """
    from tempfile import TemporaryDirectory

    import torch
    from peft import PeftModel

    from reference.shared.layers import kind_of, targets

    bases = targets(model, config.targets, ("linear", "embedding"))
    if not config.niter or any(kind_of(layer) == "embedding" for layer in bases.values()):
        raise Unsupported("loading draws nothing here, so hf-peft is what is to be judged")
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


def _pissa(config: Any, paths: Iterable[str]) -> Any:
    """Return peft's config for `reference.pissa.Config` and the layers that it names."""
    from peft import LoraConfig

    return LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        target_modules=list(paths),
        init_lora_weights=f"pissa_niter_{config.niter}" if config.niter else "pissa",
    )


def _residual(layer: Any) -> Any:
    """Return what is left of the base weight as (out, in), which an embedding keeps the other way round."""
    weight = layer.base_layer.weight.data
    return weight.T if ADAPTER in layer.lora_embedding_A else weight


def lora_tensors(layer: Any, name: str = ADAPTER) -> dict[str, Any]:
    """Map A and B to peft's own parameters of a LoRA layer of any kind.

    Linear and Conv1D: A (R, D), B (E, R). Embedding: A (R, num), B (dim, R). Conv2d: A (R, in, k, k), B (out, R/groups, 1,
    1). The reference has the same layouts.
    """
    if name in layer.lora_embedding_A:
        return {"A": layer.lora_embedding_A[name], "B": layer.lora_embedding_B[name]}
    return {"A": layer.lora_A[name].weight, "B": layer.lora_B[name].weight}
