"""peft's VeRA."""

from __future__ import annotations

from typing import Any

from harness.implementations.hf_peft.adapted import ADAPTER, DTYPES, PeftAdapted, tuner
from harness.registry import implements


@implements("vera", name="hf-peft", dtypes=DTYPES, requires=["peft"])
def vera(model: Any, config: Any, generator: Any) -> PeftAdapted:
    """Attach peft's VeRA to linear layers; config as `reference.vera.Config`."""
    from peft import VeraConfig

    from reference.layers import targets

    targets(model, config.targets)  # refuses what is no linear layer
    peft_config = VeraConfig(
        r=config.rank,
        vera_dropout=config.dropout,
        target_modules=list(config.targets),
        projection_prng_key=config.projection_key,
        d_initial=config.d_initial,
    )
    tuner(model, peft_config, generator)
    return PeftAdapted(model, _vectors, _projections)


def _vectors(layer: Any) -> dict[str, Any]:
    return {"b": layer.vera_lambda_b[ADAPTER], "d": layer.vera_lambda_d[ADAPTER]}


def _projections(layer: Any) -> dict[str, Any]:
    """Return the slices of the pair that all layers share, as peft's forward pass takes them."""
    return {
        "A": layer.vera_A[ADAPTER][:, : layer.in_features],
        "B": layer.vera_B[ADAPTER][: layer.out_features],
    }
