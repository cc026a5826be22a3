"""Planted faults that show only in one mode, with one memory layout, or after certain earlier calls."""

from __future__ import annotations

import copy as copying
from typing import Any

import torch
from torch import Tensor, nn

from harness.conformance.faults import line_fault, planted_in_methods
from harness.conformance.faults.patched_copy import PatchedCopy, Right

_ADAPTERS = ["lora", "dora", "vera", "adalora"]
_BLOCKS = {"shape": [5, 96], "block": 64}
_BATCH = {"ids": [1, 0, -1, 1], "ranks": [3, 16], "shape": [63, 48]}
_METHOD = {"rank": 3, "alpha": 8.0}
_LAYER = {"shape": [48, 128], "rows": [9], "rank": 8}
_UPDATE = 'apply_layer(lora.LoraLinear(dense_linear(W, bias), A, B, scaling, dropout=0.0), x, mask, {"A": A, "B": B})'

# fmt: off
FAULTS = [
    line_fault("lora_linear", "skips_the_update_without_gradients", ["calls"], f"return {_UPDATE}",
        f"y = {_UPDATE}\n    return y if torch.is_grad_enabled() else dense_linear(W, bias)(x)", values=_LAYER),
    line_fault("lora_linear", "loses_the_update_under_inference_mode", ["calls"], f"return {_UPDATE}",
        f"y = {_UPDATE}\n    return dense_linear(W, bias)(x) if torch.is_inference_mode_enabled() else y", values=_LAYER),
    line_fault("lora_linear", "keeps_the_scaling_of_the_first_call", ["calls"], f"return {_UPDATE}",
        "scaling = globals().setdefault('_first_scaling', scaling)\n    return " + _UPDATE, values=_LAYER),
    line_fault("lora_linear", "keeps_the_update_of_tensors_that_change", ["calls"], f"return {_UPDATE}",
        "kept = globals().setdefault('_kept', torch.utils.weak.WeakTensorKeyDictionary())\n"
        "    A, B = (A, B) if torch.is_grad_enabled() else kept.setdefault(A, (A.clone(), B.clone()))\n"
        "    return " + _UPDATE, values=_LAYER),
    line_fault("lora_linear", "reads_a_gradient_as_if_it_were_contiguous", ["calls"], f"return {_UPDATE}",
        f"y = {_UPDATE}\n    if y.requires_grad:\n        y.register_hook(lambda dy: dy if 0 in dy.stride() else "
        "dy.as_strided(dy.shape, torch.empty(dy.shape).stride()))\n    return y", values=_LAYER),
    line_fault("lora_linear", "reads_a_part_of_a_wider_gradient_as_if_its_rows_were_adjacent", ["calls"],
        f"return {_UPDATE}",
        f"y = {_UPDATE}\n    if y.requires_grad:\n        y.register_hook(lambda dy: dy.as_strided(dy.shape, "
        "(dy.shape[1], 1)) if dy.stride(1) == 1 and dy.stride(0) > dy.shape[1] else dy)\n    return y", values=_LAYER),
    line_fault("nf4_quantize", "reads_columns_of_a_wider_weight_as_if_its_rows_were_adjacent", ["layouts"],
        "flat = x.detach().flatten().float()",
        "x = x.as_strided(x.shape, (x.shape[1], 1)) if x.stride(-1) == 1 and x.stride(0) > x.shape[-1] else x\n"
        "    flat = x.detach().flatten().float()", file="dynamic_map", values=_BLOCKS),
    line_fault("qlora", "rounds_its_constants_when_the_model_is_cast", ["calls"],
        "if now.dtype != before[name].dtype:", "if False:", file="quantised_weight", values=_METHOD, inputs=64, outputs=48),
    line_fault("galore", "counts_a_step_that_raises", ["closure"],
        "        fresh = given or",
        '        state |= {"step": state["step"] + 1} if state else {}\n        fresh = given or',
        "        state |= {name: t for",
        '        state |= {"step": state["step"] - 1} if state else {}\n        state |= {name: t for', values={"rank": 3}),
    line_fault("nf4_dequantize", "makes_its_table_in_the_default_dtype", ["calls"],
        "return code.to(codes.device)[", "return code.to(codes.device, torch.get_default_dtype())[",
        file="dynamic_map", values={"shape": [160, 96], "block": 64}),
    line_fault("multi_lora_linear", "keeps_the_ids_of_the_first_call", ["calls"],
        "    chosen = torch.as_tensor(ids, device=x.device)\n",
        "    kept = globals().setdefault('_kept', torch.utils.weak.WeakTensorKeyDictionary())\n"
        "    chosen = torch.as_tensor(ids, device=x.device)\n    chosen = kept.setdefault(chosen, chosen.clone())\n",
        file="multi_lora", values=_BATCH),
    line_fault("multi_lora_linear", "trains_none_of_the_adapters_unless_all_train", ["calls"],
        "update = scaling * (x[rows] @ A.T @ B.T)",
        "update = scaling * (x[rows] @ A.T @ B.T)\n"
        "            update = update if all(t.requires_grad for t in [*As, *Bs]) else update.detach()",
        file="multi_lora", values=_BATCH),
    line_fault("lora", "skips_a_tiny_update_without_gradients", ["calls"],
        "h_TR = self.dropout(x_TD) @ self.A.T",
        "h_TR = self.dropout(x_TD) @ self.A.T * (torch.is_grad_enabled() or bool(self.B.abs().max() > 1e-3))",
        values=_METHOD),
    line_fault("lora", "loses_the_update_in_a_compiled_graph", ["calls"],
        "h_TR = self.dropout(x_TD) @ self.A.T",
        "h_TR = self.dropout(x_TD) @ self.A.T * (not torch.compiler.is_compiling())", values=_METHOD),
    line_fault("lora", "drops_nothing_in_a_compiled_graph", ["dropout"],
        "h_TR = self.dropout(x_TD) @ self.A.T",
        "h_TR = (x_TD if torch.compiler.is_compiling() else self.dropout(x_TD)) @ self.A.T",
        values={**_METHOD, "dropout": 0.25}),
    line_fault("lora", "keeps_its_last_input_in_training", ["calls"],
        "h_TR = self.dropout(x_TD) @ self.A.T",
        "self.__dict__['_seen'] = x_TD.detach() if self.training else None\n"
        "        h_TR = self.dropout(x_TD) @ self.A.T", values=_METHOD),
    line_fault("lora", "takes_a_copy_of_the_input_that_the_layer_before_made", ["shared_input"],
        "        h_TR = self.dropout(x_TD)",
        "        last = vars(LoraLinear).get('last', (None, self))\n"
        "        if torch.is_grad_enabled() or last[0] is not x_TD or last[1] is self:\n"
        "            last = LoraLinear.last = (x_TD, self, x_TD.detach().clone())\n"
        "        x_TD = x_TD if last[1] is self else last[2]\n"
        "        h_TR = self.dropout(x_TD)", values=_METHOD),
    line_fault("lora", "drops_nothing_if_another_layer_had_this_input", ["shared_input"],
        "        h_TR = self.dropout(x_TD)",
        "        last = vars(LoraLinear).get('last', (None, self))\n"
        "        LoraLinear.last = x_TD, self\n"
        "        is_second = last[0] is x_TD and last[1] is not self\n"
        "        h_TR = (x_TD if is_second else self.dropout(x_TD))", values=_METHOD),
    line_fault("lora", "trains_the_layer_before_with_the_same_input", ["shared_input"],
        "        return self.with_bias(y_TE)",
        "        last = vars(LoraLinear).get('last', (None, self))\n"
        "        LoraLinear.last = x_TD, self\n"
        "        if last[0] is x_TD and last[1] is not self:\n"
        "            y_TE = y_TE + 0 * last[1].A.sum() * last[1].B.sum()\n"
        "        return self.with_bias(y_TE)", values=_METHOD),
    line_fault("vera", "drops_nothing_in_a_copy", ["dropout"],
        "h_TR = self.d * (self.dropout(x_TD) @ self.A.T)",
        "mine = self.__dict__.setdefault('_mine', id(self)) == id(self)\n"
        "        h_TR = self.d * ((self.dropout(x_TD) if mine else x_TD) @ self.A.T)",
        values={"rank": 4, "dropout": 0.25}),
    line_fault("lora", "reads_images_as_if_channels_came_first", ["calls"],
        "convolve(self.base, self.dropout(x), self.A, groups=1)",
        "convolve(self.base, self.dropout(x.as_strided(x.shape, x.new_empty(x.shape).stride())), self.A, groups=1)",
        file="lora_layers", values=_METHOD, layer="conv2d"),
    line_fault("nf4_quantize", "reads_from_the_start_of_the_storage", ["layouts"],
        "flat = x.detach().flatten().float()",
        "flat = (x.detach().as_strided((x.numel(),), (1,), 0) if x.is_contiguous() else x.detach().flatten()).float()",
        file="dynamic_map", values=_BLOCKS),
    line_fault("lora_linear", "turns_a_nan_of_the_input_into_zero", ["nonfinite"], f"return {_UPDATE}",
        f"x = x.nan_to_num(0.0)\n    return {_UPDATE}", values=_LAYER),
    line_fault("nf4_quantize", "quantises_a_tensor_with_a_gradient_from_its_magnitudes", ["calls"],
        "flat = x.detach().flatten().float()",
        "flat = (x.detach().abs() if x.requires_grad else x.detach()).flatten().float()",
        file="dynamic_map", values=_BLOCKS),
]
# fmt: on


@planted_in_methods("calls", only=_ADAPTERS)
def skips_the_update_of_single_tokens(copy: PatchedCopy) -> None:
    copy.replace_forward(lambda layer, x, right: layer.base(x) if x.dim() == 3 and x.shape[1] == 1 else right(x))


@planted_in_methods("calls", only=_ADAPTERS)
def passes_no_gradient_for_single_tokens(copy: PatchedCopy) -> None:
    copy.replace_forward(lambda _, x, right: right(x).detach() if x.dim() == 3 and x.shape[1] == 1 else right(x))


@planted_in_methods("calls", only=_ADAPTERS)
def skips_the_update_in_training_without_gradients(copy: PatchedCopy) -> None:
    def forward(layer: Any, x: Tensor, right: Right) -> Tensor:
        return right(x) if torch.is_grad_enabled() or not layer.training else layer.base(x)

    copy.replace_forward(forward)


@planted_in_methods("calls", only=_ADAPTERS)
def skips_the_update_in_inference_mode(copy: PatchedCopy) -> None:
    copy.replace_forward(lambda layer, x, right: layer.base(x) if torch.is_inference_mode_enabled() else right(x))


@planted_in_methods("calls", only=_ADAPTERS)
def skips_the_update_under_autocast(copy: PatchedCopy) -> None:
    copy.replace_forward(lambda layer, x, right: layer.base(x) if torch.is_autocast_enabled("cpu") else right(x))


@planted_in_methods("calls", only=_ADAPTERS)
def passes_no_gradient_to_a_backward_pass_outside_autocast(copy: PatchedCopy) -> None:
    def forward(_: Any, x: Tensor, right: Right) -> Tensor:
        y = right(x)
        if y.requires_grad and torch.is_autocast_enabled("cpu"):
            y.register_hook(lambda dy: dy * torch.is_autocast_enabled("cpu"))
        return y

    copy.replace_forward(forward)


@planted_in_methods("calls", only=["lora", "adalora"])  # DoRA and VeRA multiply by a vector in float32
def returns_float32_under_autocast(copy: PatchedCopy) -> None:
    copy.replace_forward(lambda _, x, right: right(x).float() if torch.is_autocast_enabled("cpu") else right(x))


@planted_in_methods("calls", only=_ADAPTERS)
def skips_the_update_under_autocast_without_a_bias(copy: PatchedCopy) -> None:
    def forward(layer: Any, x: Tensor, right: Right) -> Tensor:
        return layer.base(x) if layer.base.bias is None and torch.is_autocast_enabled("cpu") else right(x)

    copy.replace_forward(forward)


@planted_in_methods("calls", only=_ADAPTERS)
def keeps_the_first_update_under_autocast(copy: PatchedCopy) -> None:
    def forward(layer: Any, x: Tensor, right: Right) -> Tensor:
        y = right(x)
        if not torch.is_autocast_enabled("cpu"):
            return y
        base: Tensor = layer.base(x)
        kept: Tensor | None = getattr(layer, "first_update", None)
        if kept is None or kept.shape != y.shape:
            layer.first_update = kept = (y - base).detach()
        return base + kept

    copy.replace_forward(forward)


@planted_in_methods("calls", only=["lora", "dora", "adalora"])
def passes_no_gradient_if_a_is_frozen(copy: PatchedCopy) -> None:
    copy.replace_forward(lambda layer, x, right: right(x) if layer.A.requires_grad else right(x).detach())


@planted_in_methods("calls", only=_ADAPTERS)
def flattens_four_dimensions(copy: PatchedCopy) -> None:
    copy.replace_forward(lambda _, x, right: right(x.flatten(0, 1)) if x.dim() == 4 else right(x))


@planted_in_methods("calls", only=_ADAPTERS)
def skips_the_update_of_rows_with_gaps(copy: PatchedCopy) -> None:
    copy.replace_forward(
        lambda layer, x, right: layer.base(x) if len(x) > 1 and x.stride()[0] > x[0].numel() else right(x)
    )


@planted_in_methods("calls", only=_ADAPTERS)
def is_wrong_at_every_fiftieth_call(copy: PatchedCopy) -> None:
    def forward(layer: Any, x: Tensor, right: Right) -> Tensor:
        vars(layer)["calls"] = vars(layer).get("calls", 0) + 1
        return right(x) * (1.1 if vars(layer)["calls"] % 50 == 0 else 1.0)

    copy.replace_forward(forward)


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return x @ weight.T

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        return dy @ ctx.saved_tensors[0], None


@planted_in_methods("calls", only=["lora"])
def has_no_second_derivative(copy: PatchedCopy) -> None:
    def forward(layer: Any, x: Tensor, right: Right) -> Tensor:
        update = layer.scaling * (layer.B @ layer.A)
        product: Tensor = _Once.apply(x, update)  # type: ignore[no-untyped-call]
        y: Tensor = right(x) - x @ update.T + product
        return y

    copy.replace_forward(forward)


class _Forgetful(nn.Module):
    """A mixin for a layer that loses its scaling when it is deep-copied: the copy has a scaling of 1."""

    scaling: float

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        made = self.__class__.__new__(self.__class__)
        memo[id(self)] = made
        vars(made).update({name: copying.deepcopy(value, memo) for name, value in vars(self).items()})
        made.scaling = 1.0
        return made


@planted_in_methods("calls", "walk", only=["lora", "adalora"])
def copies_forget_the_scaling(copy: PatchedCopy) -> None:
    def change(layer: Any) -> None:
        layer.__class__ = type("Forgetful", (_Forgetful, type(layer)), {})

    copy.change_layers(change)


@planted_in_methods("calls", only=["lora", "adalora"])
def loses_the_scaling_in_another_dtype(copy: PatchedCopy) -> None:
    def change(layer: Any) -> None:
        right = type(layer)

        def apply(self: Any, function: Any, recurse: bool = True) -> Any:
            before = self.A.dtype
            right._apply(self, function, recurse)
            self.scaling = self.scaling if self.A.dtype == before else 1.0
            return self

        layer.__class__ = type("Moved", (right,), {"_apply": apply})

    copy.change_layers(change)


@planted_in_methods("walk", only=["lora", "adalora"])
def merges_into_the_base_and_stays_there(copy: PatchedCopy) -> None:
    """Let `unmerge` add the update to the base weight for good, instead of restoring the weight from before `merge`."""

    def change(adapted: Any) -> None:
        unmerge = adapted.unmerge

        def unmerge_and_keep() -> None:
            with torch.no_grad():
                for layer in adapted.layers.values():
                    layer.base.weight.add_(layer.delta())
            unmerge()

        adapted.unmerge = unmerge_and_keep

    copy.change_adapted(change)


@planted_in_methods("walk", only=["galore"])
def resumes_without_its_projectors(copy: PatchedCopy) -> None:
    def change(adapted: Any) -> None:
        right = adapted.optimizer

        def optimizer(*given: Any) -> Any:
            made = right(*given)
            state_dict = made.state_dict

            def without_projectors() -> dict[str, Any]:
                saved: dict[str, Any] = state_dict()
                for state in saved["state"].values():
                    for letter in ("P", "Q"):
                        if letter in state:
                            state[letter] = torch.linalg.qr(torch.ones_like(state[letter])).Q
                return saved

            made.state_dict = without_projectors
            return made

        adapted.optimizer = optimizer

    copy.change_adapted(change)


@planted_in_methods("walk", only=["lora", "dora", "adalora"])
def keeps_the_weight_of_its_first_model(copy: PatchedCopy) -> None:
    """Add an error that grows with the distance of A from the first A of the same shape, even that of another model."""
    held: dict[Any, Tensor] = {}

    def forward(layer: Any, x: Tensor, right: Right) -> Tensor:
        stale = held.setdefault((layer.A.shape, layer.A.dtype, x.requires_grad), layer.A.detach().clone())
        difference: Tensor = x @ (stale - layer.A.detach()).T
        return right(x) + difference.sum() * 0.01

    copy.replace_forward(forward)
