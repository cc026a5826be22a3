"""Selection of the layers that `targets` names."""

from collections.abc import Iterable

from torch import nn

from plain_torch.layers import Layers, kind_of

LINEAR = ("linear", "Conv1D")


def _in_attention(model: nn.Module, path: str) -> bool:
    """Tell whether a module above `path` has a class named `...Attention`."""
    parts = path.split(".")
    above = (model.get_submodule(".".join(parts[:count])) for count in range(len(parts)))
    return any(type(module).__name__.endswith("Attention") for module in above)


def _in_trunk(model: nn.Module, path: str) -> bool:
    """Tell whether `path` lies in the trunk of the model, and is not the layer that computes logits."""
    prefix = getattr(model, "base_model_prefix", "")
    if prefix and hasattr(model, prefix) and not path.startswith(f"{prefix}."):
        return False
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return model.get_submodule(path) is not output


def _selects(model: nn.Module, target: str, path: str, kind: str) -> bool:
    """Tell whether one word of `targets` selects the layer at `path`."""
    if target == "attention":
        return kind in LINEAR and _in_attention(model, path)
    if target == "all-linear":
        return kind in LINEAR and _in_trunk(model, path)
    if target == "experts" and kind == "experts":
        return True
    return path == target or path.endswith(f".{target}")


def select(model: nn.Module, targets: Iterable[str], kinds: Iterable[str]) -> Layers:
    """Return the targets by path, in the order of the model. Raise ValueError if a name selects none, or another kind."""
    known = {path: module for path, module in model.named_modules() if path and kind_of(module)}
    chosen = set()
    for target in targets:
        found = [path for path, module in known.items() if _selects(model, target, path, kind_of(module))]
        if not found:
            raise ValueError(f"target {target!r} names no layer")
        for path in found:
            if kind_of(known[path]) not in kinds:
                raise ValueError(f"target {target!r} names {path}, a {kind_of(known[path])}: not adapted here")
        chosen.update(found)
    return {path: module for path, module in known.items() if path in chosen}
