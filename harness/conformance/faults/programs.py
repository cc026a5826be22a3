"""Planted faults that show around a call: with hooks, errors, other gradient functions, copies, and a second model."""

from __future__ import annotations

import copy as copying
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from harness.conformance.faults import line_fault, planted, planted_in_methods
from harness.conformance.faults.patched_copy import PatchedCopy, Right

_LORA = {"rank": 3, "alpha": 8.0}
_ADALORA = {"rank": 3, "target_rank": 2, "alpha": 8.0}
_GALORE = {"rank": 3, "eps": 0.1}
_LAYER = {"shape": [48, 128], "rows": [9], "rank": 8}
_UPDATE = 'apply_layer(lora.LoraLinear(dense_linear(W, bias), A, B, scaling, dropout=0.0), x, mask, {"A": A, "B": B})'

# fmt: off
FAULTS = [
    line_fault("lora", "replaces_layers_before_it_has_made_all", ["base"],
        "            layers[path] = make(base)\n",
        "            layers[path] = make(base)\n            replace(model, path, layers[path])\n",
        file="adapted", values=_LORA),
    line_fault("lora_linear", "changes_an_argument_without_gradients", ["arguments"], f"return {_UPDATE}",
        f"y = {_UPDATE}\n    if not torch.is_grad_enabled():\n        W.add_(1).sub_(1)\n    return y", values=_LAYER),
    line_fault("lora_linear", "reads_its_argument_in_the_backward_pass", ["calls"], f"return {_UPDATE}",
        f"own, A, B = B, A.clone(), B.clone()\n    y, kept = {_UPDATE}, own.detach().clone()\n    if y.requires_grad:\n"
        "        y.register_hook(lambda dy: dy * (own.detach() / kept).mean())\n    return y", values=_LAYER),
    line_fault("lora_linear", "keeps_its_last_input", ["calls"], f"return {_UPDATE}",
        f"vars(reference)['last'] = x\n    return {_UPDATE}", values=_LAYER),
    line_fault("lora_linear", "has_a_backward_pass_without_a_graph", ["calls"], f"return {_UPDATE}",
        f"y = {_UPDATE}\n    if y.requires_grad:\n        y.register_hook(lambda dy: dy.detach())\n    return y",
        values=_LAYER),
    line_fault("lora_linear", "reads_its_output_in_the_backward_pass", ["calls"], f"return {_UPDATE}",
        f"y = {_UPDATE}\n    kept = y.detach().clone()\n    if y.requires_grad:\n        seen = y.detach()\n"
        "        y.register_hook(lambda dy: dy * (seen.norm() / kept.norm()))\n    return y", values=_LAYER),
    line_fault("nf4_linear", "decodes_again_for_other_codes_only", ["calls"],
        "return linear(x, _FORM.dequantize(packed, absmax, block, shape, x.dtype), bias)",
        "key = packed.sum().item(), x.dtype\n    kept = vars(reference).setdefault('kept', {})\n"
        "    if key not in kept:\n        kept[key] = _FORM.dequantize(packed, absmax, block, shape, x.dtype)\n"
        "    return linear(x, kept[key], bias)", values={"shape": [48, 128], "rows": [9]}),
    line_fault("galore", "stands_still_with_a_scheduler", ["resume"],
        "        galore_step(p, G, self.state[p], **options)",
        '        galore_step(p, G, self.state[p], **options | ({"lr": 0.0} if "initial_lr" in group else {}))',
        values=_GALORE),
    line_fault("galore", "decays_by_the_first_learning_rate", ["trajectory"],
        "        galore_step(p, G, self.state[p], **options)",
        '        galore_step(p, G, self.state[p], **options)\n'
        '        decay = {n: 1 - group[n] * group["weight_decay"] for n in ("lr", "initial_lr") if n in group}\n'
        '        p.data.mul_(decay.get("initial_lr", decay["lr"]) / decay["lr"])', values=_GALORE),
    line_fault("galore", "takes_a_gradient_of_zeros_for_none", ["optimizer"],
        "if p.grad is not None:", "if p.grad is not None and p.grad.any():", values=_GALORE),
    line_fault("galore", "forgets_the_state_of_a_moved_parameter", ["optimizer"],
        "        galore_step(p, G, self.state[p], **options)",
        '        where = vars(self).setdefault("where", {})\n'
        "        if where.setdefault(p, p.data_ptr()) != p.data_ptr():\n"
        "            self.state[p], where[p] = {}, p.data_ptr()\n"
        "        galore_step(p, G, self.state[p], **options)", values=_GALORE),
    line_fault("galore", "steps_only_the_parameters_that_it_began_with", ["closure"],
        "            for p in group[\"params\"]:\n                if p.grad",
        '            for p in group["params"]:\n'
        '                first = vars(self).setdefault("first", {id(q) for g in self.param_groups for q in g["params"]})\n'
        "                if id(p) in first and p.grad", values=_GALORE),
    line_fault("galore", "keeps_its_state_if_it_loads_none", ["resume"],
        "        super().load_state_dict(state_dict)\n",
        "        old = dict(self.state)\n        super().load_state_dict(state_dict)\n"
        "        for p in old.keys() - self.state.keys():\n            self.state[p] = old[p]\n", values=_GALORE),
    line_fault("galore", "leaves_gradients_off_if_a_closure_raises", ["closure"],
        "loss = loss_of(closure)",
        "before = torch.is_grad_enabled()\n        torch.set_grad_enabled(before and closure is None)\n"
        "        loss = loss_of(closure)\n        torch.set_grad_enabled(before)", values=_GALORE),
    line_fault("galore", "keeps_the_loss_of_a_closure_to_itself", ["closure"], "        return loss\n", "", values=_GALORE),
]
# fmt: on


@planted_in_methods("merge", adds_layers=True)
def merges_in_eval_mode(copy: PatchedCopy) -> None:
    def change(adapted: Any) -> None:
        merge = adapted.merge

        def merged() -> None:
            adapted.model.eval()
            merge()

        adapted.merge = merged

    copy.change_adapted(change)


@planted("lora", "merge", values=_LORA)
def merges_into_plain_tensors(copy: PatchedCopy) -> None:
    def change(adapted: Any) -> None:
        merge = adapted.merge

        def merged() -> None:
            merge()
            for path in adapted.layers:
                layer: Any = adapted.model.get_submodule(path)
                if isinstance(layer, nn.Linear):
                    weight = layer.weight.detach()
                    del layer.weight
                    layer.weight = weight

        adapted.merge = merged

    copy.change_adapted(change)


@planted("lora", "merge", values=_LORA)
def merges_the_present_adapter_again(copy: PatchedCopy) -> None:
    def change(adapted: Any) -> None:
        merge, unmerge = adapted.merge, adapted.unmerge

        def merged() -> None:
            unmerge()
            merge()

        adapted.merge = merged

    copy.change_adapted(change)


@planted("lora", "detach", values=_LORA)
def merges_one_model_at_a_time(copy: PatchedCopy) -> None:
    busy: list[Any] = []

    def change(adapted: Any) -> None:
        merge, unmerge, detach = adapted.merge, adapted.unmerge, adapted.detach

        def merged() -> None:
            if not busy:
                busy.append(1)
                merge()

        def freed(act: Any) -> None:
            busy.clear()
            act()

        adapted.merge, adapted.unmerge = merged, lambda: freed(unmerge)
        adapted.detach = lambda: freed(detach)

    copy.change_adapted(change)


@planted_in_methods("deterministic", adds_layers=True)
def draws_random_numbers_in_eval_mode(copy: PatchedCopy) -> None:
    def forward(layer: Any, x: Tensor, right: Right) -> Tensor:
        torch.rand(1)
        return right(x)

    copy.replace_forward(forward)


@planted("lora", "calls", values=_LORA)
def adds_to_the_output_of_the_base(copy: PatchedCopy) -> None:
    def forward(layer: Any, x: Tensor, right: Right) -> Tensor:
        y: Tensor = layer.base(x)
        y += layer.scaling * (layer.dropout(x) @ layer.A.T @ layer.B.T)
        return y

    copy.replace_forward(forward)


@planted("lora", "calls", values=_LORA)
def runs_the_base_twice(copy: PatchedCopy) -> None:
    def forward(layer: Any, x: Tensor, right: Right) -> Tensor:
        layer.base(x)
        return right(x)

    copy.replace_forward(forward)


@planted("lora", "calls", values=_LORA)
def skips_the_update_of_16_bits_under_autocast(copy: PatchedCopy) -> None:
    def forward(layer: Any, x: Tensor, right: Right) -> Tensor:
        if torch.is_autocast_enabled(x.device.type) and x.dtype != layer.A.dtype:
            y: Tensor = layer.base(x)
            return y
        return right(x)

    copy.replace_forward(forward)


@planted_in_methods("calls", only=["lora", "dora", "adalora"])
def skips_an_update_that_once_was_zero(copy: PatchedCopy) -> None:
    def forward(layer: Any, x: Tensor, right: Right) -> Tensor:
        if torch.is_grad_enabled() or layer.training:
            return right(x)
        vars(layer)["idle"] = vars(layer).get("idle") or not bool(layer.B.any())
        return layer.base(x) if vars(layer)["idle"] else right(x)

    copy.replace_forward(forward)


@planted("lora", "calls", values=_LORA)
def stays_merged_after_a_call_that_raised(copy: PatchedCopy) -> None:
    def forward(layer: Any, x: Tensor, right: Right) -> Tensor:
        if torch.is_grad_enabled() or layer.training:
            return right(x)
        weight = layer.base.weight.data
        layer.base.weight.data = weight + layer.delta()
        y: Tensor = layer.base(x)
        layer.base.weight.data = weight
        return y

    copy.replace_forward(forward)


@planted("lora", "calls", values=_LORA)
def adds_its_gradients_itself(copy: PatchedCopy) -> None:
    class Own(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, y: Tensor, B: Tensor, h: Tensor) -> Tensor:  # type: ignore[override]
            ctx.B, ctx.h = B, h
            return y.clone()

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
            g = (dy.reshape(-1, dy.shape[-1]).T @ ctx.h.reshape(-1, ctx.h.shape[-1])).to(ctx.B.dtype)
            ctx.B.grad = g if ctx.B.grad is None else ctx.B.grad + g
            return dy, None, None

    def forward(layer: Any, x: Tensor, right: Right) -> Tensor:
        h = layer.scaling * (layer.dropout(x) @ layer.A.T)
        y: Tensor = layer.base(x) + h @ layer.B.detach().T
        if not (y.requires_grad and layer.B.requires_grad):
            return y
        out: Tensor = Own.apply(y, layer.B, h.detach())
        return out

    copy.replace_forward(forward)


@planted("vera", "calls", values={"rank": 3})
def shares_memory_with_its_copies(copy: PatchedCopy) -> None:
    def change(layer: Any) -> None:
        def copied(memo: dict[int, Any], layer: Any = layer) -> Any:
            memo[id(layer.b)] = layer.b
            made: Any = object.__new__(type(layer))
            memo[id(layer)] = made
            made.__dict__.update(copying.deepcopy({k: v for k, v in vars(layer).items() if k != "__deepcopy__"}, memo))
            return made

        vars(layer)["__deepcopy__"] = copied

    copy.change_layers(change)


@planted("adalora", "importance", values=_ADALORA)
def uses_the_gradient_of_the_last_backward_pass(copy: PatchedCopy) -> None:
    def change(adapted: Any) -> None:
        seen: dict[str, Tensor] = {}
        for name, tensor in adapted.tensors().items():
            tensor.register_hook(lambda g, name=name: seen.__setitem__(name, g.detach()))
        after = adapted.after_step

        def after_step(step: int) -> None:
            for name, tensor in adapted.tensors().items():
                tensor.grad = seen.pop(name, tensor.grad)
            after(step)

        adapted.after_step = after_step

    copy.change_adapted(change)


@planted("adalora", "budget", values=_ADALORA)
def acts_on_the_original_of_a_copy(copy: PatchedCopy) -> None:
    def change(adapted: Any) -> None:
        adapted.after_step = lambda step, own=adapted: type(own).after_step(own, step)

    copy.change_adapted(change)


@planted("adalora", "regularizer", values=_ADALORA)
def adds_nothing_to_the_loss_in_eval_mode(copy: PatchedCopy) -> None:
    copy.replace_line(
        "    def regularizer(self) -> Tensor | None:\n",
        "    def regularizer(self) -> Tensor | None:\n        return self._term() if self.model.training else None\n\n"
        "    def _term(self) -> Tensor | None:\n",
    )


@planted("lora", "merge", values=_LORA)
def is_merged_until_it_is_unmerged_as_often(copy: PatchedCopy) -> None:
    def change(adapted: Any) -> None:
        merge, unmerge, count = adapted.merge, adapted.unmerge, [0]

        def counted_merge() -> None:
            count[0] += 1
            merge()

        def counted_unmerge() -> None:
            count[0] = max(0, count[0] - 1)
            if not count[0]:
                unmerge()

        adapted.merge, adapted.unmerge = counted_merge, counted_unmerge

    copy.change_adapted(change)


@planted("galore", "closure", values=_GALORE)
def steps_past_the_hooks_of_its_optimizer(copy: PatchedCopy) -> None:
    def change(adapted: Any) -> None:
        make = adapted.optimizer

        def optimizer(*args: Any, **options: Any) -> Any:
            made = make(*args, **options)
            made.step = partial(type(made).step.__wrapped__, made)
            return made

        adapted.optimizer = optimizer

    copy.change_adapted(change)


@planted_in_methods("calls", only=["lora", "dora", "vera", "adalora", "loha", "lokr", "oft"])
def passes_no_gradient_to_its_base(copy: PatchedCopy) -> None:
    def forward(layer: Any, x: Tensor, right: Right) -> Tensor:
        weight = layer.base.weight
        trains = weight.requires_grad
        weight.requires_grad_(False)
        y = right(x)
        weight.requires_grad_(trains)
        return y

    copy.replace_forward(forward)


@planted_in_methods("detach", adds_layers=True)
def keeps_its_layers_for_ever(copy: PatchedCopy) -> None:
    kept: list[Any] = []
    copy.change_layers(kept.append)


@planted_in_methods("detach", only=["lora", "vera"])
def leaves_a_hook_on_the_model(copy: PatchedCopy) -> None:
    copy.change_adapted(lambda adapted: adapted.model.register_forward_pre_hook(lambda *_: None))


@planted_in_methods(
    "save", only=["lora", "dora", "vera", "adalora", "pissa", "loha", "lokr", "oft", "qlora", "lora_int8"]
)
def lists_the_parameters_that_it_began_with(copy: PatchedCopy) -> None:
    def change(adapted: Any) -> None:
        first = adapted.parameters()
        adapted.parameters = lambda: first

    copy.change_adapted(change)
