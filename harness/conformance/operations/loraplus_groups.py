"""loraplus_groups: the learning rate and weight decay of each tensor in LoRA+, and AdamW's first step with them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Annotated, Any

import torch
from torch import Tensor

from harness.conformance.drawing.factors import Eps, Factor, LearningRate, WeightDecay
from harness.conformance.operation import Arguments, Operation, draw
from reference.operations.loraplus import loraplus_step

Width = Annotated[int, Factor((8, 5, 1, 33), least=1, most=64)]
Rank = Annotated[int, Factor((3, 1, 8), least=1, most=64)]
Layers = Annotated[int, Factor((2, 1, 3), least=1, most=4)]
Ratio = Annotated[float, Factor((16.0, 1.0, 4.0), (0.5, 100.0), least=0.0, most=32.0)]
EmbeddingRate = Annotated[float, Factor((1e-6, 0.05), (0.0,), least=0.0, most=0.1)]
Embedding = Annotated[str, Factor(("none", "adapted"))]
Vector = Annotated[str, Factor(("none", "lora-bias", "magnitude"), optional=True)]
Norm = Annotated[str, Factor(("none", "layer-norm", "rms-norm", "post-norm2"), optional=True)]
Head = Annotated[str, Factor(("none", "trained", "value"))]
First = Annotated[str, Factor(("frozen", "trained"))]
Order = Annotated[str, Factor(("as created", "reversed", "gradients rotated"))]
_VECTORS = {"lora-bias": "lora_B.bias", "magnitude": "lora_magnitude_vector"}


def arguments(
    dtype: torch.dtype,
    generator: torch.Generator,
    *,
    layers: Layers,
    width: Width,
    rank: Rank,
    embedding: Embedding = "none",
    vector: Vector = "none",
    norm: Norm = "none",
    head: Head = "none",
    first: First = "frozen",
    order: Order = "as created",
    lr: LearningRate = 0.1,
    ratio: Ratio = 16.0,
    lr_embedding: EmbeddingRate = 1e-6,
    weight_decay: WeightDecay = 0.1,
    eps: Eps = 1e-3,
) -> Arguments:
    """Draw the tensors of a model, their gradients, and the settings.

    The model has `layers` adapted linear layers `linear0`, ... with `width` inputs and `width + 1` outputs. Their weights
    are frozen. first: `trained` lets the weight of `linear0` train, too. embedding: `adapted` adds an embedding `embed`
    with LoRA. vector: what each adapter has besides A and B: nothing, the bias of B (peft's `lora_bias`), or the
    magnitude of DoRA. norm: name of the norm layer to add, which is trained. head: `trained` adds a trained linear layer
    `head` without adapter (peft's `modules_to_save`), and `value` one with a single output, as of a reward model. order:
    order of all dicts; `reversed` begins with the last layer, and each B comes before its A. With `gradients rotated`,
    the second half of the gradients comes first. ratio: learning rate of B divided by lr. lr_embedding: learning rate of
    the embedding's A and B.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for n in range(layers):
        shapes |= {
            f"linear{n}.weight": (width + 1, width),
            f"linear{n}.lora_A": (rank, width),
            f"linear{n}.lora_B": (width + 1, rank),
        }
        if vector != "none":
            shapes[f"linear{n}.{_VECTORS[vector]}"] = (width + 1,)
    if embedding == "adapted":
        shapes |= {
            "embed.weight": (11, width),
            "embed.lora_embedding_A": (rank, 11),
            "embed.lora_embedding_B": (width, rank),
        }
        if vector == "magnitude":
            shapes[f"embed.{_VECTORS[vector]}"] = (width,)
    if norm != "none":
        shapes[f"{norm.replace('-', '_')}.weight"] = (width,)
    if norm == "layer-norm":
        shapes["layer_norm.bias"] = (width,)
    if head != "none":
        outputs = 1 if head == "value" else 4
        shapes |= {"head.weight": (outputs, width), "head.bias": (outputs,)}
    shapes = dict(reversed(shapes.items())) if order == "reversed" else shapes
    tensors = {name: draw(generator, dtype, *shape) for name, shape in shapes.items()}
    frozen = [name for name in shapes if name.endswith(".weight") and name.startswith(("linear", "embed"))]
    if first == "trained":
        frozen.remove("linear0.weight")
    gradients = {name: draw(generator, dtype, *shape) for name, shape in shapes.items() if name not in frozen}
    items, half = list(gradients.items()), len(gradients) // 2 * (order == "gradients rotated")
    return {
        "tensors": tensors,
        "gradients": dict([*items[half:], *items[:half]]),
        "frozen": frozen,
        "lr": lr,
        "ratio": ratio,
        "lr_embedding": lr_embedding,
        "weight_decay": weight_decay,
        "betas": (0.9, 0.999),
        "eps": eps,
    }


def reference(
    tensors: Mapping[str, Tensor], gradients: Mapping[str, Tensor], frozen: Collection[str], **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the learning rates (n,) and the weight decays (n,) in float64, and one vector with all tensors after the
    first step.

    All three are in the order of `tensors`. frozen: names of the tensors that do not train; their learning rate and
    weight decay are 0. options: lr, ratio, lr_embedding, weight_decay, betas and eps.
    """
    after = list(loraplus_step(tensors, gradients, frozen, **options).values())
    lrs, decays = (torch.tensor([one[index] for one in after], dtype=torch.float64) for index in (0, 1))
    device = next(iter(tensors.values())).device
    return lrs.to(device), decays.to(device), torch.cat([one[2].flatten() for one in after])


OPERATION = Operation("loraplus_groups", ("lr", "weight_decay", "after"), arguments, reference)
