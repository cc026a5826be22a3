"""Our optimised Operations: functions such as `lora_linear`, one file each.

`torch/` and `triton/` each have a file for an Operation, under the same name. The torch file calls the Triton file
where `device.by_triton` allows it. Helpers are in `torch/support/` and `triton/support/`, ahead-of-time compilation in
`compile/`. No file here imports `reference`, because `reference` judges these Operations.
"""
