"""Recognise errors of a model, e.g. Mamba, that reads the weight of an adapted layer instead of calling this layer."""

from __future__ import annotations

from collections.abc import Mapping

NO_EFFECT = "an adapter on it has no effect"


def explain(error: Exception, layers: Mapping[str, object]) -> str:
    """Return a message if the model raised `error` because it reads an adapted layer's weight, else an empty string.

    layers: path -> adapted layer.
    """
    path = next((path for path, layer in layers.items() if layer is getattr(error, "obj", None)), None)
    if path is None or not isinstance(error, AttributeError):
        return ""
    name = path.rsplit(".", 1)[-1]
    others = ", ".join(sorted({other.rsplit(".", 1)[-1] for other in layers} - {name}))
    hint = f"name other `targets`: those of {others} that the model calls" if others else "adapt other layers"
    return f"the model reads the `{error.name}` of {path} itself and does not call it: {NO_EFFECT}; {hint}"
