"""Planted faults of LoRA.

Some of them could occur in any Method with adapted layers. They are planted only in LoRA, as an example.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from harness.conformance.faults import FaultCase, line_fault, planted
from harness.conformance.faults.patched_copy import PatchedCopy, Right
from reference.shared.layers import replace

_USUAL = {"rank": 3, "alpha": 8.0}
_DROP = {**_USUAL, "dropout": 0.25}
_GAUSSIAN = {**_USUAL, "init": "gaussian"}
CASE = FaultCase(values=_USUAL)
_BIASED = {**_USUAL, "lora_bias": True}
_PRODUCT = "self.scaling * (h_TR @ self.B.T)"
_INPUT = "self.dropout(x_TD) @ self.A.T"
_BIAS = "(self.scaling * self.c).to(y.dtype)"

_lora = partial(line_fault, "lora", values=_USUAL)

# fmt: off
FAULTS = [
    _lora("repeats_the_rows_of_its_start", ["initial"],
        "    return A, torch.zeros(outputs", "    A[2:] = A[:-2].clone()\n    return A, torch.zeros(outputs",
        file="lora_start"),
    _lora("forgets_the_scaling", ["forward", "gradient"], _PRODUCT, "(h_TR @ self.B.T)"),
    _lora("divides_by_the_root_of_the_rank", ["forward", "gradient", "merge"],
        "math.sqrt(self.rank) if self.rslora else self.rank", "self.rank",
        "R, s, p = config.rank, config.scaling", "R, s, p = config.rank, config.alpha / config.rank**0.5"),
    _lora("keeps_alpha_as_a_whole_number", ["forward", "gradient"],
        "R, s, p = config.rank, config.scaling", "R, s, p = config.rank, int(config.alpha) / config.rank",
        values={"rank": 3, "alpha": 8.5}),
    _lora("tells_transposed_experts_by_their_shape", ["forward", "gradient", "merge"],
        "return stacked_update(self.A[name], self.B[name], self.experts, self.scaling, self.transposed)",
        "update = stacked_update(self.A[name], self.B[name], self.experts, self.scaling, False)\n"
        "        return update if update.shape == self.base.get_parameter(name).shape else update.transpose(1, 2)",
        file="lora_experts", layer="experts"),
    # Swap A and B, which raises no error on a square layer.
    _lora("swaps_a_and_b", ["forward", "gradient"],
        _PRODUCT, "self.scaling * (x_TD @ self.B @ self.A)", inputs=32, outputs=32),
    _lora("leaves_the_bias_of_b_out_of_the_state_dict", ["each_setting"], "self.c = None if c is None else nn.Parameter(c)",
        'vars(self)["c"] = None if c is None else nn.Parameter(c)', file="adapted"),
    _lora("detaches_a", ["gradient", "step"], _INPUT, "self.dropout(x_TD) @ self.A.detach().T"),
    # unsloth-zoo#892, for an output layer
    _lora("doubles_the_gradient", ["gradient", "step"], _PRODUCT, "(u := " + _PRODUCT + ") + (u - u.detach())"),
    _lora("loses_the_gradient_of_its_input", ["gradient"], _INPUT, "self.dropout(x_TD).detach() @ self.A.T"),
    _lora("drops_in_eval_mode", ["forward", "deterministic"],
        _INPUT, "nn.functional.dropout(x_TD, 0.1, training=True) @ self.A.T"),
    _lora("does_not_drop", ["dropout"], _INPUT, "x_TD @ self.A.T", values=_DROP),
    _lora("drops_nothing_without_gradients", ["dropout"],
        _INPUT, "(self.dropout(x_TD) if torch.is_grad_enabled() else x_TD) @ self.A.T", values=_DROP),
    _lora("drops_without_scaling_up", ["dropout"],
        _INPUT, "(self.dropout(x_TD) * (1 - self.dropout.p * self.training)) @ self.A.T", values=_DROP),
    # fms-acceleration#97
    _lora("forgets_the_mask_in_the_backward_pass", ["dropout"], _INPUT,
        "(x_TD + (self.dropout(x_TD) - x_TD).detach()) @ self.A.T", values=_DROP),
    _lora("rounds_the_dropout_to_sixteenths", ["dropout"], _INPUT,
        "(nn.functional.dropout(x_TD, 0.125) * (0.875 / 0.9) if self.training else x_TD) @ self.A.T",
        values={**_USUAL, "dropout": 0.1}),
    _lora("repeats_the_mask_after_1024_tokens", ["dropout"], _INPUT,
        "(x_TD * self.dropout(torch.ones_like(x_TD[:1024])).repeat(-(-len(x_TD) // 1024), *[1] * (x_TD.dim() - 1))"
        "[: len(x_TD)]) @ self.A.T", values=_DROP),
    _lora("does_not_drop_before_a_convolution", ["dropout"],
        "convolve(self.base, self.dropout(x), self.A, groups=1)", "convolve(self.base, x, self.A, groups=1)",
        file="lora_layers", values=_DROP, layer="conv2d"),
    _lora("pads_one_side_only_if_the_padding_is_a_word", ["forward", "gradient"], "    padding: Any = base.padding\n",
        "    padding: Any = base.padding\n    if isinstance(padding, str):\n"
        "        x, padding = nn.functional.pad(x, (1, 0, 1, 0)), 0\n",
        file="lora_layers", layer="conv2d-pointwise"),
    _lora("pools_instead_of_striding_in_a_1x1_convolution", ["forward", "gradient"],
        "convolve(self.base, self.dropout(x), self.A, groups=1)",
        "convolve(self.base, self.dropout(x), self.A, groups=1) if self.base.kernel_size != (1, 1) else "
        "nn.functional.adaptive_avg_pool2d(nn.functional.conv2d(self.dropout(x), self.A), self.base(x).shape[-2:])",
        file="lora_layers", layer="conv2d-pointwise"),
    _lora("reads_token_numbers_in_int32_as_zeros", ["calls"], "            ids_T, self.A.T,",
        "            ids_T * (ids_T.element_size() == 8), self.A.T,", file="lora_layers", layer="embedding"),
    _lora("merges_rank_by_rank_into_alternate_groups", ["merge"], "self.A.reshape(G, R // G, -1)",
        "self.A.reshape(R // G, G, -1).transpose(0, 1)", file="lora_layers", layer="conv2d-grouped",
        values={"rank": 4, "alpha": 8.0}),
    _lora("trains_the_padding_entry", ["gradient"], "ids_T, self.A.T, self.base.padding_idx,",
        "ids_T, self.A.T, None,", file="lora_layers", layer="embedding-scaled"),
    _lora("ignores_the_scale_of_an_embedding", ["forward", "gradient"], "(a_TR @ self.B.T) * scale", "(a_TR @ self.B.T)",
        file="lora_layers", layer="embedding-scaled"),                                  # peft#2809
    _lora("drops_whole_images", ["dropout"], "convolve(self.base, self.dropout(x), self.A, groups=1)",
        "convolve(self.base, x * self.dropout(x.new_ones(len(x), 1, 1, 1)), self.A, groups=1)",
        file="lora_layers", values=_DROP, layer="conv2d"),
    _lora("flips_the_depth_of_a_conv3d", ["forward", "gradient"], "return _CONVOLVE[kernel.dim()](x, kernel, None,",
        "return _CONVOLVE[kernel.dim()](x, kernel.flip(2) if kernel.dim() == 5 else kernel, None,",
        file="lora_layers", layer="conv3d"),
    _lora("merges_the_places_of_nn_conv1d_in_reverse", ["merge"], "(B_GER @ A_GRD).reshape(-1, C, *K)",
        "(B_GER @ A_GRD).reshape(-1, C, *K).flip([2] if len(K) == 1 else [])", file="lora_layers", layer="nn-conv1d"),
    _lora("adds_the_bias_of_channels_to_the_places_of_nn_conv1d", ["forward"], "dim=1 - self.A.dim()", "dim=-1",
        file="lora_layers", values={**_USUAL, "lora_bias": True}, layer="nn-conv1d", inputs=9, outputs=15),
    _lora("computes_in_bfloat16", ["forward", "gradient"],
        _PRODUCT, "self.scaling * (h_TR.bfloat16() @ self.B.bfloat16().T).to(x_TD.dtype)"),
    _lora("adapts_the_wrong_layer", ["layers"],
        "targets(model, config.targets, KINDS)", 'targets(model, ("other",), KINDS)'),
    _lora("merges_twice", ["merge"],
        "as_stored(dense, self.delta())", "2 * as_stored(dense, self.delta())", file="adapted"),
    _lora("merges_the_transpose", ["merge"],
        'W_ED.T if kind_of(base) in ("Conv1D", "embedding") else W_ED',
        "W_ED.T", file="layers", inputs=32, outputs=32),
    _lora("forgets_fan_in_fan_out", ["merge"],
        'W_ED.T if kind_of(base) in ("Conv1D", "embedding") else W_ED',
        "W_ED", file="layers", layer="conv1d", inputs=32, outputs=32),
    _lora("starts_with_both_zero", ["initial"],
        "A.uniform_(-bound, bound, generator=generator)", "A.zero_()", file="lora_start"),
    # Draw A by Kaiming's rule with the gain of VeRA.
    _lora("starts_with_a_too_wide", ["initial"],
        "bound = 1 / math.sqrt(inputs)", "bound = math.sqrt(6 / inputs)", file="lora_start"),
    _lora("draws_its_start_from_the_global_generator", ["initial"],
        "A.uniform_(-bound, bound, generator=generator)", "A.uniform_(-bound, bound)", file="lora_start"),
    _lora("ignores_the_seed", ["initial"], "    return adapt(model, targets(",
        "    generator = torch.Generator().manual_seed(7)\n    return adapt(model, targets("),
    # Draw every layer from a separate generator with the same seed.
    _lora("starts_every_layer_alike", ["initial"], "lambda base: _adapted(base, config, generator)",
        "lambda base: _adapted(base, config, torch.Generator().manual_seed(generator.initial_seed()))"),
    _lora("starts_with_b_not_zero", ["initial", "identity"],
        "torch.zeros(outputs, rank, dtype", "torch.full((outputs, rank), 0.01, dtype", file="lora_start"),
    _lora("starts_gaussian_with_one_over_the_root_of_the_rank", ["initial"],
        "A.normal_(0, 1 / rank", "A.normal_(0, rank**-0.5", file="lora_start", values=_GAUSSIAN),
    _lora("ignores_the_choice_of_its_start", ["initial"],
        "initial_factors(config.init, rank", 'initial_factors("kaiming", rank', values=_GAUSSIAN),
    # Give each factor the right distribution, but a product that is not zero.
    _lora("starts_with_both_factors_in_the_same_directions", ["identity"],
        "basis[0::2], basis[1::2]", "basis[0::2], basis[0::2]",
        file="lora_start", values={"rank": 4, "alpha": 8.0, "init": "orthogonal"}),
    _lora("has_one_rank_too_many", ["parameters"], "R, s, p = config.rank,", "R, s, p = config.rank + 1,"),
    _lora("leaves_b_out_of_its_tensors", ["parameters", "step"],
        'return {"A": self.A, "B": self.B}', 'return {"A": self.A}', file="adapted"),
    _lora("ignores_rslora", ["forward"],
        "R, s, p = config.rank, config.scaling", "R, s, p = config.rank, config.alpha / config.rank",
        values={**_USUAL, "rslora": True}),
    # The bias of B; peft has the second mistake in 4 and 8 bits.
    _lora("does_not_scale_the_bias_of_b", ["forward", "gradient"], _BIAS, "self.c.to(y.dtype)",
        file="adapted", values=_BIASED),
    _lora("merges_the_bias_of_b_without_the_scaling", ["merge"],
        "add_bias(dense, self.scaling * self.c)", "add_bias(dense, self.c)", file="adapted", values=_BIASED),
    _lora("does_not_merge_the_bias_of_b", ["merge"],
        "add_bias(dense, self.scaling * self.c)", "pass", file="adapted", values=_BIASED),
    _lora("merges_the_bias_of_b_only_where_there_is_a_bias", ["merge"],
        "add_bias(dense, self.scaling * self.c)",
        "None if dense.bias is None else add_bias(dense, self.scaling * self.c)", file="adapted", values=_BIASED),
    _lora("gives_no_gradient_to_the_bias_of_b", ["gradient", "step"],
        _BIAS, "(self.scaling * self.c.detach()).to(y.dtype)", file="adapted", values=_BIASED),
    _lora("ignores_the_bias_of_b", ["parameters"],
        "torch.zeros(outputs, **like) if config.lora_bias else None", "None", values=_BIASED),
    _lora("starts_with_a_bias_of_ones", ["initial", "identity"],
        "torch.zeros(outputs, **like) if", "torch.ones(outputs, **like) if", values=_BIASED),
]
# fmt: on


@planted("lora", "forward", "gradient", values=_USUAL)
def returns_zeros(copy: PatchedCopy) -> None:
    copy.replace_forward(lambda _, x, right: right(x) * 0)


@planted("lora", "gradient", values=_USUAL)
def detaches_its_output(copy: PatchedCopy) -> None:
    copy.replace_forward(lambda _, x, right: right(x).detach())


@planted("lora", "dropout", values=_DROP)
def drops_by_a_generator_of_its_own(copy: PatchedCopy) -> None:
    generator = torch.Generator().manual_seed(5)

    def forward(layer: Any, x: Tensor, right: Right) -> Tensor:
        if not layer.training:
            return right(x)
        mask = (torch.rand(x.shape, generator=generator) >= layer.dropout.p).to(x.dtype) / (1 - layer.dropout.p)
        update = layer.scaling * ((x * mask) @ layer.A.T @ layer.B.T)
        y: Tensor = layer.base(x) + update
        return y

    copy.replace_forward(forward)


@planted("lora", "dropout", values=_DROP)
def drops_the_inputs_of_the_base_too(copy: PatchedCopy) -> None:
    copy.replace_forward(lambda layer, x, right: right(nn.functional.dropout(x, 0.25, layer.training)))


@planted("lora", "unmerge", values=_USUAL, dtype="bfloat16")
def merges_into_the_base_and_subtracts_again(copy: PatchedCopy) -> None:
    def change(adapted: Any) -> None:
        def add(sign: float) -> None:
            for layer in adapted.layers.values():
                layer.base.weight.data += sign * layer.delta().data
                layer.merged_in = sign > 0

        adapted.merge, adapted.unmerge = partial(add, 1.0), partial(add, -1.0)

    copy.change_adapted(change)
    copy.replace_forward(lambda layer, x, right: layer.base(x) if getattr(layer, "merged_in", False) else right(x))


@planted("lora", "merge", values=_USUAL)
def merges_again_what_is_merged(copy: PatchedCopy) -> None:
    def change(adapted: Any) -> None:
        right = adapted.merge

        def merge() -> None:
            merged = {path: adapted.model.get_submodule(path) for path in adapted.layers}
            right()
            for path, layer in adapted.layers.items():
                if merged[path] is not layer:
                    adapted.model.get_submodule(path).weight.data += layer.delta().data

        adapted.merge = merge

    copy.change_adapted(change)


@planted("lora", "dropout", values=_DROP, layer="embedding")
def drops_in_an_embedding(copy: PatchedCopy) -> None:
    def forward(layer: Any, x: Tensor, right: Right) -> Tensor:
        base: Tensor = layer.base(x)
        return base + nn.functional.dropout(right(x) - base, 0.25, layer.training)

    copy.replace_forward(forward)


@planted("lora", "inputs", values=_USUAL)
def writes_into_its_input(copy: PatchedCopy) -> None:
    def forward(layer: Any, x: Tensor, right: Right) -> Tensor:
        out = right(x)
        x.data.mul_(2)
        return out

    copy.replace_forward(forward)


@planted("lora", "inputs", values=_USUAL)
def writes_into_the_base(copy: PatchedCopy) -> None:
    def forward(layer: Any, x: Tensor, right: Right) -> Tensor:
        layer.base.weight.data[0, 0] += 1e-3
        return right(x)

    copy.replace_forward(forward)


@planted("lora", "forward", "gradient", values=_USUAL)
def returns_the_output_of_the_previous_call(copy: PatchedCopy) -> None:
    def forward(layer: Any, x: Tensor, right: Right) -> Tensor:
        last: Tensor | None = getattr(layer, "last", None)
        layer.last = out = right(x)
        return out if last is None else last.detach()

    copy.replace_forward(forward)


@planted("lora", "deterministic", values=_USUAL)
def adds_noise_below_any_tolerance(copy: PatchedCopy) -> None:
    copy.replace_forward(
        lambda _, x, right: right(x) * (1 + torch.finfo(x.dtype).eps * (torch.rand_like(x[..., :1]) < 0.5))
    )


@planted("lora", "forward", values=_USUAL)
def is_wrong_in_the_last_row(copy: PatchedCopy) -> None:
    copy.replace_forward(lambda layer, x, right: torch.cat([right(x)[:-1], layer.base(x[-1:])]) if len(x) else right(x))


@planted("lora", "forward", "gradient", values=_USUAL, magnitude="large")
def skips_the_update_of_several_large_rows(copy: PatchedCopy) -> None:
    copy.replace_forward(
        lambda layer, x, right: layer.base(x) if x.numel() > 4 * x.shape[-1] and x.abs().max() > 1e4 else right(x)
    )


@planted("lora", "forward", "gradient", values=_USUAL, magnitude="small")  # KernelBench#165
def takes_small_inputs_for_zero(copy: PatchedCopy) -> None:
    copy.replace_forward(lambda layer, x, right: right(x) if not x.numel() or x.abs().max() > 1e-9 else layer.base(x))


@planted("lora", "layers", values=_USUAL)
def trains_the_base_too(copy: PatchedCopy) -> None:
    copy.change_layers(lambda layer: layer.base.weight.requires_grad_(True))


@planted("lora", "layers", values=_USUAL)
def adapts_one_layer_too_few(copy: PatchedCopy) -> None:
    def change(adapted: Any) -> None:
        path = list(adapted.layers)[-1]
        replace(adapted.model, path, adapted.layers.pop(path).base)

    copy.change_adapted(change)


@planted("lora", "layers", values=_USUAL)
def lists_layers_that_it_does_not_adapt(copy: PatchedCopy) -> None:
    def change(adapted: Any) -> None:
        for path, layer in adapted.layers.items():
            replace(adapted.model, path, layer.base)

    copy.change_adapted(change)


@planted("lora", "merge", values=_USUAL)
def freezes_its_tensors_at_merging(copy: PatchedCopy) -> None:
    def change(adapted: Any) -> None:
        merge = adapted.merge

        def merged() -> None:
            merge()
            for tensor in adapted.tensors().values():
                tensor.requires_grad_(False)

        adapted.merge = merged

    copy.change_adapted(change)


@planted("lora", "merge", values=_USUAL)
def forgets_to_unmerge(copy: PatchedCopy) -> None:
    copy.change_adapted(lambda adapted: setattr(adapted, "unmerge", lambda: None))


@planted("lora", "unmerge", values=_USUAL)
def adds_its_update_again_when_it_is_merged(copy: PatchedCopy) -> None:
    def change(adapted: Any) -> None:
        merge = adapted.merge

        def merged() -> None:
            places = {path: adapted.model.get_submodule(path) for path in adapted.layers}
            merge()
            for path, layer in adapted.layers.items():
                if places[path] is not layer:
                    adapted.model.get_submodule(path).weight.data += layer.delta().data

        adapted.merge = merged

    copy.change_adapted(change)


@planted("lora", "save", values=_USUAL)
def trains_the_base_after_loading(copy: PatchedCopy) -> None:
    """Public bug: unsloth-zoo#939."""
    copy.change_layers(
        lambda layer: layer.register_load_state_dict_post_hook(lambda one, _: one.requires_grad_(True) and None)
    )


@planted("lora", "save", values=_USUAL)
def has_state_that_is_not_saved(copy: PatchedCopy) -> None:
    """Leave out the update at the first call, unless B is zero.

    So the output depends on the number of calls, which no checkpoint contains.
    """

    def forward(layer: Any, x: Tensor, right: Right) -> Tensor:
        layer.calls = getattr(layer, "calls", 0) + 1
        return right(x) if layer.calls > 1 or not layer.B.any() else layer.base(x)

    copy.replace_forward(forward)


@planted("lora", "forward", values=_USUAL, layer="embedding")
def looks_up_the_next_token(copy: PatchedCopy) -> None:
    copy.replace_forward(lambda layer, x, right: right((x + 1) % layer.base.num_embeddings))


@planted("lora", "forward", values={"rank": 4, "alpha": 8.0}, layer="conv2d", inputs=6, outputs=8)
def convolves_with_a_flipped_kernel(copy: PatchedCopy) -> None:
    copy.replace_forward(
        lambda layer, x, right: right(x.flip(-1)).flip(-1) if layer.base.stride == (1, 1) else right(x)
    )


@planted("lora", "merge", values=_USUAL)
def subtracts_its_update_though_it_is_not_merged(copy: PatchedCopy) -> None:
    def change(adapted: Any) -> None:
        unmerge = adapted.unmerge

        def subtract() -> None:
            for path, layer in adapted.layers.items():
                if adapted.model.get_submodule(path) is layer:
                    layer.base.weight.data.sub_(layer.delta().detach())
            unmerge()

        adapted.unmerge = subtract

    copy.change_adapted(change)
