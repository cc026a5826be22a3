"""Check the arguments of adapted layers, so that no kernel reads out of bounds, and reshape them to matrices."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def checked(
    x: Tensor, weight: Tensor | Sequence[int], A: Tensor, B: Tensor, mask: Tensor | None, **vectors: Tensor | None
) -> None:
    """Raise ValueError unless the arguments of a layer have matching shapes and one dtype.

    Shapes: x and mask (..., D), weight (E, D), A (R, D), B (E, R). weight: a tensor, or the shape of a packed weight.
    vectors: each None or of shape (E,), except that `d` has shape (R,). Also raises ValueError if the weight or the
    bias requires a gradient, because these kernels compute no gradient of them.
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
            raise ValueError(f"{name} must be {shape} for a weight ({E}, {D}), got {tuple(one.shape)}")
        if one is not None and one.dtype != x.dtype:
            raise ValueError(f"{name} must be {x.dtype} like x, got {one.dtype}")
    for name, one in frozen.items():
        if one is not None and one.requires_grad:
            raise ValueError(f"{name} requires a gradient, but this kernel computes none for it")


def matrix(x: Tensor | None) -> Tensor | None:
    """Return x (..., D) as a matrix (tokens, D). Return None for None."""
    return None if x is None else x.reshape(-1, x.shape[-1])


def contiguous(vector: Tensor | None) -> Tensor | None:
    """Return the vector in contiguous memory. Return None for None."""
    return None if vector is None else vector.contiguous()
