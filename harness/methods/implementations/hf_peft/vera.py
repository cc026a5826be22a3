"""peft's VeRA."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from harness.methods.implementations.hf_peft.adapted import (
    ADAPTER,
    PeftAdapted,
    attach_after_wider_adapter,
    has_conv1d,
    tuner,
)
from harness.methods.registry import DTYPES, implements

if TYPE_CHECKING:
    from torch import Generator, Tensor, nn

    from reference.vera import Config


@implements("vera", name="hf-peft", dtypes=DTYPES, requires=["peft"])
def vera(model: nn.Module, config: Config, generator: Generator) -> PeftAdapted:
    """Attach peft's VeRA to linear layers and Conv1D."""
    tuner(model, _config(model, config), generator)
    return PeftAdapted(model, _vectors, _projections)


@implements("vera", name="hf-peft-second", dtypes=["float32"], requires=["peft"])
def second_vera(model: nn.Module, config: Config, generator: Generator) -> PeftAdapted:
    """Attach peft's VeRA to a model that already has a VeRA adapter of twice the rank.

    peft refuses the second adapter if the first has a smaller rank.
    """
    attach_after_wider_adapter(model, _config(model, config), generator)
    return PeftAdapted(model, _vectors, _projections)


def _config(model: nn.Module, config: Config) -> Any:
    """Return peft's VeraConfig. Raises ValueError if a target is neither a linear layer nor a Conv1D."""
    from peft import VeraConfig

    from reference.shared.layers import LINEAR_OR_CONV1D, targets

    found = targets(model, config.targets, LINEAR_OR_CONV1D)
    return VeraConfig(
        r=config.rank,
        vera_dropout=config.dropout,
        target_modules=list(found),
        fan_in_fan_out=has_conv1d(found),
        projection_prng_key=config.projection_key,
        d_initial=config.d_initial,
    )


def _vectors(layer: Any) -> dict[str, Tensor]:
    return {"b": layer.vera_lambda_b[ADAPTER], "d": layer.vera_lambda_d[ADAPTER]}


def _projections(layer: Any) -> dict[str, Tensor]:
    """Return a layer's slices A and B of the shared projections, as peft's forward pass takes them."""
    return {
        "A": layer.vera_A[ADAPTER][:, : layer.in_features],
        "B": layer.vera_B[ADAPTER][: layer.out_features],
    }
