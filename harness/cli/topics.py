"""What `explain` says about a name: always read from where the name is defined."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from harness import errors
from harness.analysis.comparison.baseline_rows import MEANING
from harness.cli.glossary import SAME
from harness.cli.glossary import WORDS as WORDS_OF_README
from harness.conformance import checks
from harness.errors import EXITS, HarnessError, UsageError, did_you_mean
from harness.memory_model import activations, fit
from harness.memory_model.ledger import PARTS
from harness.methods.peft_config import UNREFERENCED
from harness.methods.spec import FieldInfo, MethodInfo, methods
from harness.records.record import Optimizer, Status, Training
from harness.resources import data_folder

if TYPE_CHECKING:
    from harness.conformance.findings.defects import Defect

Topic = tuple[str, Callable[[], str]]
_OPERATIONS = Path(__file__).resolve().parents[1] / "conformance" / "operations"

STATUSES = {
    Status.OK: "measured, and every check before and after the measurement passed",
    Status.NONCONFORMING: "the implementation computes something else than the Method, or training diverged; nothing was "
    "measured",
    Status.OOM: "the device or the machine ran out of memory; an outcome like any other, it stays in every table",
    Status.TIMEOUT: "stopped after --timeout seconds, or at the time limit that Slurm had set",
    Status.ERROR: "the worker ended with an exception; its traceback is in the Record",
    Status.SKIPPED: "could not run here, and the Record says why",
    Status.LOST: "the worker vanished without a word: killed from outside (with --jobs in a container perhaps by the "
    "kernel, for want of memory), or the machine went down",
}
OPTIMIZERS: dict[Optimizer, str] = {
    "adamw": "torch's AdamW, for every Cell but those of a method that brings its own (galore, with moments in the "
    "gradient's dtype). What trains in 16 bits has float32 master weights, with this optimizer and with those below",
    "adamw-8bit": "AdamW with moments of 8 bits and one float32 absmax per 256 of them (arXiv:2110.02861): a quarter of the "
    "bytes of the moments. A tensor of fewer than 4096 elements keeps 32 bits, and factors of a low rank often are so "
    "small: the Record says of how many. By the reference for Cells of `reference`, by harness/kernels for all others; of "
    "galore by its own, on moments of the projected gradient",
    "paged-adamw": "adamw whose states of at least 100,000 elements live in the host's memory and come to the GPU for their "
    "own update (QLoRA, arXiv:2305.14314, section 3); the steps are the same bits. None stays on the GPU between two steps. "
    "On a CPU it takes time and saves nothing. By the reference for Cells of `reference`, by harness/kernels for all others",
    "paged-adamw-8bit": "adamw-8bit, its states paged as those of paged-adamw",
}
# What `check` says besides the names of its checks.
WORDS = {
    "attach": "fails where an implementation raises when it is attached to a model, or returns what is no Adapted",
    "alive": "fails where an implementation crashes, hangs (--patience), leaves a process behind, or cannot be imported "
    "although it is installed; what it had not come to was not tried",
    "unsupported": "a case that an implementation does not offer: it raised harness.Unsupported. A plain "
    "NotImplementedError is a failure, since torch raises that too",
}
# What the Record of a Cell says besides, of what it has trained.
OF_A_CELL = {
    "frozen": "fails where training changed a parameter of the model that does not train",
    "moved": "fails where a tensor that trains was never seen anywhere but where it began",
    "multi-adapter": "several adapters in one batch, after training: each row must get what the float64 reference computes "
    "with the row's own adapter, or no time of it is told; skipped, with the reason, where that could not be tried",
}


def explain(name: str) -> str:
    """Explain a method, operation, check, known defect, optimizer, key of `training:` or `config:`, claim, measure, verdict,
    error, exit code, status, a part of what `fit` predicts, or a word of the README; in capitals too.

    A check may be named as a Record names it, e.g. `lora/gradient/float32/warm`. Raises UsageError for any other name.
    """
    parts = name.split("/")
    wanted = (parts[1] if len(parts) == 4 else name).lower()
    # In a Record's name of a check no other thing can be meant, such as the Method `frozen`.
    topics = [topic for topic in _of_checks() if len(parts) == 4 and topic[0] == wanted] or list(_topics())
    # Files are read only where nothing of ours has the name: a mistake in one must not silence the rest.
    for read in (_claims, _defects):
        if wanted not in {topic.lower() for topic, _ in topics}:
            topics += read()
    found = [text() for topic, text in topics if topic.lower() == wanted]
    if not found:
        hint = did_you_mean(wanted, sorted({topic for topic, _ in topics}))
        if not hint.startswith("did you mean"):  # all names together would fill the screen
            hint = (
                "`peft-harness list methods`, `list checks`, `list claims` and `list measures` show names; operations, known"
                " defects, optimizers, keys of `training:` and `config:`, verdicts, errors, exit codes (0 to 5), statuses"
                " (ok, oom) and words of the README (canary, history) can be explained too"
            )
        raise UsageError(f"nothing is called `{name}`", where="explain", hint=hint)
    return "\n\n".join(found)


def _topics() -> Iterator[Topic]:
    for info in (methods() | UNREFERENCED).values():
        yield info.name, partial(_method, info)
    yield from _of_checks()
    for file in sorted(_OPERATIONS.glob("[!_]*.py")):
        about = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
        text = f"{about}\n\nto check who offers it:\n  peft-harness check --op {file.stem}"
        yield file.stem, partial(_titled, f"operation {file.stem}", text)
    kinds = "\n".join(line for kind, text in MEANING.items() for line in _wrapped(kind.value, text))
    yield "gate", partial(_titled, "gate, its kinds of findings", kinds)
    yield "fit", partial(_titled, "fit", inspect.getdoc(fit) or "")
    for part, text in PARTS.items():
        more = inspect.getdoc(activations) if part == "activations" else ""
        yield part, partial(_titled, f"{part}, of what `fit` predicts", f"{text}.\n\n{more}".strip())
    for kind in vars(errors).values():
        if inspect.isclass(kind) and issubclass(kind, HarnessError):
            text = f"{inspect.getdoc(kind)}\nExit code {kind.exit_code:d}: {EXITS[kind.exit_code]}."
            yield kind.code, partial(_titled, f"error {kind.code}", text)
    for code, text in EXITS.items():
        yield str(int(code)), partial(_titled, f"exit code {code:d}", f"{text}.")
    names = ", ".join(OPTIMIZERS)
    yield (
        "optimizer",
        partial(_titled, "optimizer", f"an axis of a suite's matrix: one of {names}; `explain` tells of each"),
    )
    for optimizer, text in OPTIMIZERS.items():
        yield optimizer, partial(_titled, f"optimizer {optimizer}", "\n".join(textwrap.wrap(f"{text}.", 100)))
    for key, field in Training.model_fields.items():
        default = "" if field.is_required() else f"\ndefault: {str(field.default).lower()}"
        yield key, partial(_titled, f"training.{key}", f"{field.description or ''}{default}".strip())
    yield from _of_configs()
    for word in (*WORDS_OF_README, *SAME):
        meant = SAME.get(word, word)
        yield word, partial(_titled, meant, "\n".join(textwrap.wrap(f"{WORDS_OF_README[meant]}.", 100)))
    for status, text in STATUSES.items():
        yield status.value, partial(_titled, f"status {status.value}", f"{text}.")


def _of_configs() -> Iterator[Topic]:
    """Yield each key that a Method's `config:` may have, with what it is for each Method."""
    of_key: dict[str, list[str]] = {}
    for info in methods().values():
        for key, field in info.fields.items():
            of_key.setdefault(key, []).extend([f"{info.name}: {_field(field)}", *_indented(field.about)])
    for key, lines in of_key.items():
        yield key, partial(_titled, f"config.{key}", "\n".join(lines))


def _of_checks() -> Iterator[Topic]:
    for check, text in checks.docstrings().items():
        yield check, partial(_check, check, text)
    for word, text in WORDS.items():
        yield word, partial(_titled, word, f"{text}.")
    for check, text in OF_A_CELL.items():
        yield check, partial(_titled, f"check {check}, of a Cell", "\n".join(textwrap.wrap(f"{text}.", 100)))


def _check(name: str, rule: str) -> str:
    """Say a check's rule, and the command that tries it in the fewest cases."""
    example = _example(name)
    command = [f"to see it at work, on {example[0]} in one dtype:", f"  {example[1]}"] if example else []
    return _titled(f"check {name}", "\n".join([rule, *(["", *command] if command else [])]))


def _example(check: str) -> tuple[str, str] | None:
    """Return what to try a check on, and the command; None for a check that no parity suite names."""
    from harness import yaml_lines

    for file in sorted(
        (data_folder("suites") / "parity").glob("*.yaml"), key=lambda file: (file.stem != "lora", file.stem)
    ):
        data = yaml_lines.load(file).data
        if isinstance(data, dict) and check in data.get("checks", ()):
            option = "--op" if "operation" in data else "--method"
            who = "" if data.get("base") else "reference "
            return file.stem, f"peft-harness check {who}{option} {file.stem} --dtype float32"
    return None


def _claims() -> Iterator[Topic]:
    from harness.claims import explain as explained

    yield from explained.topics()


def _defects() -> Iterator[Topic]:
    from harness.conformance.findings import defects  # which reads this module's checks

    for defect in defects.known():
        yield defect.id, partial(_defect, defect, defects.path().parent / defect.reproduction)


def _defect(defect: Defect, reproduction: Path) -> str:
    about = [
        *textwrap.wrap(defect.summary, 100),
        "",
        f"library: {defect.library} {defect.versions}",
        *([f"link: {defect.link}"] if defect.link else []),
        *([f"shows sometimes: {defect.sometimes}"] if defect.sometimes else []),
        f"found by: {', '.join(defect.checks)}, in cases {', '.join(defect.cases)}",
        "to see it, with that library and torch alone:",
        f"  python {reproduction}",
        "to see the checks find it:",
        f"  peft-harness check {defect.implementation}{_narrowed(defect.checks)}",
    ]
    return _titled(f"known defect {defect.id}", "\n".join(about))


def _narrowed(patterns: Iterable[str]) -> str:
    """Return the options that try no more than patterns of check ids need."""
    targets = sorted({pattern.partition("/")[0] for pattern in patterns})
    if any(set(target) & set("*?[") for target in targets):
        return ""
    return "".join(f" {'--method' if target in methods() else '--op'} {target}" for target in targets)


def _wrapped(name: str, text: str) -> list[str]:
    return textwrap.wrap(f"{name}: {text}.", 100, subsequent_indent="  ")


def _titled(title: str, text: str) -> str:
    return f"{title}\n{textwrap.indent(text, '  ')}"


def _method(info: MethodInfo) -> str:
    lines = [info.summary, f"paper: {info.spec.paper}"]
    if info.fields:
        lines += ["", "config:"]
        for key, field in info.fields.items():
            lines += [f"  {key}: {_field(field)}", *_indented(field.about)]
    if info.spec.deviations:
        lines += ["", "differences from the paper:"]
    for one in info.spec.deviations:
        lines.append(f"  {one.topic}")
        for label, text in (("paper", one.paper), ("here", one.here), ("why", one.why)):
            lines += textwrap.wrap(text, 100, initial_indent=f"    {label + ':':<7}", subsequent_indent=" " * 11)
    return _titled(f"method {info.name}", "\n".join(lines))


def _indented(text: str) -> list[str]:
    return textwrap.wrap(text, 100, initial_indent="    ", subsequent_indent="    ")


def _field(field: FieldInfo) -> str:
    limits = [f"at least {field.minimum:g}"] if field.minimum is not None else []
    limits += [f"at most {field.maximum:g}"] if field.maximum is not None else []
    limits += [f"one of {', '.join(map(str, field.choices))}"] if field.choices is not None else []
    return ", ".join([field.type_label, f"default {field.shown_default}", *limits])
