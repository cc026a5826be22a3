"""Definitions of the terms that only `explain` defines. No torch."""

from __future__ import annotations

from harness.analysis import contention
from harness.records.record import Optimizer, Status

STATUSES = {
    Status.OK: "the Cell was measured, and every check before and after the measurement passed",
    Status.NONCONFORMING: "the implementation does not compute its Method, or training diverged; nothing was measured",
    Status.OOM: "the device or the machine ran out of memory; a result like any other, it stays in every table",
    Status.TIMEOUT: "the Cell was stopped after --timeout seconds, or at the time limit of its Slurm job",
    Status.ERROR: "the worker ended with an exception; the Record has its traceback",
    Status.SKIPPED: "the Cell could not run here; the Record has the reason",
    Status.LOST: "the worker disappeared: it was killed from outside (with --jobs in a container possibly by the "
    "kernel, for lack of memory), or the machine went down",
}
OPTIMIZERS: dict[Optimizer, str] = {
    "adamw": "torch's AdamW, for every Cell except those of a Method with an optimizer of its own (galore, with "
    "moments in the dtype of the gradient). Weights that train in 16 bits have float32 master weights, with every "
    "optimizer",
    "adamw-8bit": "AdamW with 8-bit moments and one float32 absmax per 256 of them (arXiv:2110.02861): a quarter of "
    "the bytes of the moments. A tensor of fewer than 4096 elements has 32-bit moments, and factors of a low rank "
    "often are that small; the Record has their number. Cells of `reference` use the code of the reference, other "
    "Cells harness/kernels, and galore its own code, on moments of the projected gradient",
    "paged-adamw": "adamw with the states of tensors of at least 100,000 elements in host memory; each comes to the "
    "GPU for its own update only (QLoRA, arXiv:2305.14314, section 3). The steps are equal bit by bit. On a CPU it "
    "takes time and saves nothing. Cells of `reference` use the code of the reference, other Cells harness/kernels",
    "paged-adamw-8bit": "adamw-8bit with its states paged as those of paged-adamw",
}
CHECK_RESULTS = {
    "attach": "fails if an implementation raises when it is attached to a model, or does not return an Adapted",
    "alive": "fails if an implementation crashes, hangs (--patience), leaves a process behind, or cannot be "
    "imported although it is installed; its remaining cases are not run",
    "unsupported": "a case that an implementation does not offer: it raised harness.Unsupported. A plain "
    "NotImplementedError is a failure, since torch raises it too",
}
"""Results of `check` other than the checks of a parity suite."""
CELL_CHECKS = {
    "frozen": "fails if training changed a parameter of the model that must not train",
    "moved": "fails if a tensor that trains kept its first value in every step",
    "multi-adapter": "several adapters in one batch, after training: each row must equal what the float64 reference "
    "computes with the row's own adapter, or no time of it is shown; skipped, with the reason, if that could not be "
    "tested",
}
"""Checks of a Cell after its training."""
TERMS = {
    "cell": "one combination of a suite's axes: model, task, Method, implementation, base, config, dtype, "
    "optimizer, seed. Its cell_id is a hash of these. Each Cell runs in its own process and gives one Record per "
    "attempt",
    "record": "the JSON file of one attempt at a Cell: its status, measurements, checks and environment",
    "method": "a way to adapt a model, defined by its paper, e.g. lora; `peft-harness list methods`. In reference/ "
    "there is one file per Method",
    "implementation": "code that computes a Method, an Operation or a base, e.g. `fused` or `hf-peft`; "
    "`peft-harness list implementations`",
    "operation": "a function that implementations of several Methods need, e.g. nf4_dequantize",
    "check": "a test of an implementation against the float64 reference; `peft-harness list checks`",
    "claim": "a sentence of a paper that can be computed again; `peft-harness claims`",
    "baseline": "a run in results/baselines that later runs are compared with; `peft-harness baseline promote`",
    "parity": "an implementation computes the same numbers as the reference, within the tolerance of its checks. "
    "Without parity no speed is shown",
    "fused": "the implementation of peft-harness itself, with the optimised operations of harness/kernels",
    "tied": "the difference to the best is smaller than the run can detect with its seeds and test items; not a "
    "proof that both are equal",
    "busy": contention.RULE,
    "reproducibility": "two runs of the same Cell have equal losses, bit by bit; `peft-harness report RUN RUN` "
    "compares them",
    "memory": "a prediction from the shapes of a model, for texts of the maximum length: weights, adapter, "
    "gradients, optimizer states and activations. Activations have formulas for Llama-like models only, logits if "
    "every token has a loss. Where the code can run on fake tensors, a training step on a CPU is simulated, and the "
    "larger of both numbers counts. Not included: allocator overhead, kernel workspaces, evaluation and latency. "
    "`peft-harness fit` shows the parts",
    "none": "as a `base`: the frozen weights are not quantised",
    "rank": "the inner width of an adapter's two factors: an update of shape in x out has factors of shapes in x "
    "rank and rank x out; for GaLore, the width of the projected gradient",
    "nf4": "a base with frozen weights in 4-bit NormalFloat codes and one float32 constant per block of 64: 4.5 "
    "bits per parameter (QLoRA, arXiv:2305.14314, section 3). In a suite: `base: {quantization: nf4, "
    "implementation: fused}`; `peft-harness list implementations` shows who offers it",
    "nf4-dq": "nf4 with double quantisation: the constants of the blocks have 8 bits, 4.127 bits per parameter (QLoRA, "
    "arXiv:2305.14314, section 3). In a suite: `base: {quantization: nf4-dq, implementation: fused}`",
    "reference": "the implementation that the others are compared with: the Method as in its paper, in plain torch, "
    "computed in float64",
    "canary": "a comparison of a revision with itself, which shows how often `gate --pairs` raises a false alarm on "
    "this machine: results/canaries.jsonl has the alarms per machine, and too many of them close the gate",
    "pairs": "process runs of two revisions in turn, so that both have the same machine: `peft-harness gate "
    "--pairs` and `history settle`",
    "place": "a machine with its driver, torch, Triton and number of threads; times of two places are never joined",
    "anchor": "of a night of `history`: the median over all series of value / usual value, by which times are divided",
    "sentinel": "a measurement whose code does not change (latencies of the bare base models, Cells of `detect "
    "--sentinel`): if it changes, the machine has changed",
    "tier": "the resources that a claim of a paper needs: exact (arithmetic or a small tensor), gpu-synthetic (a "
    "GPU and random weights of the true shape) or trained (training on data, here at small scale)",
    "headline": "of a claim: the headline of its paper that it is part of; `peft-harness claims --headlines`",
    "stand-in": "a smaller model or run than the paper's own (a rehearsal, a small model) that reproduces a claim; "
    "if it does not, the claim is not refuted",
    "history": "the results of nightly runs, in results/history. `peft-harness history add` stores them; `history "
    "detect` finds changes; `history settle` confirms suspected changes by pairs of runs; `history confirm` records "
    "a person's verdict on a change; `history reset` accepts a level; `history show` prints the series. Each has "
    "`--help`",
}
SAME = {
    "detect": "history", "settle": "history", "confirm": "history", "reset": "history", "sentinels": "sentinel",
    "cells": "cell", "records": "record",
}  # fmt: skip
"""Terms explained under another name."""
