"""Words of the README and of `list` that no file of one thing defines, for `explain`. No torch here."""

from __future__ import annotations

WORDS = {
    "none": "of `base`: the frozen weights are not quantised",
    "rank": "the inner width of an adapter's two factors: of an update of in x out, `rank` columns of one and rows of the "
    "other; of GaLore, the width of the projected gradient",
    "nf4": "a base whose frozen weights are 4-bit NormalFloat codes with a float32 constant for each block of 64: 4.5 bits "
    "a parameter (QLoRA, arXiv:2305.14314, section 3). In a suite: `base: {quantization: nf4, implementation: fused}`; "
    "`peft-harness list implementations` shows who offers it",
    "nf4-dq": "nf4 with double quantisation: the constants of its blocks are kept in 8 bits, 4.127 bits a parameter (QLoRA, "
    "arXiv:2305.14314, section 3). In a suite: `base: {quantization: nf4-dq, implementation: fused}`",
    "reference": "the implementation that the others are judged by: the Method as its paper says it, in plain torch, "
    "computed in float64",
    "canary": "a comparison of a revision with itself, by which `gate --pairs` learns how often it alarms where nothing "
    "changed: results/canaries.jsonl counts the alarms per machine, and too many of them close the gate",
    "pairs": "process runs of two revisions, side by side and in turn, so that the machine is the same for both: "
    "`peft-harness gate --pairs`, and `history settle`",
    "place": "a machine with its driver, torch, Triton and threads; times of two places are never joined",
    "anchor": "of a night of `history`: the median over all series of value / usual value, by which times are divided",
    "sentinel": "what nobody changes (the bare base models' latencies, Cells of `detect --sentinel`): it tells a change of "
    "the machine from one of what is under test",
    "tier": "what it takes to decide a claim of a paper: exact, arithmetic or a small tensor; gpu-synthetic, a GPU and "
    "random weights of the true shape; trained, training on data, here at small scale",
    "headline": "of a claim: the one of its paper's headlines that it is part of; `peft-harness claims --headlines`",
    "stand-in": "something smaller than the paper's own (a rehearsal, a small model) by which a claim came out; where it "
    "does not come out so, that refutes nothing",
    "history": "the numbers of runs, night by night, in results/history. `peft-harness history add` keeps them; `history "
    "detect` says what changed; `history settle` tries by pairs of runs what is suspected; `history confirm` writes down by "
    "hand what became of a change; `history reset` accepts a level; `history show` shows the series. Each has `--help`",
}
SAME = {"detect": "history", "settle": "history", "confirm": "history", "reset": "history", "sentinels": "sentinel"}
"""Words that are explained by another."""
