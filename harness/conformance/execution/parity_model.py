"""ParityModel, the small model on which parity suites run. It has layers to adapt and layers that must not be adapted."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from harness.conformance.comparison.inputs import SIDE
from harness.conformance.comparison.observations import inference
from harness.conformance.comparison.stacked_experts import fixed_choice
from harness.conformance.normal_noise import normal_noise
from harness.conformance.parity_suite import GROUPS, CaseShape, Kind, ModelForm, WeightSize

_SIBLINGS = ("q_proj", "k_proj", "v_proj")
"""Names of the layers with one input in a `wide` model."""
_PAIRS = 4
"""Number of pairs of layers to adapt that a `deep` model has in addition to `first` and `second`."""
EXPERTS = 3
"""Number of stacked experts in one module. One of them gets no token."""
_WEIGHT_SIZES: dict[WeightSize, float] = {"normal": 1.0, "large": 256.0, "small": 1 / 256, "tiny": 2.0**-46}
_TINY_IN_FLOAT16 = 2.0**-14
"""Size of `tiny` weights in float16: the smallest normal float16. The weights are divided by sqrt(inputs), so most of
them are subnormal."""
_EMBED_SCALE = 4.0
_PADDING = 1
"""padding_idx of the first embedding in a model of the kind `embedding-scaled`. If this embedding has only one entry,
it is 0. The second embedding has padding_idx 0, which a program may mistake for None."""
_GEOMETRIES: dict[str, dict[str, Any]] = {
    "conv2d": {"padding": 1},
    "conv2d-dilated": {"padding": (2, 1), "dilation": (2, 1)},  # height and width differ
    "conv2d-reflect": {"padding": (2, 1), "padding_mode": "reflect"},
    "conv2d-grouped": {"padding": 1, "groups": GROUPS},
    "conv2d-pointwise": {"kernel_size": 2, "padding": "same"},  # pads one side more than the other
    "nn-conv1d": {"padding": 1},
    "conv3d": {"kernel_size": (3, 2, 1), "padding": (1, 0, 1)},  # depth, height and width differ
    "conv3d-pointwise": {"kernel_size": 1},
}
"""Kind of layer -> options of the first adapted convolution. Without a kernel size, it is 3."""
_SECOND_GEOMETRIES: dict[str, dict[str, Any]] = {
    "conv2d-pointwise": {"kernel_size": 1, "stride": 2, "padding": 1},  # as a ResNet reduces the size of its images
    "conv2d-reflect": {"kernel_size": 3, "stride": (2, 1), "padding": (2, 1), "padding_mode": "replicate"},
    "nn-conv1d": {"kernel_size": 3, "stride": 2, "padding": 1},
    "conv3d": {"kernel_size": 3, "stride": (2, 1, 1), "padding": 1},
    "conv3d-pointwise": {"kernel_size": 1, "stride": 2},
}
"""Kind of layer -> options of the second adapted convolution. A kind without an entry uses the options of the first
adapted convolution with another stride."""
_CLASSES = {"nn-conv1d": nn.Conv1d, "conv2d": nn.Conv2d, "conv3d": nn.Conv3d}
"""Prefix of a kind of convolution -> its class. The first has one spatial dimension, the second two, the third three."""


class ParityModel(nn.Module):
    """A model of three layers: `first` (D to E features), `other` (E to E) and `second` (E to D).

    A Method adapts `first` and `second`, but never `other`. `second` has no bias if its kind of layer allows that. With
    stacked experts, D is the smaller of the two sizes, each layer maps D to D features, and the experts of `first` have E
    features in between. Those of `second` are stored transposed, and one of their parameters is square, so that its shape
    does not show this. The adapted module `more.0` has experts without a gate. An embedding `second` maps D ids to E
    features, as `first` does.

    The form `wide` adds the layer `wide` (D + E to D + E features). It is never adapted, and is larger than every
    adapted layer in both dimensions. In this form, every layer has a bias. If its layers are linear, it also adds the
    adapted layers `attention.q_proj`, `attention.k_proj` and `attention.v_proj`, which get the same input as `first`. A
    program may compute layers of these names together. The form `deep` adds the adapted layers `more.0` to `more.7`.
    The form `tied` adds the adapted layer `again`, which has the same weight as `first`, and freezes every parameter.

    Weights are normal with standard deviation 1/sqrt(inputs), the same in every dtype. weights: name of the factor by which
    the weights of all layers except `other` are multiplied.
    """

    def __init__(
        self,
        kind: Kind,
        shape: CaseShape,
        dtype: torch.dtype,
        seed: int,
        form: ModelForm = "plain",
        weights: WeightSize = "normal",
    ) -> None:
        super().__init__()
        self.kind, D, E = kind, shape.inputs, shape.outputs
        if kind == "experts":
            D, E = min(D, E), max(D, E)
        self.first, self.other, self.second = _layers(kind, D, E)
        self.wide: nn.Linear | None = None
        self.attention = nn.ModuleDict()
        if form == "wide":
            self.second, self.wide = _layers(kind, E, D)[0], nn.Linear(D + E, D + E)
            if kind == "linear":
                self.attention.update({name: nn.Linear(D, E) for name in _SIBLINGS})
        pairs = [_layers(kind, D, E, swapped=n % 2 == 1) for n in range(_PAIRS if form == "deep" else 0)]
        self.more = nn.ModuleList(layer for there, _, back in pairs for layer in (there, back))
        self.again: nn.Module | None = None
        if form == "tied":
            self.again = _layers(kind, D, E, swapped=True)[0]
            self.again.weight = self.first.weight
        if kind == "experts":
            self.more = nn.ModuleList([_ungated_experts(D, E)])
        further = ["again"] if self.again is not None else [f"more.{index}" for index in range(len(self.more))]
        further += [f"attention.{name}" for name in self.attention]
        self.targets = ("first", "second", *further)
        size = _TINY_IN_FLOAT16 if weights == "tiny" and dtype == torch.float16 else _WEIGHT_SIZES[weights]
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            drawn = normal_noise(parameter.shape, generator)
            fan_in = D if kind.startswith("embedding") else max(1, parameter.numel() // max(parameter.shape[0], 1))
            fan_in = parameter.shape[-1] if parameter.dim() == 3 and kind == "experts" else fan_in
            own_size = 1.0 if name.startswith("other.") else size
            parameter.data = (drawn * (own_size * fan_in**-0.5)).to(dtype)
        self.x = _input(kind, D, generator, dtype)
        self.requires_grad_(form != "tied")

    @property
    def terms(self) -> int:
        """Largest number of terms in a sum over the inputs or outputs of a layer to adapt."""
        weights = [weight for path in self.targets for weight in self.get_submodule(path).parameters()]
        if self.kind == "experts":
            return max(side for weight in weights for side in weight.shape)
        return max(max(len(weight), math.prod(weight.shape[1:])) for weight in weights)

    def forward(self, x: Tensor) -> Tensor:
        """Return the output of the whole model for x."""
        y: Tensor
        if self.kind.startswith("embedding"):
            y = self.other(self.first(x) + self.second(x))
        elif self.kind == "experts":
            rows = x.flatten(0, 1)
            choice = fixed_choice(EXPERTS, rows)
            y = self.second(torch.tanh(self.other(self.first(rows, *choice))), *choice).view_as(x)
            y = y + self.more[0](rows, *choice).view_as(x)
        else:
            h = self.first(x) if self.again is None else self.first(x) + self.again(x.flip(-1))
            if self.attention:
                q, k, v = (layer(x) for layer in self.attention.values())
                h = h + torch.tanh(q) * torch.tanh(k) + v
            h = torch.tanh(h)
            y = self.second(torch.tanh(self.other(h)))
            if self.wide is not None:
                y = y + self.wide(torch.cat([x, h], dim=-1))[..., : y.shape[-1]]
            for there, back in zip(self.more[::2], self.more[1::2], strict=True):
                y = y + back(torch.tanh(there(x)))
        return y


class _ScaledEmbedding(nn.Embedding):
    """An embedding that multiplies its output by a constant, as the embeddings of BART and Gemma do."""

    embed_scale = _EMBED_SCALE

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * self.embed_scale


def is_built(kind: Kind, form: ModelForm) -> bool:
    """Return whether ParityModel has this form for this kind of layer. Only linear layers and Conv1D have all forms."""
    return form == "plain" or kind in ("linear", "conv1d")


def _layers(kind: Kind, D: int, E: int, *, swapped: bool = False) -> tuple[nn.Module, nn.Module, nn.Module]:
    """Return the layers `first`, `other` and `second` of a ParityModel for D and E features.

    swapped: for linear layers, False gives only the first two a bias, and True only the last two.
    """
    if kind == "linear":
        return nn.Linear(D, E, bias=not swapped), nn.Linear(E, E), nn.Linear(E, D, bias=swapped)
    if kind == "embedding":
        return nn.Embedding(D, E), nn.Linear(E, E), nn.Embedding(D, E)
    if kind == "embedding-scaled":
        return (
            _ScaledEmbedding(D, E, padding_idx=min(_PADDING, D - 1)),
            nn.Linear(E, E),
            nn.Embedding(D, E, padding_idx=0, scale_grad_by_freq=True),
        )
    if kind == "experts":
        return _experts(D, E), nn.Linear(D, D), _transposed_experts(D)
    if dimensions := _dimensions(kind):
        convolution: Any = list(_CLASSES.values())[dimensions - 1]
        geometry = _GEOMETRIES[kind]
        D, E = _channels(kind, D), _channels(kind, E)
        back = _SECOND_GEOMETRIES.get(kind, {"kernel_size": 3, "stride": (2, 1), **geometry})
        return (
            convolution(D, E, **{"kernel_size": 3, **geometry}),
            convolution(E, E, 1),
            convolution(E, D, bias=False, **back),
        )
    from transformers.pytorch_utils import Conv1D

    return Conv1D(E, D), Conv1D(E, E), Conv1D(D, E)


def _experts(D: int, E: int) -> nn.Module:
    """Return Mixtral's stacked experts, which map D to D features, with E features in between."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    config = MixtralConfig(hidden_size=D, intermediate_size=E, num_local_experts=EXPERTS)
    config._experts_implementation = "eager"
    return MixtralExperts(config)  # type: ignore[no-any-return]


def _transposed_experts(D: int) -> nn.Module:
    """Return the stacked experts of GPT-OSS, which have biases. They map D to D features.

    With D / 2 features in between, `gate_up_proj` is square. If D is odd, there are D, and `down_proj` is square.
    """
    from transformers import GptOssConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

    between = D if D % 2 else D // 2
    config = GptOssConfig(hidden_size=D, intermediate_size=between, num_local_experts=EXPERTS)
    config._experts_implementation = "eager"
    return GptOssExperts(config)  # type: ignore[no-any-return, no-untyped-call]


def _dimensions(kind: Kind) -> int:
    """Return the number of spatial dimensions of a convolution. For other kinds of layers, return 0."""
    return next((n for n, name in enumerate(_CLASSES, start=1) if kind.startswith(name)), 0)


def _channels(kind: Kind, features: int) -> int:
    """Return the number of channels such that a kernel with sides of 3 reads about `features` numbers.

    For a grouped convolution, it is a multiple of GROUPS.
    """
    channels = max(2, features // [1, 3, 9, 27][_dimensions(kind)])
    return channels - channels % GROUPS if kind == "conv2d-grouped" else channels


def _ungated_experts(D: int, E: int) -> nn.Module:
    """Return the stacked experts of Nemotron-H, which have no gate: the matrices are `up_proj` and `down_proj`."""
    from transformers import NemotronHConfig
    from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

    config = NemotronHConfig(hidden_size=D, moe_intermediate_size=E, n_routed_experts=EXPERTS)
    config._experts_implementation = "eager"
    return NemotronHExperts(config)  # type: ignore[no-any-return, no-untyped-call]


def _input(kind: Kind, D: int, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    if kind.startswith("embedding"):
        ids = torch.randint(0, D, (2, 5), generator=generator)
        if kind == "embedding-scaled":
            ids[0, -1], ids[1, 0] = min(_PADDING, D - 1), 0
        return ids
    dimensions = _dimensions(kind)
    shape = (2, _channels(kind, D), *[SIDE] * dimensions) if dimensions else (2, 5, D)
    return normal_noise(shape, generator).to(dtype)


def whole(model: nn.Module) -> tuple[Callable[[], Tensor], Callable[[nn.Module], Tensor]]:
    """Return two functions that return a model's output for fixed inputs.

    The first runs `model` in eval mode, without gradients. The second runs the model that it is given, with gradients.
    """

    def forward(some: nn.Module) -> Tensor:
        weight = some.get_parameter("other.weight")
        x = cast("ParityModel", model).x.to(weight.device)
        y: Tensor = some(x.to(weight.dtype) if x.is_floating_point() else x)
        return y

    return inference(model, lambda some: forward(some.eval())), forward
