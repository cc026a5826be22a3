"""Our optimised Operations.

`torch/` and `triton/` hold one file per Operation under the same name. A torch Operation dispatches to Triton where
`device.by_triton` allows it, and for NF4 on a CPU to `cpp/`. Helpers are in `torch/support/` and `triton/support/`,
ahead-of-time compilation in `compile/`. No file here imports `reference`, which judges these Operations.
"""
