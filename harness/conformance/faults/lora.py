"""Faults of LoRA, and of all Methods with adapted layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from harness.conformance.faults import FaultCase, planted
from harness.conformance.faults.patched_copy import PatchedCopy
from reference.shared.layers import replace

_USUAL = {"rank": 3, "alpha": 8.0}
CASE = FaultCase(values=_USUAL)
_SQUARE = {"values": _USUAL, "inputs": 32, "outputs": 32}
_PRODUCT = "self.scaling * (h_TR @ self.B.T)"
_INPUT = "self.dropout(x_TD) @ self.A.T"

Right = Callable[[Tensor], Tensor]


@planted("lora", "forward", "gradient", values=_USUAL)
def returns_zeros(its: PatchedCopy) -> None:
    its.forward(lambda _, x, right: right(x) * 0)


@planted("lora", "forward", "gradient", values=_USUAL)
def forgets_the_scaling(its: PatchedCopy) -> None:
    its.line(_PRODUCT, "(h_TR @ self.B.T)")


@planted("lora", "forward", "gradient", "merge", values=_USUAL)
def divides_by_the_root_of_the_rank(its: PatchedCopy) -> None:
    its.line("math.sqrt(self.rank) if self.rslora else self.rank", "self.rank")
    its.line("R, s, p = config.rank, config.scaling", "R, s, p = config.rank, config.alpha / config.rank**0.5")


@planted("lora", "forward", "gradient", **_SQUARE)
def swaps_a_and_b(its: PatchedCopy) -> None:
    """Swap A and B, which runs only on a square layer."""
    its.line(_PRODUCT, "self.scaling * (x_TD @ self.B @ self.A)")


@planted("lora", "gradient", "step", values=_USUAL)
def detaches_a(its: PatchedCopy) -> None:
    its.line(_INPUT, "self.dropout(x_TD) @ self.A.detach().T")


@planted("lora", "gradient", values=_USUAL)
def loses_the_gradient_of_its_input(its: PatchedCopy) -> None:
    its.line(_INPUT, "self.dropout(x_TD).detach() @ self.A.T")


@planted("lora", "gradient", values=_USUAL)
def detaches_its_output(its: PatchedCopy) -> None:
    its.forward(lambda _, x, right: right(x).detach())


@planted("lora", "forward", "deterministic", values=_USUAL)
def drops_in_eval_mode(its: PatchedCopy) -> None:
    its.line(_INPUT, "nn.functional.dropout(x_TD, 0.1, training=True) @ self.A.T")


@planted("lora", "dropout", values={**_USUAL, "dropout": 0.25})
def does_not_drop(its: PatchedCopy) -> None:
    its.line(_INPUT, "x_TD @ self.A.T")


@planted("lora", "dropout", values={**_USUAL, "dropout": 0.25})
def drops_without_scaling_up(its: PatchedCopy) -> None:
    its.line(_INPUT, "(self.dropout(x_TD) * (1 - self.dropout.p * self.training)) @ self.A.T")


@planted("lora", "dropout", values={**_USUAL, "dropout": 0.25})
def drops_the_inputs_of_the_base_too(its: PatchedCopy) -> None:
    its.forward(lambda layer, x, right: right(nn.functional.dropout(x, 0.25, layer.training)))


@planted("lora", "inputs", values=_USUAL)
def writes_into_its_input(its: PatchedCopy) -> None:
    def forward(layer: Any, x: Tensor, right: Right) -> Tensor:
        out = right(x)
        x.data.mul_(2)
        return out

    its.forward(forward)


@planted("lora", "inputs", values=_USUAL)
def writes_into_the_base(its: PatchedCopy) -> None:
    def forward(layer: Any, x: Tensor, right: Right) -> Tensor:
        layer.base.weight.data[0, 0] += 1e-3
        return right(x)

    its.forward(forward)


@planted("lora", "forward", "gradient", values=_USUAL)
def returns_the_output_of_the_call_before(its: PatchedCopy) -> None:
    def forward(layer: Any, x: Tensor, right: Right) -> Tensor:
        last: Tensor | None = getattr(layer, "last", None)
        layer.last = out = right(x)
        return out if last is None else last.detach()

    its.forward(forward)


@planted("lora", "forward", "gradient", values=_USUAL)
def computes_in_bfloat16(its: PatchedCopy) -> None:
    its.line(_PRODUCT, "self.scaling * (h_TR.bfloat16() @ self.B.bfloat16().T).to(x_TD.dtype)")


@planted("lora", "deterministic", values=_USUAL)
def adds_noise_below_any_tolerance(its: PatchedCopy) -> None:
    its.forward(lambda _, x, right: right(x) * (1 + torch.finfo(x.dtype).eps * (torch.rand_like(x[..., :1]) < 0.5)))


@planted("lora", "forward", values=_USUAL)
def is_wrong_in_the_last_row(its: PatchedCopy) -> None:
    its.forward(lambda layer, x, right: torch.cat([right(x)[:-1], layer.base(x[-1:])]) if len(x) else right(x))


@planted("lora", "layers", values=_USUAL)
def trains_the_base_too(its: PatchedCopy) -> None:
    def change(adapted: Any) -> None:
        for layer in adapted.layers.values():
            layer.base.weight.requires_grad_(True)

    its.then(change)


@planted("lora", "layers", values=_USUAL)
def adapts_one_layer_too_few(its: PatchedCopy) -> None:
    def change(adapted: Any) -> None:
        path = list(adapted.layers)[-1]
        replace(adapted.model, path, adapted.layers.pop(path).base)

    its.then(change)


@planted("lora", "layers", values=_USUAL)
def adapts_the_wrong_layer(its: PatchedCopy) -> None:
    its.line("in targets(model, config.targets, KINDS)", 'in targets(model, ("other",), KINDS)')


@planted("lora", "layers", values=_USUAL)
def says_that_it_adapts_and_does_not(its: PatchedCopy) -> None:
    def change(adapted: Any) -> None:
        for path, layer in adapted.layers.items():
            replace(adapted.model, path, layer.base)

    its.then(change)


@planted("lora", "merge", values=_USUAL)
def merges_twice(its: PatchedCopy) -> None:
    its.line("dense.weight += self.delta()", "dense.weight += 2 * self.delta()", file="adapted")


@planted("lora", "merge", values=_USUAL)
def forgets_to_unmerge(its: PatchedCopy) -> None:
    its.then(lambda adapted: setattr(adapted, "unmerge", lambda: None))


@planted("lora", "merge", **_SQUARE)
def merges_the_transpose(its: PatchedCopy) -> None:
    its.line('update_ED.T if kind_of(self.base) == "Conv1D" else update_ED', "update_ED.T")


@planted("lora", "merge", values=_USUAL, layer="conv1d", inputs=32, outputs=32)
def forgets_fan_in_fan_out(its: PatchedCopy) -> None:
    its.line('update_ED.T if kind_of(self.base) == "Conv1D" else update_ED', "update_ED")


@planted("lora", "save", values=_USUAL)
def keeps_something_to_itself(its: PatchedCopy) -> None:
    """Derive the scaling from B at the first use, a state that no checkpoint contains."""

    def forward(layer: Any, x: Tensor, right: Right) -> Tensor:
        layer.calls = getattr(layer, "calls", 0) + 1
        return right(x) if layer.calls > 1 or not layer.B.any() else layer.base(x)

    its.forward(forward)


@planted("lora", "initial", values=_USUAL)
def starts_with_both_zero(its: PatchedCopy) -> None:
    its.line("A.uniform_(-bound, bound, generator=generator)", "A.zero_()", file="lora_start")


@planted("lora", "initial", values=_USUAL)
def starts_with_a_too_wide(its: PatchedCopy) -> None:
    """Draw A by Kaiming with the gain of VeRA."""
    its.line("bound = 1 / math.sqrt(inputs)", "bound = math.sqrt(6 / inputs)", file="lora_start")


@planted("lora", "initial", values=_USUAL)
def draws_its_start_from_the_global_generator(its: PatchedCopy) -> None:
    its.line("A.uniform_(-bound, bound, generator=generator)", "A.uniform_(-bound, bound)", file="lora_start")


@planted("lora", "initial", values=_USUAL)
def starts_alike_whatever_the_seed(its: PatchedCopy) -> None:
    its.line(
        "    layers: dict[str, AdaptedLayer] = {}",
        "    generator = torch.Generator().manual_seed(7)\n    layers: dict[str, AdaptedLayer] = {}",
    )


@planted("lora", "initial", values=_USUAL)
def starts_every_layer_alike(its: PatchedCopy) -> None:
    """Draw every layer from a separate generator with the same seed."""
    its.line(
        "layers[path] = _adapted(base, config, generator)",
        "layers[path] = _adapted(base, config, torch.Generator().manual_seed(generator.initial_seed()))",
    )


@planted("lora", "initial", "identity", values=_USUAL)
def starts_with_b_not_zero(its: PatchedCopy) -> None:
    its.line("torch.zeros(outputs, rank, dtype", "torch.full((outputs, rank), 0.01, dtype", file="lora_start")


@planted("lora", "initial", values={**_USUAL, "init": "gaussian"})
def starts_gaussian_with_one_over_the_root_of_the_rank(its: PatchedCopy) -> None:
    its.line("A.normal_(0, 1 / rank", "A.normal_(0, rank**-0.5", file="lora_start")


@planted("lora", "initial", values={**_USUAL, "init": "gaussian"})
def ignores_the_choice_of_its_start(its: PatchedCopy) -> None:
    its.line("initial_factors(config.init, rank", 'initial_factors("kaiming", rank')


@planted("lora", "identity", values={"rank": 4, "alpha": 8.0, "init": "orthogonal"})
def starts_with_both_factors_in_the_same_directions(its: PatchedCopy) -> None:
    """Give each factor the right distribution, but a product that is not zero."""
    its.line("basis[0::2], basis[1::2]", "basis[0::2], basis[0::2]", file="lora_start")


@planted("lora", "parameters", values=_USUAL)
def has_one_rank_too_many(its: PatchedCopy) -> None:
    its.line("R, s, p = config.rank,", "R, s, p = config.rank + 1,")


@planted("lora", "parameters", "step", values=_USUAL)
def forgets_to_name_b(its: PatchedCopy) -> None:
    its.line('return {"A": self.A, "B": self.B}', 'return {"A": self.A}', file="adapted")


@planted("lora", "forward", values=_USUAL, layer="embedding")
def looks_up_the_next_entry(its: PatchedCopy) -> None:
    its.forward(lambda layer, x, right: right((x + 1) % layer.base.num_embeddings))


@planted("lora", "forward", values={"rank": 4, "alpha": 8.0}, layer="conv2d", inputs=6, outputs=8)
def convolves_with_a_flipped_kernel(its: PatchedCopy) -> None:
    its.forward(lambda layer, x, right: right(x.flip(-1)).flip(-1) if layer.base.stride == (1, 1) else right(x))


@planted("lora", "forward", values={**_USUAL, "rslora": True})
def ignores_rslora(its: PatchedCopy) -> None:
    its.line("R, s, p = config.rank, config.scaling", "R, s, p = config.rank, config.alpha / config.rank")
