"""peft's VeRA."""

from __future__ import annotations

from typing import Any

from harness.methods.implementations.hf_peft.adapted import ADAPTER, DTYPES, PeftAdapted, second, tuner
from harness.methods.registry import implements


@implements("vera", name="hf-peft", dtypes=DTYPES, requires=["peft"])
def vera(model: Any, config: Any, generator: Any) -> PeftAdapted:
    """Attach peft's VeRA to linear layers; config as `reference.vera.Config`."""
    tuner(model, _config(model, config), generator)
    return PeftAdapted(model, _vectors, _projections)


@implements("vera", name="hf-peft-second", dtypes=["float32"], requires=["peft"])
def second_vera(model: Any, config: Any, generator: Any) -> PeftAdapted:
    """Do the same to a model that has another VeRA adapter already, of twice the rank: peft refuses a smaller one."""
    second(model, _config(model, config), generator)
    return PeftAdapted(model, _vectors, _projections)


def _config(model: Any, config: Any) -> Any:
    """Return peft's config; raises ValueError where a target is no linear layer."""
    from peft import VeraConfig

    from reference.shared.layers import targets

    found = targets(model, config.targets)
    return VeraConfig(
        r=config.rank,
        vera_dropout=config.dropout,
        target_modules=list(found),
        projection_prng_key=config.projection_key,
        d_initial=config.d_initial,
    )


def _vectors(layer: Any) -> dict[str, Any]:
    return {"b": layer.vera_lambda_b[ADAPTER], "d": layer.vera_lambda_d[ADAPTER]}


def _projections(layer: Any) -> dict[str, Any]:
    """Return the slices of the pair that all layers and adapters share, as peft's forward pass takes them."""
    return {
        "A": layer.vera_A[ADAPTER][:, : layer.in_features],
        "B": layer.vera_B[ADAPTER][: layer.out_features],
    }
