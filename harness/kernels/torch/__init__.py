"""Our Operations in plain torch, for the CPU; they hand over to `kernels/triton` on a GPU."""
