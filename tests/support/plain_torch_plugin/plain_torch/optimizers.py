"""Steps of optimizers: AdamW, LAMB and Lion with 8-bit moments, LoRA's own optimizers, and paged AdamW."""

from typing import Any

import torch
from torch import Tensor

from plain_torch.adalora import averaged, triplet_scores
from plain_torch.blockwise import decode_dynamic, encode_dynamic
from plain_torch.layers import wide

BLOCK, PAGED = 256, 100_000
Tensors = list[Tensor]
Betas = tuple[float, float]


def new_moments(g: Tensor, m: Tensor, v: Tensor, betas: Betas) -> tuple[Tensor, Tensor]:
    """Return Adam's moments after a step."""
    return betas[0] * m + (1 - betas[0]) * g, betas[1] * v + (1 - betas[1]) * g**2


def direction(m: Tensor, v: Tensor, step: int, betas: Betas, eps: float) -> Tensor:
    """Return Adam's direction with bias correction."""
    return (m / (1 - betas[0] ** step)) / ((v / (1 - betas[1] ** step)).sqrt() + eps)


def adamw(
    p: Tensor, g: Tensor, m: Tensor, v: Tensor, *, step: int, lr: float, betas: Betas, eps: float, weight_decay: float,
    form: str = "torch", bias_correction: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return p, m and v after a step of AdamW in the form of torch or of old transformers, in at least float32."""
    p, g, m, v = (tensor.to(wide(p.dtype)) for tensor in (p, g, m, v))
    m, v = new_moments(g, m, v, betas)
    c1, c2 = (1 - betas[0] ** step, 1 - betas[1] ** step) if bias_correction else (1.0, 1.0)
    if form == "torch":
        return p * (1 - lr * weight_decay) - lr * (m / c1) / ((v / c2).sqrt() + eps), m, v
    return (p - lr * c2**0.5 / c1 * m / (v.sqrt() + eps)) * (1 - lr * weight_decay), m, v


adamw_form = adamw  # for LoRA-FA, which has an argument of the name `adamw`


def rounded(new: tuple[Tensor, ...], old: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return new tensors in the dtypes of old ones."""
    return tuple(tensor.to(like.dtype, copy=True) for tensor, like in zip(new, old, strict=True))


def decoded_moments(m: Tensor, m_absmax: Tensor, v: Tensor, v_absmax: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return both moments in the shape of the parameter."""
    moments = (decode_dynamic(m, m_absmax, True, BLOCK), decode_dynamic(v, v_absmax, False, BLOCK))
    first, second = (moment.to(wide(like.dtype)).reshape(like.shape) for moment in moments)
    return first, second


def encoded_moments(m: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return codes and absmax of both moments."""
    return *encode_dynamic(m.flatten(), True, BLOCK), *encode_dynamic(v.flatten(), False, BLOCK)


@torch.no_grad()
def adamw8bit_step(
    p: Tensor, g: Tensor, m: Tensor, v: Tensor, m_absmax: Tensor, v_absmax: Tensor, **how: Any
) -> tuple[Tensor, ...]:
    """Return p and the 8-bit moments after a step of AdamW."""
    new, m, v = adamw(p, g, *decoded_moments(m, m_absmax, v, v_absmax, p), **how)
    return new.to(p.dtype), *encoded_moments(m, v)


@torch.no_grad()
def lamb8bit_step(
    p: Tensor, g: Tensor, m: Tensor, v: Tensor, m_absmax: Tensor, v_absmax: Tensor,
    step: int, lr: float, betas: Betas, eps: float, weight_decay: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Return p and the 8-bit moments after a step of LAMB."""
    dtype = wide(p.dtype)
    m, v = new_moments(g.to(dtype), *decoded_moments(m, m_absmax, v, v_absmax, p), betas)
    x = p.to(dtype)
    u = direction(m, v, step, betas, eps) + weight_decay * x
    size, change = x.norm(), u.norm()
    trust = 1.0 if size == 0 or change == 0 else size / change
    return (x - lr * trust * u).to(p.dtype), *encoded_moments(m, v)


@torch.no_grad()
def lion8bit_step(
    p: Tensor, g: Tensor, m: Tensor, m_absmax: Tensor, lr: float, betas: Betas, weight_decay: float
) -> tuple[Tensor, ...]:
    """Return p and the 8-bit moment after a step of Lion."""
    dtype = wide(p.dtype)
    old, x, g = decode_dynamic(m, m_absmax, True, BLOCK).to(dtype).reshape(p.shape), p.to(dtype), g.to(dtype)
    sign = (betas[0] * old + (1 - betas[0]) * g).sign()
    moved = (1 - lr * weight_decay) * x - lr * sign
    return moved.to(p.dtype), *encode_dynamic((betas[1] * old + (1 - betas[1]) * g).flatten(), True, BLOCK)


def by_expert(A: Tensor, B: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Return packed A as (K, R, D) and packed B as (K, E, R), in at least float32."""
    dtype = wide(A.dtype)
    return A.to(dtype).reshape(experts, -1, A.shape[1]), B.to(dtype).reshape(len(B), -1, experts).permute(2, 0, 1)


def packed_again(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Return the inverse of `by_expert`."""
    return A.reshape(-1, A.shape[2]), B.permute(1, 2, 0).reshape(B.shape[1], -1)


def least_squares(g: Tensor, A: Tensor, scaling: float, experts: int) -> Tensor:
    """Return g (A A^T + 1e-8 I)^+ / scaling^2, for every expert by itself."""
    As, gs = by_expert(A, g, experts)
    gram = As @ As.transpose(1, 2) + 1e-8 * torch.eye(As.shape[1], dtype=As.dtype, device=As.device)
    corrected = gs @ torch.linalg.pinv(gram) / scaling**2 if gram.isfinite().all() else gs * torch.nan
    return packed_again(As, corrected)[1]


@torch.no_grad()
def lorafa_step(
    As: Tensors, Bs: Tensors, gs: list[Tensor | None], ms: Tensors, vs: Tensors, scalings: list[float],
    other: Tensor, other_g: Tensor, other_m: Tensor, other_v: Tensor, role: str, experts: int, correction: str,
    adamw: str, **how: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Return A, B and B's moments of each layer after a step of LoRA-FA, then another tensor after a plain step."""
    results: Tensors = []
    for A, B, g, m, v, scaling in zip(As, Bs, gs, ms, vs, scalings, strict=True):
        old = (B, m, v)
        if g is None:
            results += [A.clone(), *(tensor.clone() for tensor in old)]
            continue
        d = least_squares(g, A, scaling, experts) if correction == "least-squares" else g
        results += [A.clone(), *rounded(adamw_form(B, d, m, v, form=adamw, **how), old)]
    old = (other, other_m, other_v)
    return *results, *rounded(adamw_form(other, other_g, other_m, other_v, form=adamw, **how), old)


@torch.no_grad()
def riemannian_lora_step(
    As: Tensors, Bs: Tensors, gAs: list[Any], gBs: list[Any], mAs: Tensors, vAs: Tensors, mBs: Tensors, vBs: Tensors,
    other: Tensor, other_g: Tensor, other_m: Tensor, other_v: Tensor, role: str, experts: int, optimizer: str,
    delta: float, **how: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Return A, B and their moments after a preconditioned step, then another tensor after a plain step."""

    def stepped(p: Tensor, g: Tensor | None, m: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        if g is None:
            return p.clone(), m.clone(), v.clone()
        if optimizer == "adamw":
            return rounded(adamw(p, g, m, v, **how), (p, m, v))
        x = p.to(wide(p.dtype))
        moved = x * (1 - how["lr"] * how["weight_decay"]) - how["lr"] * g.to(x.dtype)
        return moved.to(p.dtype), m.clone(), v.clone()

    results: Tensors = []
    for A, B, gA, gB, mA, vA, mB, vB in zip(As, Bs, gAs, gBs, mAs, vAs, mBs, vBs, strict=True):
        if gA is not None and gB is not None:
            gA, gB = preconditioned(gA, gB, A, B, delta, experts)
        results += [*stepped(A, gA, mA, vA), *stepped(B, gB, mB, vB)]
    return *results, *stepped(other, other_g, other_m, other_v)


def preconditioned(gA: Tensor, gB: Tensor, A: Tensor, B: Tensor, delta: float, experts: int) -> tuple[Tensor, Tensor]:
    """Return (B^T B + delta I)^-1 gA and gB (A A^T + delta I)^-1, for every expert by itself."""
    As, Bs = by_expert(A, B, experts)
    left, right = by_expert(gA, gB, experts)
    small = delta * torch.eye(As.shape[1], dtype=As.dtype, device=As.device)
    left = torch.linalg.solve(Bs.transpose(1, 2) @ Bs + small, left)
    right = torch.linalg.solve(As @ As.transpose(1, 2) + small, right, left=False)
    return packed_again(left, right)


def group_of(
    name: str, tensor: Tensor, lr: float, ratio: float, lr_embedding: float, weight_decay: float
) -> tuple[float, float]:
    """Return the learning rate and the weight decay of a trainable tensor in LoRA+."""
    layer, _, last = name.rpartition(".")
    if "lora_embedding_" in last:
        return lr_embedding, weight_decay
    if tensor.dim() < 2:
        decays = last != "bias" and "norm" not in layer
        return lr * ratio, weight_decay if decays else 0.0
    return (lr * ratio if last == "lora_B" else lr), weight_decay


@torch.no_grad()
def loraplus_groups(
    tensors: dict[str, Tensor],
    gradients: dict[str, Tensor],
    frozen: list[str],
    betas: Betas,
    eps: float,
    **rates: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the learning rates, the weight decays, and all tensors after the first step of AdamW with them."""
    groups, after = [], []
    for name, p in tensors.items():
        lr, decay = (0.0, 0.0) if name in frozen else group_of(name, p, **rates)
        if name not in frozen:
            zero = torch.zeros_like(p)
            old, g = p, gradients[name]
            p = adamw(p, g, zero, zero, step=1, lr=lr, betas=betas, eps=eps, weight_decay=decay)[0].to(old.dtype)
        groups.append((lr, decay))
        after.append(p.flatten())
    table = torch.tensor(groups, dtype=torch.float64, device=after[0].device)
    return table[:, 0].clone(), table[:, 1].clone(), torch.cat(after)


@torch.no_grad()
def paged_adamw(params: Tensors, grads: list[Tensors], **how: Any) -> tuple[Tensor, ...]:
    """Return the parameters after some steps of AdamW. Between two steps, large moments are on the host."""
    values = [p.clone() for p in params]
    states = [(torch.zeros_like(p, dtype=wide(p.dtype)),) * 2 for p in params]
    for number, gradients in enumerate(grads, start=1):
        for index, g in enumerate(gradients):
            p = values[index]
            m, v = (moment.to(p.device) for moment in states[index])
            new, m, v = adamw(p, g, m, v, step=number, **how)
            home = torch.device("cpu") if p.numel() >= PAGED else p.device
            values[index], states[index] = new.to(p.dtype), (m.to(home), v.to(home))
    return tuple(values)


@torch.no_grad()
def paged_states(params: Tensors, grads: Tensors) -> Tensor:
    """Return 1 for every parameter whose states are paged, and 0 for the others."""
    return torch.tensor([float(p.numel() >= PAGED) for p in params], dtype=torch.float32, device=params[0].device)


@torch.no_grad()
def adalora_importance(beta1: float, beta2: float, **given: Tensor) -> tuple[Tensor, ...]:
    """Return the averages of A, E and B after a step of AdaLoRA, and the scores of the triplets."""
    results, scores = [], {}
    for x in "AEB":
        ipt, unc = averaged(given[x], given[f"grad_{x}"], given[f"I_{x}"], given[f"U_{x}"], beta1, beta2)
        results += [ipt, unc]
        scores[x] = ipt * unc
    return *results, triplet_scores(scores)
