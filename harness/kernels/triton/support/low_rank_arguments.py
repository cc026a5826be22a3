"""What the layers with an adapter are given, looked at before a kernel reads past its end, and laid out as matrices."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def checked(
    x: Tensor, weight: Tensor | Sequence[int], A: Tensor, B: Tensor, mask: Tensor | None, **vectors: Tensor | None
) -> None:
    """Raise ValueError unless x, mask (..., D), weight (E, D), A (R, D), B (E, R) fit and are of one dtype.

    weight: or its shape, if it is packed. vectors: each (E,) but `d`, which is (R,); None is left alone. Raises it also if
    the weight or the bias requires a gradient, which nobody would give it.
    """
    (E, D), R = weight.shape if isinstance(weight, Tensor) else weight, len(A)
    expected: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
        "x": (x, (*x.shape[:-1], D)), "A": (A, (R, D)), "B": (B, (E, R)), "mask": (mask, tuple(x.shape)),
        **{name: (one, (R,) if name == "d" else (E,)) for name, one in vectors.items()},
    }  # fmt: skip
    frozen = {"bias": vectors.get("bias")}
    if isinstance(weight, Tensor):
        expected["weight"], frozen["weight"] = (weight, (E, D)), weight
    for name, (one, shape) in expected.items():
        if one is not None and tuple(one.shape) != shape:
            raise ValueError(f"{name} should be {shape} beside a weight ({E}, {D}); got {tuple(one.shape)}")
        if one is not None and one.dtype != x.dtype:
            raise ValueError(f"{name} should be {x.dtype}, as x is; got {one.dtype}")
    for name, one in frozen.items():
        if one is not None and one.requires_grad:
            raise ValueError(f"the {name} of the layer is frozen here and would get no gradient")


def matrix(x: Tensor) -> Tensor:
    """Return (..., D) as (tokens, D)."""
    return x.reshape(-1, x.shape[-1])


def contiguous(vector: Tensor | None) -> Tensor | None:
    """Return the vector with its elements side by side."""
    return None if vector is None else vector.contiguous()
