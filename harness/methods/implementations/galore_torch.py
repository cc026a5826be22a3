"""`galore-torch`: GaLore by the package of its authors."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from harness.errors import Unsupported
from harness.methods.registry import DTYPES, Implementation, implementations_in, implements

if TYPE_CHECKING:
    from torch import Generator, Tensor, nn

    from harness.methods.spec import Adapted
    from reference.galore import Config

_NO_PAPER_SIDE = "galore-torch has no rule that projects a square matrix on the left"


@implements("galore", name="galore-torch", dtypes=DTYPES, requires=["galore_torch"])
def galore(model: nn.Module, config: Config, generator: Generator) -> Adapted:
    """Return a model whose optimizer is GaLoreAdamW, or GaLoreAdamW8bit for 8-bit moments.

    The reference selects the layers and parameters. Raises Unsupported for side=paper and for niter > 0, because the
    package has neither.
    """
    from reference.galore import GaLoreModel, attach

    if config.side == "paper":
        raise Unsupported(_NO_PAPER_SIDE)
    if config.niter:
        raise Unsupported(f"galore-torch has no randomised SVD (niter={config.niter}), only the exact one")

    class ByGaloreTorch(GaLoreModel):
        def optimizer(self, lr: float, weight_decay: float, bits: int = 32) -> Any:
            """Return GaLoreAdamW, or GaLoreAdamW8bit for 8 bits.

            The parameter groups are those of the package's README.
            """
            c = self.config
            projected = {id(layer.weight): layer.weight for layer in self.layers.values()}
            rest = [p for p in self.parameters() if id(p) not in projected]
            projection = {"rank": c.rank, "update_proj_gap": c.update_gap, "scale": c.scale, "proj_type": c.side}
            groups: list[dict[str, Any]] = [{"params": list(projected.values()), **projection}]
            groups += [{"params": rest}] if rest else []
            options: dict[str, Any] = {
                "lr": lr,
                "betas": (c.beta1, c.beta2),
                "eps": c.eps,
                "weight_decay": weight_decay,
            }
            if bits == 8:
                return _in_8_bits([{**group, "bits": bits} for group in groups], **options)
            from galore_torch import GaLoreAdamW

            return GaLoreAdamW(groups, no_deprecation_warning=True, **options)

    adapted = attach(model, config, generator)
    return ByGaloreTorch(adapted.model, adapted.layers, adapted.config)


@implements("galore_step", name="galore-torch", kind="operation", dtypes=DTYPES, requires=["galore_torch"])
def galore_step(M: Tensor, V: Tensor, step: int, **arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Take one step of GaLoreAdamW from a given projector and given moments. Return W, M and V.

    W is the new weight, and M and V are its new moments. arguments: those of `_optimizer`: W, G, P, Q, side, scale and
    options.
    """
    from galore_torch import GaLoreAdamW

    _refuse_first_step(step)
    p, optimizer, state = _optimizer(GaLoreAdamW, no_deprecation_warning=True, **arguments)
    state |= {"step": step - 1, "exp_avg": M.clone(), "exp_avg_sq": V.clone()}
    optimizer.step()
    return p.detach(), state["exp_avg"], state["exp_avg_sq"]


@implements(
    "galore_step", name="galore-torch-8bit", kind="operation", requires=["galore_torch", "bitsandbytes"]
)  # fmt: skip
def galore_step_8bit(M: Tensor, V: Tensor, step: int, **arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Take one step of GaLoreAdamW8bit with moments of fewer than 4096 elements. Return W, M and V.

    GaLoreAdamW8bit stores such small moments in float32. W is the new weight. M and V are its new moments, in the dtypes
    of the arguments M and V. Raises Unsupported for larger moments, which GaLoreAdamW8bit stores in 8 bits.
    """
    import torch
    from galore_torch import GaLoreAdamW8bit

    _refuse_first_step(step)
    if M.numel() >= 4096:
        raise Unsupported("GaLoreAdamW8bit has float32 moments below 4096 elements only")
    p, optimizer, state = _optimizer(GaLoreAdamW8bit, **arguments)
    weight, p.data = p.data, torch.zeros_like(M)  # the optimizer's step does the same for a new state
    optimizer.init_state(optimizer.param_groups[0], p, 0, 0)
    p.data = weight
    state["step"] = step - 1
    state["state1"].copy_(M)
    state["state2"].copy_(V)
    with _without_cuda():
        optimizer.step()
    return p.detach(), state["state1"].to(M.dtype), state["state2"].to(V.dtype)


def _refuse_first_step(step: int) -> None:
    """Raise Unsupported for step 1, in which galore-torch computes a projector of its own."""
    if step == 1:
        raise Unsupported("galore-torch takes no given projector in step 1")


_patching = threading.Lock()


@contextmanager
def _without_cuda() -> Iterator[None]:
    """Let `torch.cuda.synchronize` do nothing inside the `with` block if there is no CUDA.

    GaLoreAdamW8bit calls this function, which would otherwise raise an error. Only one thread is in a block at a time,
    because the end of a block restores the function for all threads.
    """
    import torch

    if torch.cuda.is_available():
        yield
    else:
        with _patching, patch("torch.cuda.synchronize"):
            yield


def _in_8_bits(groups: list[dict[str, Any]], **options: Any) -> Any:
    """Return a GaLoreAdamW8bit that can also step without CUDA."""
    from galore_torch import GaLoreAdamW8bit

    class AnywhereGaLoreAdamW8bit(GaLoreAdamW8bit):  # type: ignore[misc]  # the package has no types
        def step(self, closure: Callable[[], float] | None = None) -> Any:
            """Take a step. Without CUDA, skip the call that synchronises CUDA, because it would raise."""
            with _without_cuda():
                return super().step(closure)

    return AnywhereGaLoreAdamW8bit(groups, **options)


def _optimizer(
    kind: Any, W: Tensor, G: Tensor, P: Tensor | None, Q: Tensor | None, side: str, scale: float, **options: Any
) -> tuple[Any, Any, dict[str, Any]]:
    """Return a parameter with a gradient, its optimizer, and its state in the optimizer.

    The state has a projector with the bases P and Q. This projector is not due for a refresh. options: options of the
    optimizer, such as lr. Raises Unsupported for side=paper.
    """
    if side == "paper":
        raise Unsupported(_NO_PAPER_SIDE)
    import torch
    from galore_torch.galore_projector import GaLoreProjector

    p = torch.nn.Parameter(W.clone())
    p.grad = G.clone()
    rank = min(t.shape[1] for t in (P, Q) if t is not None)
    projection = {"update_proj_gap": 1_000_000, "scale": scale, "proj_type": side}
    projector = GaLoreProjector(rank, **projection)
    # The projector stores P, or the transpose of Q; for `full`, a list of both.
    bases = [*([P] if P is not None else []), *([Q.T.contiguous()] if Q is not None else [])]
    projector.ortho_matrix = bases if side == "full" else bases[0]
    optimizer = kind([{"params": [p], "rank": rank, **projection}], **options)
    optimizer.state[p]["projector"] = projector
    return p, optimizer, optimizer.state[p]


def implementations() -> list[Implementation]:
    """Return the Implementations of this file."""
    return implementations_in(__name__)
