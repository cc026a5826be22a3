"""The parts of a nightly run (`peft-harness night`), most valuable first. Each part is one command of peft-harness.

Imports no torch.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Literal

Kind = Literal["check", "bench", "card", "run", "claims", "pairs", "baseline"]
"""Kind of a part. It determines how the output of the part is read."""
Device = Literal["cpu", "cuda"]
OUT = "{out}"
"""Placeholder in the arguments of a part: the part's own folder."""
HEADLINE = "headline-"
"""Start of the names of the parts that run headline claims of papers. The part `claims` judges their runs."""
RUNS = "{runs}"
"""Placeholder in the arguments of a part: `--run FOLDER` for each finished run in this nightly run."""
MATRIX = "{matrix}"
"""Placeholder in the arguments of a part: the run folder of the part `matrix`."""
CARD = "{card}"
"""Placeholder in the arguments of a part: the name of the GPU's baseline. On a CPU, it stands for the same folder as
`MATRIX`."""
REAL, REAL_SUITE, REAL_SOURCES = "matrix-real", "sentinels", ("minilm-l6", "movie-reviews")
"""- REAL: name of the part that trains a pretrained model.
- REAL_SUITE: name of the part's suite.
- REAL_SOURCES: names of the model and its data in suites/sources.yaml."""


@dataclass(frozen=True)
class NightPart:
    """One part of a nightly run: a command of peft-harness that answers one question."""

    name: str
    title: str
    """The question that the part answers."""
    kind: Kind
    words: tuple[str, ...]
    """Arguments of peft-harness. They may contain the placeholders of this module, e.g. `OUT`."""
    estimate_s: float
    """Estimated seconds of the part. The estimates for a GPU have not been checked on a GPU yet."""
    variables: dict[str, str] = field(default_factory=dict)
    """Environment variables of the command."""
    is_reserved: bool = False
    """True if the time limits of earlier parts must leave enough of the budget for this part."""

    def line(self, words: Sequence[str] | None = None) -> str:
        """Return the command as a line for a shell. words: its arguments; by default `self.words`."""
        given = (f"{name}={value}" for name, value in self.variables.items())
        return shlex.join([*given, "peft-harness", *(self.words if words is None else words)])


_OPERATIONS: dict[str, tuple[str, ...]] = {
    "nf4_dequantize": ("bitsandbytes", "torch-compile"),
    "lora_linear": ("reference", "torch-compile"),
    "nf4_linear": ("bitsandbytes",),
    "nf4_lora_linear": ("reference",),
    "adamw8bit_step": ("bitsandbytes",),
    "galore_step": ("galore-torch", "reference"),
    "dora_linear": ("reference", "torch-compile"),
    "nf4_quantize": ("bitsandbytes", "torchao"),
    "multi_lora_linear": ("hf-peft",),
    "vera_linear": ("reference",),
    "adalora_importance": ("reference",),
    "lora_mlp": ("reference",),
    "lora_qkv": ("reference",),
    "dynamic_quantize": ("bitsandbytes",),
    "double_dequantize": ("bitsandbytes",),
    "paged_adamw": ("bitsandbytes",),
}
"""Operation -> implementations with which its fused kernel is compared. `reference` is plain torch."""
_FIRST = 4
"""Number of operations that a nightly run on a GPU times before the papers' claims are run. `_FIRST_STEPS`: the
same number for training steps of whole Methods."""
_STEPS: dict[str, tuple[str, ...]] = {
    "lora": ("hf-peft",),
    "lora on nf4": ("hf-peft",),
    "dora": ("hf-peft",),
    "galore": ("galore-torch", "reference"),
    "adalora": ("hf-peft",),
    "vera": ("hf-peft",),
}
_FIRST_STEPS = 2
_HEADLINES = (
    ("65b", "Does a 65B model train within 48 GB?", ("qlora-65b",), 120),
    ("33b", "Does a 33B model train within 24 GB?", ("qlora-33b",), 80),
    ("7b", "What do full fine-tuning, LoRA and GaLore of 7B need?", ("full-7b", "lora-7b", "galore-7b"), 240),
    ("latency", "What does an adapter cost: unmerged, merged, several in a batch?", ("rank-4",), 90),
    (
        "gpt2", "Do LoRA's latencies of GPT-2 hold?",
        ("latency-gpt2-32x512", "latency-gpt2-16x256", "latency-gpt2-1x128"), 90,
    ),
)  # fmt: skip
"""One entry per part for headline claims: name, question, entries of the suite headline-gpu, estimated seconds on a
GPU."""


def on_gpu() -> list[NightPart]:
    """Return the parts (commands) of a nightly run on a GPU, in the order in which they run."""
    gpu = ("--device", "cuda")
    saved = ("--json", "--out", OUT)
    parity = [
        _parity(dtype, ("check", "fused", *gpu, "--dtype", dtype, "--patience", "90"), 60)
        for dtype in ("bfloat16", "float16", "float32")
    ]
    timed = (*gpu, "--patience", "90", *saved)
    operations = [_operation(name, ("--shapes", "8b", *timed), 30 * len(_OPERATIONS[name])) for name in _OPERATIONS]
    steps = [_step(name, timed, 45 * len(_STEPS[name])) for name in _STEPS]
    headlines = [
        _run(f"{HEADLINE}{name}", title, "headline-gpu", ids, (*gpu, "--timeout", "240"), estimate)
        for name, title, ids, estimate in _HEADLINES
    ]
    ceilings = NightPart(
        "ceilings", "How fast is the card?", "card", ("bench", "--ceilings", *gpu, "--patience", "60", *saved), 20
    )
    return [
        *_kept(*parity, ceilings, *operations[:_FIRST], *steps[:_FIRST_STEPS]),
        *headlines,
        _claims(30),
        _run("matrix", "Do all methods train, on a tiny model?", "night", (), (*gpu, "--timeout", "90"), 180),
        _BASELINE,
        _run(REAL, "Do they train a real model?", REAL_SUITE, (), (*gpu, "--timeout", "90"), 120),
        NightPart(
            "crossovers", "Up to which sizes are the fused kernels faster, and with which tiles?", "card",
            ("bench", "--crossovers", *gpu, "--patience", "60", *saved), 300,
        ),
        *steps[_FIRST_STEPS:],
        *operations[_FIRST:],
        _canary("night", "lora", gpu, 240),
    ]  # fmt: skip


def on_cpu() -> list[NightPart]:
    """Return the parts of a rehearsal, i.e. of a nightly run on a CPU, with small shapes and Triton's interpreter.

    One part runs the Cells of several headline claims, because each command imports torch again.
    """
    cpu = ("--device", "cpu")
    saved = ("--json", "--out", OUT)
    parity = [
        _parity(dtype, ("check", "fused", "--dtype", dtype, "--op", name), 30, interpreted=True)
        for dtype, name in (("bfloat16", "nf4_dequantize"), ("float16", "nf4_linear"), ("float32", "adamw8bit_step"))
    ]
    timed = (*cpu, "--pairs", "6", *saved)
    ceilings = NightPart("ceilings", "How fast is the machine?", "card", ("bench", "--ceilings", *cpu, *saved), 10)
    two_at_a_time = (*cpu, "--jobs", "2")
    runs = [
        _run(
            f"{HEADLINE}65b", _HEADLINES[0][1], "headline-rehearsal", ("qlora-65b-1", "qlora-65b-2"), two_at_a_time, 60
        ),
        _run(f"{HEADLINE}others", "Do the Cells of the other headlines run?", "night-rehearsal",
             ("qlora-33b", "full-7b", "lora-7b", "galore-7b", "rank-4", "latency-gpt2-1x128"), two_at_a_time, 65),
        _run("matrix", "Do all methods train, on a tiny model?", "night-rehearsal",
             ("lora", "lora-nf4", "dora", "adalora", "vera", "galore"), two_at_a_time, 45),
    ]  # fmt: skip
    headline_65b, headline_others, matrix = runs
    return [
        *_kept(
            *parity, ceilings, _operation("nf4_dequantize", timed, 20), _step("adalora", (*timed, "--layers", "1"), 55)
        ),
        headline_65b,
        headline_others,
        _claims(30),
        matrix,
        replace(_BASELINE, title="Does the comparison with a baseline work? The run is compared with itself."),
        NightPart(
            "crossovers", "Up to which sizes are the fused kernels faster, and with which tiles?", "card",
            ("bench", "--crossovers", *cpu, *saved), 25,
        ),
        _canary("night-rehearsal", "lora", (*cpu, "--no-fresh"), 180),
    ]  # fmt: skip


_BASELINE = NightPart(
    "baseline", "Is anything larger, worse or wrong than before?", "baseline",
    ("gate", MATRIX, "--baseline", CARD, "--json"), 10,
)  # fmt: skip


def sources(name: str, names: Iterable[str]) -> list[str]:
    """Return the parts in `names` whose runs the part `name` judges, e.g. the headline runs for `claims`."""
    made = {"claims": lambda one: one.startswith(HEADLINE), "baseline": lambda one: one == "matrix"}.get(name)
    return list(filter(made, names)) if made else []


def typed(words: Sequence[str]) -> list[str]:
    """Return the arguments of a part as a person would type them, without --out, --html and --json."""
    files = ("--out", "--html")
    kept = [word for before, word in pairwise(["", *words]) if before not in files and word not in files]
    return [word for word in kept if word != "--json"]


def with_suite(part: NightPart, suite: Path) -> NightPart:
    """Return the part with `REAL_SUITE` in its arguments replaced by the file `suite`."""
    return replace(part, words=tuple(str(suite) if word == REAL_SUITE else word for word in part.words))


def _kept(*given: NightPart) -> list[NightPart]:
    """Return the given parts with `is_reserved` set, so that the limits of earlier parts leave time for them."""
    return [replace(part, is_reserved=True) for part in given]


def _repeated(option: str, values: Sequence[str]) -> list[str]:
    return [word for value in values for word in (option, value)]


def _parity(dtype: str, words: Sequence[str], estimate_s: float, *, interpreted: bool = False) -> NightPart:
    title = f"Do our GPU kernels compute what the papers say, in {dtype}?"
    more = ("--json", "--html", f"{OUT}/check.html")
    variables = {"TRITON_INTERPRET": "1"} if interpreted else {}
    return NightPart(f"parity-{dtype}", title, "check", (*words, *more), estimate_s, variables)


def _operation(name: str, options: Sequence[str], estimate_s: float) -> NightPart:
    title = f"How fast is {name}, beside other libraries and the ceiling?"
    return NightPart(
        f"operation-{name}",
        title,
        "bench",
        ("bench", "--op", name, *_repeated("--vs", _OPERATIONS[name]), *options),
        estimate_s,
    )


def _step(name: str, options: Sequence[str], estimate_s: float) -> NightPart:
    title = f"How fast is a training step of {name}?"
    return NightPart(
        f"step-{name.replace(' ', '-')}",
        title,
        "bench",
        ("bench", "--step", name, *_repeated("--vs", _STEPS[name]), *options),
        estimate_s,
    )


def _run(name: str, title: str, suite: str, ids: Sequence[str], options: Sequence[str], estimate_s: float) -> NightPart:
    only = ("--only", ",".join(f"id={one}" for one in ids)) if ids else ()
    return NightPart(name, title, "run", ("run", suite, *only, *options, "--out", f"{OUT}/run"), estimate_s)


def _claims(estimate_s: float) -> NightPart:
    words = ("claims", "--headlines", "--tier", "gpu-synthetic", RUNS, "--json", "--html", f"{OUT}/claims.html")
    return NightPart("claims", "Do the papers' claims about hardware hold?", "claims", words, estimate_s)


def _canary(suite: str, entry: str, device: Sequence[str], estimate_s: float) -> NightPart:
    cells = ("--suite", suite, "--only", f"id={entry}", "--no-canary")
    words = ("gate", "--pairs", "fused", "fused", *cells, *device, "--json", "--out", f"{OUT}/pairs")
    return NightPart("canary", "Do equal runs look equal?", "pairs", words, estimate_s)
