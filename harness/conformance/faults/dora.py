"""Planted faults of DoRA."""

from __future__ import annotations

from functools import partial

from harness.conformance.faults import FaultCase, line_fault

_USUAL = {"rank": 3, "alpha": 8.0}
CASE = FaultCase(values=_USUAL)
_G = "return gain(self.m, norm.detach() if self.detach_norm else norm)"

_dora = partial(line_fault, "dora", values=_USUAL)

# fmt: off
FAULTS = [
    # Take the norm over the wrong axis, which does not change the shapes on a square layer.
    _dora("takes_the_norm_of_the_other_axis", ["forward", "norm"],
        'dim=1 if per == "output" else 0', 'dim=0 if per == "output" else 1', inputs=32, outputs=32),
    _dora("has_a_magnitude_for_each_input", ["parameters"],
        "self.detach_norm, self.per = config.detach_norm, config.per",
        'self.detach_norm, self.per = config.detach_norm, "input"'),
    _dora("does_not_detach_the_norm", ["gradient", "step"], "norm.detach() if self.detach_norm else norm", "norm"),
    _dora("always_detaches_the_norm", ["gradient"],
        "norm.detach() if self.detach_norm else norm", "norm.detach()", values={**_USUAL, "detach_norm": False}),
    _dora("does_not_apply_the_magnitude", ["forward", "gradient"], _G, "return torch.ones_like(norm)"),
    _dora("takes_the_norm_of_the_base", ["forward", "gradient"],
        "norm = norms(self.direction(W0_ED), self.per)", "norm = norms(W0_ED, self.per)"),
    # Keep the norm until the version of A or B rises, which a fused optimizer does not do.
    _dora("keeps_the_norm_until_a_version_rises", ["trajectory"],
        "norm = norms(self.direction(W0_ED), self.per)",
        "key = (self.A._version, self.B._version)\n"
        "        if self.__dict__.get('_key') != key:\n"
        "            self.__dict__.update(_key=key, _norm=norms(self.direction(W0_ED), self.per).detach())\n"
        "        norm = self._norm"),
    # torchtune#2250
    _dora("never_trains_the_magnitude", ["gradient", "step"], _G, _G.replace("self.m", "self.m.detach()")),
    # unsloth-zoo#954: `use_dora` is ignored.
    _dora("is_plain_lora", ["parameters", "forward"],
        'return {**super().tensors(), "m": self.m}', "return super().tensors()", _G, "return torch.ones_like(norm)"),
    # fsdp_qlora#68
    _dora("ignores_alpha_and_dropout", ["forward", "dropout"],
        "config.alpha / config.rank, config.dropout)\n        self.detach_norm, self.per",
        "1.0, 0.0)\n        self.detach_norm, self.per", values={**_USUAL, "dropout": 0.5}),
    _dora("leaves_the_scaling_out_of_the_norm", ["forward"],
        "norm = norms(self.direction(W0_ED), self.per)", "norm = norms(W0_ED + self.B @ self.A, self.per)"),
    _dora("does_not_scale_the_base", ["forward"],
        "(g - 1) * (dropped_TD @ W0_ED.T) + g * self.scaling", "g * self.scaling"),
    # peft#2049
    _dora("divides_by_zero_rows", ["zero_rows"],
        "return torch.where(some, m, 0.0) / torch.where(some, norm, 1.0)", "return m / norm"),
    _dora("takes_the_gain_of_zero_rows_for_one", ["zero_rows"],
        "torch.where(some, m, 0.0)", "torch.where(some, m, 1.0)"),
    _dora("guards_the_norm_by_a_number_that_weights_may_have", ["identity"],
        "return torch.where(some, m, 0.0) / torch.where(some, norm, 1.0)", "return m / norm.clamp(min=1e-12)",
        weights="tiny"),
    _dora("starts_with_magnitudes_of_one", ["norm", "identity"],
        "nn.Parameter(norms(self.direction(dense_weight(base)), self.per).detach())",
        "nn.Parameter(torch.ones(base.out_features))"),
    # mlx-examples#832: `base` gets its weight after the magnitudes are computed.
    _dora("starts_with_the_magnitudes_of_a_random_layer", ["norm", "identity"],
        "nn.Parameter(norms(self.direction(dense_weight(base)), self.per).detach())",
        "nn.Parameter(norms(nn.Linear(base.in_features, base.out_features).weight).detach())"),
    _dora("merges_without_the_magnitude", ["norm", "merge"],
        "g = gain(self.m, norms(V_ED, self.per))", "g = torch.ones_like(norms(V_ED, self.per))"),
    _dora("merges_a_square_conv1d_transposed", ["merge"],
        'W_ED.T if kind_of(base) in ("Conv1D", "embedding") else W_ED',
        "W_ED", file="layers", layer="conv1d", inputs=32, outputs=32),
    _dora("takes_the_norm_of_a_square_conv1d_transposed", ["forward", "norm"],
        "base.weight.T.contiguous()", "base.weight.detach().contiguous()", file="layers",
        layer="conv1d", inputs=32, outputs=32),
    _dora("takes_the_norm_of_each_entry_of_a_table", ["forward", "norm"],
        "self.m = nn.Parameter(norms(self.direction()).detach())",
        "self.m = nn.Parameter(norms(self.direction(), 'input').detach())",
        "self.gain(norms(self.direction()))", "self.gain(norms(self.direction(), 'input'))",
        layer="embedding", inputs=32, outputs=32),
    _dora("scales_only_the_table", ["forward", "gradient"],
        "return self.gain(norms(self.direction())) * super().forward(ids_T)",
        "g = self.gain(norms(self.direction()))\n"
        "        return super().forward(ids_T) + (g - 1) * self.base(ids_T)", layer="embedding"),
    _dora("takes_the_norm_of_each_input_channel", ["forward", "norm"],
        "return norms(V.flatten(1)).view(", "return norms(V.transpose(0, 1).flatten(1)).view(",
        layer="conv2d", inputs=36, outputs=36),
    _dora("leaves_the_last_axis_of_a_conv3d_out_of_the_norm", ["forward", "norm"],
        "norms(V.flatten(1)).view(", "norms((V[..., 0] if V.dim() == 5 else V).flatten(1)).view(", layer="conv3d"),
    _dora("takes_the_norm_of_nn_conv1d_as_that_of_conv1d", ["forward", "norm"],
        "norms(V.flatten(1)).view(", "norms((V.transpose(0, 1) if V.dim() == 3 else V).flatten(1)).view(",
        layer="nn-conv1d", inputs=36, outputs=36),
    _dora("takes_the_weight_of_a_convolution_for_a_constant_in_the_norm", ["calls"],
        "return self.base.weight + self.delta()", "return self.base.weight.detach() + self.delta()",
        layer="conv2d", values={**_USUAL, "detach_norm": False}),
    _dora("scales_only_the_kernel", ["forward", "gradient"],
        "return y + g * self.scaling * low", "return y + self.scaling * low", layer="conv2d"),
    # peft's shape of the norms, which adds a dimension to an image without a batch dimension.
    _dora("adds_a_batch_dimension_to_an_image", ["calls"], "[0]  # x may", "  # x may", layer="conv2d"),
    _dora("does_not_drop_before_a_convolution", ["dropout"],
        "dropped = self.dropout(x)", "dropped = x", layer="conv2d", values={**_USUAL, "dropout": 0.5}),
]
# fmt: on
