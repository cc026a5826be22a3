"""`bitsandbytes`: 4-bit base weights. Its optimizers and FP4 are not offered yet."""

from __future__ import annotations

from typing import Any

from harness.registry import implements


@implements(
    "nf4", name="bitsandbytes", kind="base", dtypes=("float32", "bfloat16", "float16"), requires=["bitsandbytes"]
)
def nf4(model: Any, paths: list[str], dtype: Any) -> dict[str, tuple[Any, Any, int]]:
    """Replace the linear layers at `paths` by bitsandbytes' NF4 layers, in place; return path -> (bytes, absmax, block).

    Blocks of 64, no double quantisation; matrix products in `dtype`, biases kept in it.
    """
    import bitsandbytes
    import torch

    from reference.layers import replace

    forms = {}
    for path in paths:
        dense = model.get_submodule(path)
        device = dense.weight.device
        packed = bitsandbytes.nn.Linear4bit(
            dense.in_features,
            dense.out_features,
            bias=dense.bias is not None,
            compute_dtype=dtype,
            compress_statistics=False,
            quant_type="nf4",
            device="meta",
        )
        packed.weight = bitsandbytes.nn.Params4bit(
            dense.weight.detach().contiguous(),
            requires_grad=False,
            compress_statistics=False,
            quant_type="nf4",
            module=packed,
        ).to(device)
        if dense.bias is not None:
            packed.bias = torch.nn.Parameter(dense.bias.detach().clone(), requires_grad=False)
        # On CPUs with AVX512-BF16 its eval mode repacks the weight for good and computes in bfloat16 whatever
        # compute_dtype says (seen in 0.50.2); a later backward pass then has no gradient for the layer's input.
        packed.support_avx512bf16_for_cpu = False
        replace(model, path, packed.train(dense.training))
        state = packed.weight.quant_state
        forms[path] = (packed.weight.data.flatten(), state.absmax, state.blocksize)
    return forms
