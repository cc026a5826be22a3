"""Our optimised Operations: functions such as `lora_linear`, one file each.

`torch/` has these files. Most have a counterpart of the same name in `triton/`, which the torch file calls where the
functions in `device` allow it. For NF4 on a CPU, the torch file calls `cpp/` instead. Helpers are in `torch/support/` and
`triton/support/`, ahead-of-time compilation in `compile/`. No file here imports `reference`, because `reference` judges
these Operations.
"""
