"""Entry point for peft-harness: `check plain`. Heavy modules are imported on first use."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

from harness import implements

NAME = "plain"

# Method: module and function that attaches it, and what it offers beyond the first settings and layers.
METHODS: dict[str, tuple[str, str, list[str]]] = {
    "lora": ("lora", "attach", ["lora_bias", "nn.Conv1d", "Conv3d"]),
    "dora": ("dora", "attach", ["nn.Conv1d", "Conv3d"]),
    "adalora": ("adalora", "attach", ["Conv2d"]),
    "pissa": ("pissa", "attach", []),
    "vera": ("vera", "attach", []),
    "loha": ("weight_updates", "attach_loha", []),
    "lokr": ("weight_updates", "attach_lokr", []),
    "oft": ("oft", "attach", []),
    "full": ("whole_model", "attach_full", []),
    "frozen": ("whole_model", "attach_frozen", []),
    "galore": ("galore", "attach", []),
    "qlora": ("quantised", "attach_qlora", ["lora_bias", "experts"]),
    "lora_int8": ("quantised", "attach_lora_int8", []),
}


# Base: function of `quantised` that packs the layers of a model.
BASES = {"nf4": "nf4_base", "nf4-dq": "nf4_dq_base"}

# Module: the operations that it has, each a function of that name.
OPERATIONS: dict[str, tuple[str, ...]] = {
    "nf4": ("nf4_quantize", "nf4_dequantize", "fp4_quantize", "fp4_dequantize"),
    "blockwise": ("dynamic_quantize", "double_quantize", "double_dequantize"),
    "int8": ("int8_linear",),
    "galore": ("galore_step", "galore8bit_step"),
    "linear_ops": (
        "dora_linear",
        "lora_experts",
        "lora_linear",
        "lora_mlp",
        "lora_qkv",
        "multi_lora_linear",
        "nf4_linear",
        "nf4_lora_linear",
        "vera_linear",
    ),
    "optimizers": (
        "adalora_importance",
        "adamw8bit_step",
        "lamb8bit_step",
        "lion8bit_step",
        "lorafa_step",
        "loraplus_groups",
        "paged_adamw",
        "paged_states",
        "riemannian_lora_step",
    ),
}


def _late(target: str, module: str, function: str, **options: Any) -> Callable[..., Any]:
    """Return an implementation that imports its module when it is called."""

    @implements(target, name=NAME, dtypes=["float64", "float32", "bfloat16", "float16"], **options)
    def call(*args: Any, **kwargs: Any) -> Any:
        return getattr(import_module(f"plain_torch.{module}"), function)(*args, **kwargs)

    return call


def implementations() -> list[Callable[..., Any]]:
    """Return everything that this package offers."""
    methods = [_late(name, module, function, offers=offers) for name, (module, function, offers) in METHODS.items()]
    bases = [_late(name, "quantised", function) for name, function in BASES.items()]
    return methods + bases + [_late(name, module, name) for module, names in OPERATIONS.items() for name in names]
