"""Our optimised Operations.

`torch/` and `triton/` hold one file per Operation under the same name; a torch Operation dispatches to Triton where
`device.by_triton` allows it. Helpers are in their `support/` packages, ahead-of-time compilation in `compile/`. Never
imports `reference`, which judges these Operations.
"""
