"""Entry point for peft-harness, used by `peft-harness check acme`."""

from harness import Unsupported, implements


@implements("lora", name="acme")
def attach(model, config, generator):
    from acme_kernels.layer import AcmeLinear
    from harness.testing import wrap_layers

    if config.dropout or config.init != "kaiming":
        raise Unsupported("no dropout, and only the default start")
    return wrap_layers(
        model,
        config,
        lambda base: AcmeLinear(base, config.rank, config.scaling, generator),
        names={"A": "down", "B": "up"},
        update=AcmeLinear.update,
    )


@implements("adalora", name="acme")
def attach_adalora(model, config, generator):
    from acme_kernels.adalora import adapt
    from harness.testing import target_layers

    layers = target_layers(model, config.targets)
    if not all(hasattr(layer, "in_features") for layer in layers.values()):
        raise Unsupported("linear layers only")
    return adapt(model, layers, config, generator)


@implements("nf4_dequantize", name="acme", kind="operation")
def dequantize(packed, absmax, block, shape, dtype):
    from acme_kernels.nf4 import decode

    return decode(packed, absmax, block, shape, dtype)


def implementations():
    return [attach, attach_adalora, dequantize]
