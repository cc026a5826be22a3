"""peft's optimizers for LoRA, as Operations: each makes a small model, and calls peft's `create_..._optimizer` for it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from harness.errors import Unsupported
from harness.methods.registry import DTYPES, implements

if TYPE_CHECKING:
    from torch import Tensor
_OPERATION: dict[str, Any] = {"name": "hf-peft", "kind": "operation", "dtypes": DTYPES, "requires": ["peft"]}
_PREFIX = "base_model.model"


@implements("lorafa_step", **_OPERATION)
def lorafa_step(
    As: Sequence[Tensor], Bs: Sequence[Tensor], gs: Sequence[Tensor | None], ms: Sequence[Tensor], vs: Sequence[Tensor],
    scalings: Sequence[float], *, other: Tensor, other_g: Tensor, other_m: Tensor, other_v: Tensor, role: str, experts: int,
    step: int, lr: float, weight_decay: float, betas: tuple[float, float], eps: float,
    correction: str, adamw: str, bias_correction: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Take one step of peft's LoRA-FA from the given moments.

    Return A, B, and B's moments m and v for the first layer, the same four for the second layer, and `other` and its
    moments. other: a further trained tensor of the first layer, such as its bias; `_two_layers` describes other, role
    and experts. The adapter has the dtype of the arguments, as with `autocast_adapter_dtype=False`. Raises Unsupported
    unless `correction` is `least-squares` and `adamw` is `transformers`.
    """
    from peft.optimizers import create_lorafa_optimizer

    if correction != "least-squares":
        raise Unsupported("peft always corrects the gradient")
    if adamw != "transformers":
        raise Unsupported("peft's optimizer has the AdamW of transformers")
    model = _two_layers(As, Bs, scalings, other, role, experts)
    rank = len(As[0]) // experts
    optimizer = create_lorafa_optimizer(model, rank, scalings[0] * rank, lr, weight_decay)
    optimizer.param_groups[0].update(betas=betas, eps=eps, correct_bias=bias_correction)
    tensors = _tensors(model, role)
    for path, m, v in zip(("0", "1"), ms, vs, strict=True):
        state = {"step": step - 1, "exp_avg_B": m.detach().clone(), "exp_avg_sq_B": v.detach().clone()}
        optimizer.state[f"{_PREFIX}.{path}.lora"] = state
    other_name = next(name for name, p in model.named_parameters() if p is tensors["other"])
    moments = {"exp_avg": other_m.detach().clone(), "exp_avg_sq": other_v.detach().clone()}
    optimizer.state[other_name] = {"step": step - 1, **moments}
    for name, gradient in (("B0", gs[0]), ("B1", gs[1]), ("other", other_g)):
        tensors[name].grad = None if gradient is None else gradient.clone()
    optimizer.step()
    found = [t.detach() for t in tensors.values()]
    layers = [optimizer.state[f"{_PREFIX}.{path}.lora"] for path in ("0", "1")]
    after = [(state["exp_avg_B"], state["exp_avg_sq_B"]) for state in layers]
    rest = optimizer.state[other_name]
    return (*found[:2], *after[0], *found[2:4], *after[1], found[4], rest["exp_avg"], rest["exp_avg_sq"])


@implements("riemannian_lora_step", **_OPERATION)
def riemannian_lora_step(
    As: Sequence[Tensor], Bs: Sequence[Tensor], gAs: Sequence[Tensor | None], gBs: Sequence[Tensor | None],
    mAs: Sequence[Tensor], vAs: Sequence[Tensor], mBs: Sequence[Tensor], vBs: Sequence[Tensor],
    *, other: Tensor, other_g: Tensor, other_m: Tensor, other_v: Tensor, role: str, experts: int,
    optimizer: str, delta: float, step: int, lr: float, weight_decay: float, betas: tuple[float, float], eps: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Take one step of peft's Riemannian LoRA from the given moments.

    Return A and B of the first layer, A and B of the second layer, and `other`, each followed by its moments m and v.
    other: a further trained tensor of the first layer, such as its bias; `_two_layers` describes other, role and
    experts. torch's AdamW or SGD takes the preconditioned gradients. The adapter has the dtype of the arguments.
    """
    import torch
    from peft.optimizers import create_riemannian_optimizer

    model = _two_layers(As, Bs, (1.0, 1.0), other, role, experts)
    kind: Any = torch.optim.AdamW if optimizer == "adamw" else torch.optim.SGD
    own = {"betas": betas, "eps": eps} if optimizer == "adamw" else {}
    made = create_riemannian_optimizer(model, kind, lr=lr, reg=delta, weight_decay=weight_decay, **own)
    tensors = _tensors(model, role)
    state_before: dict[str, tuple[Tensor | None, Tensor, Tensor]] = {"other": (other_g, other_m, other_v)}
    for n in (0, 1):
        state_before |= {f"A{n}": (gAs[n], mAs[n], vAs[n]), f"B{n}": (gBs[n], mBs[n], vBs[n])}
    for name, (g, m, v) in state_before.items():
        tensors[name].grad = None if g is None else g.clone()
        if optimizer == "adamw":
            count = torch.tensor(step - 1.0, dtype=torch.float32)
            made.state[tensors[name]] = {"step": count, "exp_avg": m.clone(), "exp_avg_sq": v.clone()}
    made.step()
    found: list[Tensor] = []
    for name, p in tensors.items():
        state = made.state[p] if optimizer == "adamw" else {}
        _, m, v = state_before[name]
        found += [p.detach(), state.get("exp_avg", m).clone(), state.get("exp_avg_sq", v).clone()]
    return tuple(found)


@implements("loraplus_groups", **_OPERATION)
def loraplus_groups(
    tensors: Mapping[str, Tensor], gradients: Mapping[str, Tensor], frozen: Collection[str], *, weight_decay: float,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return learning rates and weight decays of peft's LoRA+ (float64, one per tensor), and the tensors after one step.

    The tensors are flattened and concatenated. The weight decay is set by peft's keyword `loraplus_weight_decay`.
    """
    return _loraplus(tensors, gradients, loraplus_weight_decay=weight_decay, **options)


@implements("loraplus_groups", **_OPERATION | {"name": "hf-peft-keywords"})
def loraplus_groups_by_keywords(
    tensors: Mapping[str, Tensor], gradients: Mapping[str, Tensor], frozen: Collection[str], **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what `loraplus_groups` returns, but set the weight decay by the optimizer's own keyword `weight_decay`.

    According to peft's documentation, `create_loraplus_optimizer` passes all other keywords on to the optimizer.
    """
    return _loraplus(tensors, gradients, **options)


def _loraplus(
    tensors: Mapping[str, Tensor], gradients: Mapping[str, Tensor], *, lr: float, ratio: float, lr_embedding: float,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    import torch
    from peft.optimizers import create_loraplus_optimizer

    model = _model_of(tensors, gradients.keys())
    rates = {"lr": lr, "loraplus_lr_ratio": ratio, "loraplus_lr_embedding": lr_embedding}
    optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, **rates, **options)
    places = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    inside = {_plain_name(name): p for name, p in model.named_parameters() if "original_module" not in name}
    groups = [places.get(id(inside[name]), {"lr": 0.0, "weight_decay": 0.0}) for name in tensors]
    for name, gradient in gradients.items():
        inside[name].grad = gradient.clone()
    optimizer.step()
    device = next(iter(tensors.values())).device
    lrs, decays = (
        torch.tensor([group[key] for group in groups], dtype=torch.float64, device=device)
        for key in ("lr", "weight_decay")
    )
    return lrs, decays, torch.cat([inside[name].detach().flatten() for name in tensors])


def _plain_name(name: str) -> str:
    """Return the Operation's name of a parameter, for example `linear0.lora_A` for peft's
    `base_model.model.linear0.lora_A.default.weight`.
    """
    plain = name.removeprefix(f"{_PREFIX}.").replace(".default", "").replace(".modules_to_save", "")
    plain = plain.replace(".base_layer", "")
    return plain.removesuffix(".weight") if ".lora_" in plain else plain


def _model_of(tensors: Mapping[str, Tensor], trained: Collection[str]) -> Any:
    """Return a PeftModel with these parameters, of which those in `trained` train.

    tensors: name, as `_plain_name` returns it -> value of the parameter.
    """
    import torch
    from peft import LoraConfig, get_peft_model
    from torch import nn

    base = nn.Module()
    for name, tensor in tensors.items():
        layer, _, part = name.partition(".")
        if part == "weight":
            base.add_module(layer, _layer(layer, tensor, has_bias=f"{layer}.bias" in tensors))
    adapted = {name.partition(".")[0] for name in tensors if ".lora_" in name}
    config = LoraConfig(
        r=len(tensors["linear0.lora_A"]),
        target_modules=sorted(adapted),
        modules_to_save=["head"] if "head.weight" in tensors else None,
        use_dora="linear0.lora_magnitude_vector" in tensors,
        lora_bias="linear0.lora_B.bias" in tensors,
    )
    if config.lora_bias and "embed" in adapted:
        raise Unsupported("peft refuses lora_bias for an embedding")
    model: Any = get_peft_model(base, config, autocast_adapter_dtype=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            plain_name = _plain_name(name)
            if "original_module" not in name:
                parameter.copy_(tensors[plain_name])
                parameter.requires_grad_(plain_name in trained)
    return model


def _layer(name: str, weight: Tensor, *, has_bias: bool) -> Any:
    """Return a new layer for a weight: an embedding for the name `embed`, a norm for `...norm...`, else a linear layer."""
    from torch import nn

    how: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
    if name == "embed":
        return nn.Embedding(*weight.shape, **how)
    if "norm" in name:
        return (nn.LayerNorm if name == "layer_norm" else nn.RMSNorm)(weight.shape, **how)
    outputs, inputs = weight.shape
    return nn.Linear(inputs, outputs, bias=has_bias, **how)


def _two_layers(
    As: Sequence[Tensor], Bs: Sequence[Tensor], scalings: Sequence[float], other: Tensor, role: str, experts: int
) -> Any:
    """Return a PeftModel of two linear layers with these adapters, each with its own rank and scaling.

    other: a trainable tensor of the first layer besides A and B. role: what `other` is: the layer's `bias`, the bias of
    B (`lora-bias`) or DoRA's `magnitude`. experts: number of experts; above 1, each layer has a stack of their weights.
    Raises Unsupported for such stacks if `role` is not `bias`.
    """
    import torch
    from peft import LoraConfig, get_peft_model
    from torch import nn

    stacked = experts > 1
    if stacked and role != "bias":
        raise Unsupported("peft's stacked experts have neither lora_bias nor DoRA")
    how: dict[str, Any] = {"device": other.device, "dtype": other.dtype}
    base = nn.Sequential()
    for n, (A, B) in enumerate(zip(As, Bs, strict=True)):
        has_bias = role == "lora-bias" or (role == "bias" and n == 0)
        base.append(nn.Linear(A.shape[1], len(B), bias=has_bias, **how))
        if stacked:
            base[n].weight = nn.Parameter(torch.zeros(experts, len(B), A.shape[1], **how))
    ranks = {str(n): len(A) // experts for n, A in enumerate(As)}
    alphas = {name: s * rank for (name, rank), s in zip(ranks.items(), scalings, strict=True)}
    config = LoraConfig(
        r=ranks["0"],
        lora_alpha=alphas["0"],
        rank_pattern=ranks,
        alpha_pattern=alphas,
        target_modules=[] if stacked else list(ranks),
        target_parameters=[f"{name}.weight" for name in ranks] if stacked else None,
        bias="lora_only" if role == "bias" else "none",
        use_dora=role == "magnitude",
        lora_bias=role == "lora-bias",
    )
    model: Any = get_peft_model(base, config, autocast_adapter_dtype=False)
    for name, parameter in _tensors(model, role).items():
        values = {"A": As, "B": Bs}.get(name[0])
        parameter.data = (other if values is None else values[int(name[1])]).clone()
    return model


def _tensors(model: Any, role: str) -> dict[str, Tensor]:
    """Map A0, B0, A1, B1 and `other` to the trainable tensors of a model that `_two_layers` has made."""
    layers = model.base_model.model
    found = {f"{letter}{n}": getattr(layers[n], f"lora_{letter}")["default"].weight for n in (0, 1) for letter in "AB"}
    first = layers[0]
    if role == "bias":
        return {**found, "other": first.base_layer.bias}
    if role == "lora-bias":
        return {**found, "other": first.lora_B["default"].bias}
    return {**found, "other": first.lora_magnitude_vector["default"].weight}
