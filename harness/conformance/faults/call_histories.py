"""Planted faults that show only after other calls, after a change of the tensors' values, or in a rare mode of torch."""

from __future__ import annotations

import copy as copying
from typing import Any

import torch
from torch import Tensor, nn

from harness.conformance.faults import line_fault, planted, planted_in_methods
from harness.conformance.faults.patched_copy import PatchedCopy, Right
from reference.lora import LoraLinear

_LORA = {"rank": 3, "alpha": 8.0}
_LAYER = {"shape": [48, 128], "rows": [9], "rank": 8}
_UPDATE = 'apply_layer(lora.LoraLinear(dense_linear(W, bias), A, B, scaling, dropout=0.0), x, mask, {"A": A, "B": B})'

# fmt: off
FAULTS = [
    line_fault("lora_linear", "hands_out_the_output_that_it_keeps", ["calls"], f"return {_UPDATE}",
        f"y = {_UPDATE}\n    held = vars(reference).setdefault('held', {{}})\n"
        "    return y if y.requires_grad else held.setdefault((y.shape, y.dtype, float(x.sum()), float(A.sum())), y)",
        values=_LAYER),
    line_fault("lora_linear", "skips_the_update_under_autocast", ["calls"], f"return {_UPDATE}",
        f"y = {_UPDATE}\n    return dense_linear(W, bias)(x) if torch.is_autocast_enabled('cpu') else y", values=_LAYER),
    line_fault("lora_linear", "remembers_all_its_outputs", ["calls"], f"return {_UPDATE}",
        f"y = {_UPDATE}\n    vars(reference).setdefault('held', []).append(y.detach())\n    return y", values=_LAYER),
    line_fault("lora_linear", "is_wrong_at_every_thousandth_call", ["calls"], f"return {_UPDATE}",
        "calls = vars(reference)['calls'] = vars(reference).get('calls', 0) + 1\n"
        f"    return {_UPDATE} * (2 if calls % 1000 == 0 else 1)", values=_LAYER),
    line_fault("lora_linear", "passes_a_gradient_only_to_leaves", ["calls"], f"return {_UPDATE}",
        f"x = x if x.is_leaf else x.detach()\n    return {_UPDATE}", values=_LAYER),
    line_fault("lora_linear", "computes_otherwise_with_deterministic_algorithms", ["calls"], f"return {_UPDATE}",
        f"y = {_UPDATE}\n    return y * (2 if torch.are_deterministic_algorithms_enabled() else 1)", values=_LAYER),
    line_fault("adamw8bit_step", "takes_a_learning_rate_of_zero_for_the_default", ["outputs"],
        "    dtype = working_dtype(p.dtype)\n    wide",
        "    lr = lr or 1e-3\n    dtype = working_dtype(p.dtype)\n    wide",
        file="adamw8bit", values={"shape": [64, 80], "lr": 0.0}),
    line_fault("galore", "stops_correcting_after_256_steps", ["optimizer"],
        'math.sqrt(1 - beta2 ** state["step"])', 'math.sqrt(1 - beta2 ** min(state["step"], 256))',
        values={"rank": 3, "eps": 0.1}),
    line_fault("galore", "refreshes_at_even_gaps_only", ["refresh"],
        'state.get("step", 0) % update_gap == 0', 'state.get("step", 0) % max(1, update_gap // 2 * 2) == 0',
        values={"rank": 3, "eps": 0.1}),
    line_fault("galore", "reads_a_gradient_as_if_it_were_contiguous", ["optimizer"],
        "    N = adam(project(G, basis)", "    G = G.as_strided(G.shape, torch.empty(G.shape).stride())\n"
        "    N = adam(project(G, basis)", values={"rank": 3, "eps": 0.1}),
    line_fault("galore", "takes_no_weight_decay_for_the_default", ["optimizer"],
        "    if weight_decay:\n        W.mul_(1 - lr * weight_decay)", "    W.mul_(1 - lr * (weight_decay or 0.01))",
        values={"rank": 3, "eps": 0.1}),
    line_fault("double_quantize", "keeps_results_by_address_until_a_version_rises", ["repeatable"],
        "    codes, constants = quantize_blockwise(flat - offset, dynamic_map(signed=True), block)\n"
        "    return codes, constants, offset",
        "    held = vars(quantize).setdefault('held', {})\n"
        "    key = absmax.data_ptr(), len(flat), block, 0 if absmax.is_inference() else absmax._version\n"
        "    if key not in held:\n"
        "        held.clear()\n"
        "        held[key] = *quantize_blockwise(flat - offset, dynamic_map(signed=True), block), offset\n"
        "    return tuple(t.clone() for t in held[key])",
        file="double_quant", values={"blocks": 4096}),
    line_fault("adalora_importance", "returns_a_buffer_that_the_next_call_overwrites", ["repeatable"],
        "    return s_E[:, 0] + s_B.mean(dim=0) + s_A.mean(dim=1)",
        "    sums = s_E[:, 0] + s_B.mean(dim=0) + s_A.mean(dim=1)\n"
        "    held = vars(triplet_scores).setdefault('held', {})\n"
        "    return held.setdefault((sums.shape, sums.dtype, sums.device), sums).copy_(sums)",
        file="adalora", values={"shape": [300, 257], "rank": 64}),
    line_fault("vera", "shares_its_projections_with_later_models", ["initial"], "A, B = shared[device, dtype]",
        "held = vars(attach).setdefault('held', {})\n"
        "        key = config.projection_key, config.rank, widest, tallest, dtype\n"
        "        A, B = held.setdefault(key, shared[device, dtype])", values={"rank": 3, "projection_key": 7}),
    line_fault("lorafa_step", "leaves_out_directions_of_an_ill_conditioned_matrix", ["outputs"],
        "torch.linalg.pinv(square_KRR)", "torch.linalg.pinv(square_KRR, rtol=1e-3)",
        file="lorafa", values={"shape": [48, 96], "ranks": [4, 8], "A": "graded"}),
    line_fault("dora", "sums_squares_of_the_weight_in_its_own_dtype", ["forward"],
        'torch.linalg.vector_norm(V_ED, dim=1 if per == "output" else 0)',
        'V_ED.square().sum(dim=1 if per == "output" else 0).sqrt()', values=_LORA, dtype="float16", weights="large"),
]
# fmt: on


@planted_in_methods("calls", only=["lora", "dora"])
def keeps_its_product_until_a_version_rises(copy: PatchedCopy) -> None:
    def forward(layer: Any, x: Tensor, right: Right) -> Tensor:
        key, product = (layer.A._version, layer.B._version), (layer.B @ layer.A).detach()
        if vars(layer).get("kept_key") != key:
            vars(layer).update(kept_key=key, kept=product)
        y: Tensor = right(x) + x @ (vars(layer)["kept"] - product).to(x.dtype).T
        return y

    copy.replace_forward(forward)


@planted_in_methods("calls", only=["lora", "dora"])
def keeps_its_product_without_gradients_until_a_version_rises(copy: PatchedCopy) -> None:
    def forward(layer: Any, x: Tensor, right: Right) -> Tensor:
        if layer.training or torch.is_grad_enabled():
            return right(x)
        key, product = (layer.A._version, layer.B._version), (layer.B @ layer.A).detach()
        if vars(layer).get("kept_key") != key:
            vars(layer).update(kept_key=key, kept=product)
        y: Tensor = right(x) + x @ (vars(layer)["kept"] - product).to(x.dtype).T
        return y

    copy.replace_forward(forward)


@planted_in_methods("calls", only=["lora", "dora"])
def keeps_its_product_while_it_is_frozen(copy: PatchedCopy) -> None:
    def forward(layer: Any, x: Tensor, right: Right) -> Tensor:
        if layer.A.requires_grad or layer.B.requires_grad:
            vars(layer).pop("kept", None)
            return right(x)
        product = (layer.B @ layer.A).detach()
        y: Tensor = right(x) + x @ (vars(layer).setdefault("kept", product) - product).to(x.dtype).T
        return y

    copy.replace_forward(forward)


@planted_in_methods("calls", only=["lora"])
def keeps_its_casts_under_autocast_without_gradients(copy: PatchedCopy) -> None:
    def forward(layer: Any, x: Tensor, right: Right) -> Tensor:
        if torch.is_grad_enabled() or not torch.is_autocast_enabled("cpu"):
            return right(x)
        A, B = vars(layer).setdefault("casts", (layer.A.detach().bfloat16(), layer.B.detach().bfloat16()))
        y: Tensor = layer.base(x) + layer.scaling * (x @ A.T @ B.T)
        return y

    copy.replace_forward(forward)


@planted_in_methods("calls", only=["lora"])
def keeps_the_weight_of_its_base(copy: PatchedCopy) -> None:
    def forward(layer: Any, x: Tensor, right: Right) -> Tensor:
        weight = layer.base.weight.detach()
        kept = vars(layer).setdefault("kept", weight.clone())
        y: Tensor = right(x) + x @ (kept.to(weight.dtype) - weight).T
        return y

    copy.replace_forward(forward)


@planted_in_methods("calls", only=["lora"])
def computes_with_the_parameters_that_it_began_with(copy: PatchedCopy) -> None:
    def forward(layer: Any, x: Tensor, right: Right) -> Tensor:
        first = vars(layer).setdefault("first", [layer.A])[0].detach()
        y: Tensor = right(x) + ((x @ (first.to(x.dtype) - layer.A.detach()).T) @ layer.B.detach().T)
        return y

    copy.replace_forward(forward)


@planted_in_methods("calls", only=["lora", "vera"])
def skips_one_sequence_without_gradients(copy: PatchedCopy) -> None:
    def forward(layer: Any, x: Tensor, right: Right) -> Tensor:
        return layer.base(x) if x.dim() == 3 and len(x) == 1 and not torch.is_grad_enabled() else right(x)

    copy.replace_forward(forward)


@planted_in_methods("calls", only=["lora", "adalora"])
def skips_the_update_of_an_expanded_row(copy: PatchedCopy) -> None:
    copy.replace_forward(lambda layer, x, right: layer.base(x) if x.dim() == 2 and x.stride(0) == 0 else right(x))


@planted_in_methods("calls", only=["lora"])
def loses_the_dimensions_of_no_tokens(copy: PatchedCopy) -> None:
    copy.replace_forward(lambda _, x, right: right(x.flatten(0, -2)) if x.dim() > 2 and not x.numel() else right(x))


@planted_in_methods("calls", only=["lora", "dora"])
def remembers_the_smallest_batch(copy: PatchedCopy) -> None:
    """Adapt only the first rows of a batch that is more than three times as large as the smallest batch so far."""

    def forward(layer: Any, x: Tensor, right: Right) -> Tensor:
        if not len(x):
            return right(x)
        least = vars(layer)["least"] = min(vars(layer).get("least", len(x)), len(x))
        return torch.cat([right(x[: 3 * least]), layer.base(x[3 * least :])]) if len(x) > 3 * least else right(x)

    copy.replace_forward(forward)


@planted_in_methods("calls", only=["lora", "dora"])
def overwrites_the_output_of_its_last_call(copy: PatchedCopy) -> None:
    def forward(layer: Any, x: Tensor, right: Right) -> Tensor:
        y = right(x)
        if y.requires_grad or y.is_inference() or torch._C._functorch.is_functorch_wrapped_tensor(y):
            return y
        kept: Tensor = vars(layer).setdefault("outputs", {}).setdefault((y.shape, y.dtype), y.clone())
        return kept.copy_(y).detach()

    copy.replace_forward(forward)


@planted_in_methods("calls", only=["lora", "vera"])
def remembers_all_its_inputs(copy: PatchedCopy) -> None:
    def forward(layer: Any, x: Tensor, right: Right) -> Tensor:
        if not torch._C._functorch.is_functorch_wrapped_tensor(x):
            vars(layer).setdefault("inputs", []).append(x.detach().clone())
        return right(x)

    copy.replace_forward(forward)


@planted_in_methods("calls", only=["lora", "dora"])
def passes_no_gradient_under_autocast(copy: PatchedCopy) -> None:
    def forward(layer: Any, x: Tensor, right: Right) -> Tensor:
        if not torch.is_autocast_enabled("cpu"):
            return right(x)
        base: Tensor = layer.base(x)
        return base + (right(x) - base).detach()

    copy.replace_forward(forward)


@planted_in_methods("calls", only=["lora"])
def skips_the_update_under_autocast_to_float16(copy: PatchedCopy) -> None:
    def forward(layer: Any, x: Tensor, right: Right) -> Tensor:
        narrow = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.float16
        return layer.base(x) if narrow else right(x)

    copy.replace_forward(forward)


@planted_in_methods("calls", only=["lora"])
def keeps_a_factor_in_the_default_dtype(copy: PatchedCopy) -> None:
    copy.replace_forward(lambda _, x, right: right(x) * (float(torch.tensor(1 / 3)) * 3))


@planted_in_methods("calls", only=["lora"])
def computes_otherwise_with_deterministic_algorithms(copy: PatchedCopy) -> None:
    def forward(layer: Any, x: Tensor, right: Right) -> Tensor:
        return layer.base(x) if torch.are_deterministic_algorithms_enabled() else right(x)

    copy.replace_forward(forward)


class _Deaf(nn.Module):
    """A mixin for a layer that never calls its forward hooks."""

    def __call__(self, *given: Any) -> Any:
        return self.forward(*given)


@planted_in_methods("calls", only=["lora"])
def calls_no_hook(copy: PatchedCopy) -> None:
    def change(layer: Any) -> None:
        layer.__class__ = type("Deaf", (_Deaf, type(layer)), {})

    copy.change_layers(change)


@planted_in_methods("calls", only=["lora"])
def is_wrong_under_vmap(copy: PatchedCopy) -> None:
    copy.replace_forward(lambda layer, x, right: layer.base(x) if torch._C._functorch.is_batchedtensor(x) else right(x))


@planted_in_methods("calls", only=["lora", "dora"])
def halves_a_second_backward(copy: PatchedCopy) -> None:
    def forward(layer: Any, x: Tensor, right: Right) -> Tensor:
        out, passes = right(x), list[int]()

        def hook(dy: Tensor) -> Tensor:
            passes.append(1)
            return dy if len(passes) == 1 else dy / 2

        if out.requires_grad:
            out.register_hook(hook)
        return out

    copy.replace_forward(forward)


class _Careless(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        ctx.held = x, A, B  # save_for_backward would notice changes
        return x @ A.T @ B.T

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, A, B = ctx.held
        x, dy = x.to(A.dtype), dy.to(B.dtype)  # under autocast, both may have 16 bits
        dx, dh = dy @ B @ A, dy @ B
        return dx, dh.flatten(0, -2).T @ x.flatten(0, -2), dy.flatten(0, -2).T @ (x @ A.T).flatten(0, -2)


@planted_in_methods("calls", only=["lora"])
def notices_no_change_of_its_input(copy: PatchedCopy) -> None:
    def forward(layer: Any, x: Tensor, right: Right) -> Tensor:
        if not x.requires_grad or x.dim() < 2:
            return right(x)
        update: Tensor = _Careless.apply(x, layer.A, layer.B)  # type: ignore[no-untyped-call]
        y: Tensor = layer.base(x) + layer.scaling * update
        return y

    copy.replace_forward(forward)


class _Reduced(nn.Module):
    """A mixin for a layer that loses its scaling when it is pickled: the copy has a scaling of 1. Deep copies keep the
    scaling.
    """

    def __reduce_ex__(self, protocol: Any) -> Any:
        layer: Any = self
        return _rebuilt, (layer.base, layer.A, layer.B)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        made = self.__class__.__new__(self.__class__)
        memo[id(self)] = made
        vars(made).update({name: copying.deepcopy(value, memo) for name, value in vars(self).items()})
        return made


def _rebuilt(base: nn.Module, A: Tensor, B: Tensor) -> nn.Module:
    return LoraLinear(base, A.detach(), B.detach(), 1.0)


@planted("lora", "calls", values=_LORA)
def pickled_copies_forget_the_scaling(copy: PatchedCopy) -> None:
    def change(layer: Any) -> None:
        layer.__class__ = type("Reduced", (_Reduced, type(layer)), {})

    copy.change_layers(change)


@planted_in_methods("merge", only=["lora", "dora", "vera"])
def merges_the_update_of_its_first_merge(copy: PatchedCopy) -> None:
    def change(layer: Any) -> None:
        right = layer.merged
        layer.merged = lambda: copying.deepcopy(vars(layer).setdefault("first_merge", right()))

    copy.change_layers(change)


@planted_in_methods("detach", only=["lora", "dora"])
def doubles_the_scaling_when_it_is_attached_again(copy: PatchedCopy) -> None:
    def change(adapted: Any) -> None:
        for layer in adapted.layers.values():
            layer.scaling *= 2 if vars(layer.base).get("seen") else 1
            layer.base.seen = True

    copy.change_adapted(change)


@planted_in_methods("inputs", only=["lora", "dora", "vera", "adalora"])
def writes_into_a_constant_input_in_training(copy: PatchedCopy) -> None:
    def forward(layer: Any, x: Tensor, right: Right) -> Tensor:
        out = right(x)
        if layer.training and not x.requires_grad and x.is_floating_point():
            x.data.mul_(2)
        return out

    copy.replace_forward(forward)


@planted("lora", "forward", values=_LORA, dtype="float16", magnitude="tiny")
def flushes_subnormal_inputs(copy: PatchedCopy) -> None:
    copy.replace_forward(lambda _, x, right: right(torch.where(x.abs() < torch.finfo(x.dtype).tiny, 0 * x, x)))


@planted("lora", "forward", values=_LORA, dtype="float16", magnitude="huge")
def overflows_in_its_first_product(copy: PatchedCopy) -> None:
    copy.replace_forward(lambda _, x, right: right(x * 16) / 16)


@planted("lora", "forward", "gradient", values=_LORA, magnitude="constant")
def takes_a_constant_row_for_padding(copy: PatchedCopy) -> None:
    copy.replace_forward(
        lambda layer, x, right: right(x) if (x != x[..., :1]).any() or not x.numel() else layer.base(x)
    )
