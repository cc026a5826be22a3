"""Texts that `explain` prints. Each text comes from the place that defines the name."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from harness import errors, yaml_validation
from harness.analysis import contention
from harness.analysis.comparison.baseline_rows import MEANING
from harness.cli.listing import KINDS
from harness.conformance import checks
from harness.conformance.adapter_files import corpus
from harness.console import visible
from harness.errors import EXITS, HarnessError, UsageError, closest_match
from harness.memory_model import activations, fit
from harness.memory_model.ledger import PARTS
from harness.methods import registry
from harness.methods.loader import ADAPTER_FILES, Loader
from harness.methods.peft_config import UNREFERENCED
from harness.methods.spec import Adapted, FieldInfo, MethodInfo, in_digits, methods
from harness.records.record import Training
from harness.resources import data_folder

if TYPE_CHECKING:
    from harness.conformance.findings.defects import Defect

Topic = tuple[str, Callable[[], str]]
_NEAR = 0.75
"""Smallest similarity (0 to 1) of a name that is suggested. `foobar` and `forward` have 0.62."""
_KINDS = (
    "methods and keys of their `config:`, operations, checks, claims, measures, known defects, optimizers, keys"
    " of `training:`, commands, verdicts, errors, statuses (ok, oom), exit codes (0 to 5) and terms (Cell, Record)"
)
_SERVED = "verdict {} of `check --served`"
_CHECK_LOOP = "peft-harness check --loop trl"
_LOOP_CHECKS = Path(__file__).resolve().parents[1] / "cell" / "loop_checks" / "checks.py"
_EXAMPLE = Path(__file__).resolve().parents[1] / "conformance" / "README.md"
_OPERATIONS = Path(__file__).resolve().parents[1] / "conformance" / "operations"


def explain(name: str) -> str:
    """Return the texts that explain a name.

    A check id, such as `lora/gradient/float32/warm`, stands for the check that it contains. Upper and lower case do not
    matter. Raises UsageError for an unknown name.
    """
    parts = name.split("/")
    wanted = (parts[1] if len(parts) == 4 else name).lower()
    # A check id stands only for its check, never for its first part, which may be another name (the Method `frozen`).
    topics = [topic for topic in _of_checks() if len(parts) == 4 and topic[0] == wanted] or list(_topics())
    # Claims and defects are read last, and only if the name has no other text: a mistake in their files must not hide
    # other texts.
    for read in (_claims, _defects):
        if wanted not in {topic.lower() for topic, _ in topics}:
            topics += read(wanted)
    topics += _commands()
    found = [text() for topic, text in topics if topic.lower() == wanted]
    if not found:
        raise UsageError(f"no entry `{name}`", where="explain", hint=_hint(wanted, {topic for topic, _ in topics}))
    return "\n\n".join(found)


def _hint(wanted: str, known: set[str]) -> str:
    from harness.claims import explain as explained

    if wanted in KINDS:
        return f"`peft-harness list {wanted}` lists them"
    words = wanted.split()
    if len(words) > 1 and {topic.lower() for topic in known}.issuperset(words):
        return f"explain one name at a time, e.g. `peft-harness explain {words[-1]}`"
    close = closest_match(wanted, sorted({*known, *explained.claim_ids(), *_defect_ids()}), _NEAR)
    return f"did you mean `{close}`?" if close else f"there are {_KINDS}; `peft-harness list` shows most names"


def glossary() -> dict[str, dict[str, str]]:
    """Return the definitions in glossary.yaml: for each kind of term, the text of each term."""
    data: dict[str, dict[str, str]] = yaml_validation.load(Path(__file__).with_name("glossary.yaml")).data
    data["term"]["busy"] = f"{contention.RULE.removeprefix('busy: ')}. {contention.SERVER_RULE}"
    data["term"]["unsteady"] = contention.UNSTEADY_RULE.removeprefix("unsteady: ")
    return data


def _topics() -> Iterator[Topic]:
    for info in (methods() | UNREFERENCED).values():
        yield info.name, partial(_method, info)
    yield "adapted", partial(_titled, "Adapted: what `attach` of a Method returns", inspect.getsource(Adapted))
    yield from _of_checks()
    for file in sorted(_OPERATIONS.glob("[!_]*.py")):
        about = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
        yield file.stem, partial(_operation, file.stem, about)
    yield ADAPTER_FILES, _loader
    kinds = "\n".join(line for kind, text in MEANING.items() for line in _wrapped(f"{kind.value}: {text}.", "  "))
    yield "gate", partial(_titled, "gate: kinds of findings", kinds)
    yield "fit", partial(_titled, "fit", inspect.getdoc(fit) or "")
    for part, text in PARTS.items():
        more = inspect.getdoc(activations) if part == "activations" else ""
        yield part, partial(_titled, f"{part}: part of the memory that `fit` predicts", f"{text}.\n\n{more}".strip())
    for code, text in EXITS.items():
        yield str(int(code)), partial(_titled, f"exit code {code:d}", f"{text}.")
    defined = glossary()
    axis = (
        f"an axis of a suite's matrix: one of {', '.join(defined['optimizer'])}; `peft-harness explain` describes each"
    )
    yield "optimizer", partial(_titled, "optimizer", axis)
    for key, field in Training.model_fields.items():
        default = "" if field.is_required() else f"\ndefault: {str(field.default).lower()}"
        yield key, partial(_titled, f"training.{key}", f"{field.description or ''}{default}".strip())
    yield from _of_configs()
    for kind, title in (
        ("optimizer", "optimizer {}"),
        ("term", "{}"),
        ("status", "status {}"),
        ("served verdict", _SERVED),
    ):
        yield from _defined(defined[kind], title)
    for word, meant in defined["alias"].items():
        yield word, partial(_definition, meant, defined["term"][meant])
    section = _EXAMPLE.read_text(encoding="utf-8").partition("## Your own implementation\n")[2].partition("\n## ")[0]
    for word in ("plug-in", *(word for word, meant in defined["alias"].items() if meant == "plug-in")):
        yield word, partial(_titled, f"example, from harness/conformance/{_EXAMPLE.name}", section.strip())
    for kind in vars(errors).values():
        if inspect.isclass(kind) and issubclass(kind, HarnessError):
            text = f"{inspect.getdoc(kind)}\nExit code {kind.exit_code:d}: {EXITS[kind.exit_code]}."
            yield kind.code, partial(_titled, f"error {kind.code}", text)


def _defined(definitions: Mapping[str, str], title: str) -> Iterator[Topic]:
    for word, text in definitions.items():
        yield word, partial(_definition, title.format(word), text)


def _definition(title: str, text: str) -> str:
    return _titled(title, "\n".join(_wrapped(f"{text}.")))


def _of_configs() -> Iterator[Topic]:
    """Yield one topic per key of a `config:`. The text gives the meaning of the key for each Method that has it."""
    of_key: dict[str, list[str]] = {}
    for info in methods().values():
        for key, field in info.fields.items():
            of_key.setdefault(key, []).extend([f"{info.name}: {_field(field)}", *_indented(field.about)])
    for key, lines in of_key.items():
        yield key, partial(_titled, f"config.{key}", "\n".join(lines))


def _of_checks() -> Iterator[Topic]:
    for check, text in checks.docstrings().items():
        yield check, partial(_check, check, text)
    for check, text in _loop_checks().items():
        yield (
            check,
            partial(_titled, f"check {check}, of a training loop", f"{text}\n\nto try it on trl:\n  {_CHECK_LOOP}"),
        )
    yield from _defined(glossary()["check result"], "{}")
    yield from _defined(glossary()["cell check"], "check {}, of a Cell")


def _loop_checks() -> dict[str, str]:
    """Map the name of each check of a training loop to its rule. Parses the file, because importing it takes seconds."""
    functions = [
        one for one in ast.parse(_LOOP_CHECKS.read_text(encoding="utf-8")).body if isinstance(one, ast.FunctionDef)
    ]
    return {
        one.name.removeprefix("check_"): ast.get_docstring(one) or ""
        for one in functions
        if one.name.startswith("check_")
    }


def _check(name: str, rule: str) -> str:
    """Return a text with the rule of a check, and a command that runs the check on one target in one dtype."""
    example = _example(name)
    command = [f"to see it at work, on {example[0]} in one dtype:", f"  {example[1]}"] if example else []
    return _titled(f"check {name}", "\n".join([rule, *_forms(name), *(["", *command] if command else [])]))


def _forms(check: str) -> Iterator[str]:
    """Yield the ways in which the check `calls` calls an implementation. For another check, yield nothing."""
    if check == "calls":
        from harness.conformance.checks.calls import forms  # imports torch

        for what, names in forms().items():
            yield from ("", f"{what}:", *(f"  {name.format('NAME') if '{}' in name else name}" for name in names))


def _example(check: str) -> tuple[str, str] | None:
    """Return a target whose parity suite has the check, and a command that checks this target.

    If no parity suite has the check, return None.
    """
    for file in sorted(
        (data_folder("suites") / "parity").glob("*.yaml"), key=lambda file: (file.stem != "lora", file.stem)
    ):
        data = yaml_validation.load(file).data
        if isinstance(data, dict) and check in data.get("checks", ()):
            option = "--op" if "operation" in data else "--method"
            who = "" if data.get("base") else "reference "
            wide = " --wide" if check in checks.names_of_wide(never_by_default=True) else ""
            dtype = "bfloat16" if check == "decoded" else "float32"  # the one check that is for 16 bits alone
            return file.stem, f"peft-harness check {who}{option} {file.stem} --dtype {dtype} --check {check}{wide}"
    return None


def _claims(wanted: str) -> Iterator[Topic]:
    from harness.claims import explain as explained

    yield from explained.topics()
    yield from explained.claims(wanted)


def _defects(wanted: str) -> Iterator[Topic]:
    from harness.conformance.findings import defects

    ids = _defect_ids()
    if {wanted, wanted.rpartition("-in-")[0]} & ids:  # otherwise the file, which takes long to read, is not needed
        for defect in defects.known():
            yield defect.id, partial(_defect, defect, defects.path().parent / defect.reproduction)


def _defect_ids() -> set[str]:
    """Return the ids of the known defects. The function searches the text of their file, because parsing takes long."""
    from harness.conformance.findings import defects

    return set(re.findall(r"\bid: *([\w-]+)", defects.path().read_text(encoding="utf-8")))


def _commands() -> Iterator[Topic]:
    """Yield one topic per command and per subcommand, e.g. `env list`. The text is the first paragraph of the help."""
    from harness.cli import app

    for name, command in app.commands.commands.items():
        yield name, partial(_command, name, command)
        for below, one in command.commands.items() if isinstance(command, click.Group) else ():
            yield f"{name} {below}", partial(_command, f"{name} {below}", one)


def _command(name: str, command: click.Command) -> str:
    about = " ".join((command.help or "").partition("\n\n")[0].split())
    below = [f"commands: {', '.join(command.commands)}"] if isinstance(command, click.Group) else []
    return _titled(f"command {name}", "\n".join([*_wrapped(about), *below, f"options: `peft-harness {name} --help`"]))


def _defect(defect: Defect, reproduction: Path) -> str:
    about = [
        *_wrapped(defect.summary),
        "",
        f"library: {defect.library} {defect.versions}",
        *([f"link: {defect.link}"] if defect.link else []),
        *([f"shows sometimes: {defect.sometimes}"] if defect.sometimes else []),
        f"found by: {', '.join(defect.checks)}, in cases {', '.join(defect.cases)}"
        + (f", but not in {', '.join(defect.not_cases)}" if defect.not_cases else ""),
        "to see it, with that library and torch alone:",
        f"  python {reproduction}",
        "to see the checks find it:",
        f"  peft-harness check {defect.implementation}{_narrowed(defect.checks)}",
    ]
    return _titled(f"known defect {defect.id}", "\n".join(map(visible, about)))


def _narrowed(patterns: Iterable[str]) -> str:
    """Return the command-line options that select the targets of some check ids. patterns: ids with wildcards.

    If a target contains a wildcard, return an empty string.
    """
    targets = sorted({pattern.partition("/")[0] for pattern in patterns})
    if any(set(target) & set("*?[") for target in targets):
        return ""
    kinds = registry.targets()
    return "".join(f" {'--op' if kinds.get(target) == 'operation' else '--method'} {target}" for target in targets)


def _wrapped(text: str, indent: str = "") -> list[str]:
    return textwrap.wrap(text, 100, subsequent_indent=indent, break_on_hyphens=False)


def _titled(title: str, text: str) -> str:
    return f"{title}\n{textwrap.indent(text, '  ')}"


def _operation(name: str, about: str) -> str:
    from harness.cli import interfaces  # imports torch

    command = [
        "", "to check all implementations of it:", f"  peft-harness check --op {name}",
        "to check your own function in your test suite:", "  from harness.testing import conformance",
        f'  @conformance("{name}")',
    ]  # fmt: skip
    return _titled(f"operation {name}", "\n".join([about, "", *_folded(interfaces.of_operation(name)), *command]))


def _loader() -> str:
    """Return a text about loaders of adapter files: the class `Loader`, and the example adapters in suites/adapters."""
    functions = [
        f"  {name}({', '.join(list(inspect.signature(function).parameters)[1:])}): {inspect.getdoc(function)}"
        for name, function in vars(Loader).items()
        if inspect.isfunction(function)
    ]
    lines = [
        *(inspect.getdoc(inspect.getmodule(Loader)) or "").splitlines(),
        "",
        *(inspect.getdoc(Loader) or "").splitlines(),
        *(line for text in functions for line in _folded(text.splitlines()[:1])),
        "",
        *_folded([f"adapters in {corpus.folder()}: {', '.join(corpus.names())}"]),
        "to check all implementations of it:",
        f"  peft-harness check --method {ADAPTER_FILES}",
    ]
    return _titled(f"loader {ADAPTER_FILES}", "\n".join(lines))


def _folded(lines: Iterable[str]) -> Iterator[str]:
    for line in lines:
        indent = " " * (len(line) - len(line.lstrip()))
        yield from textwrap.wrap(line, 126, subsequent_indent=f"{indent}  ", break_on_hyphens=False) or [""]


def _method(info: MethodInfo) -> str:
    referenced = info.name not in UNREFERENCED
    about = ast.get_docstring(ast.parse(info.path.read_text(encoding="utf-8"))) if referenced else ""
    lines = [about or info.summary, f"paper: {info.spec.paper}"]
    if info.fields:
        lines += ["", "config:"]
        for key, field in info.fields.items():
            lines += [f"  {key}: {_field(field)}", *_indented(field.about)]
    if referenced:
        from harness.cli import interfaces  # imports torch

        lines += ["", *_folded(interfaces.of_method(info.name))]
    return _titled(f"method {info.name}", "\n".join(lines))


def _indented(text: str) -> list[str]:
    return textwrap.wrap(text, 100, initial_indent=" " * 4, subsequent_indent=" " * 4)


def _field(field: FieldInfo) -> str:
    limits = [f"at least {in_digits(field.minimum)}"] if field.minimum is not None else []
    limits += [f"at most {in_digits(field.maximum)}"] if field.maximum is not None else []
    limits += [f"one of {', '.join(map(str, field.choices))}"] if field.choices is not None else []
    return ", ".join([field.type_label, f"default {field.shown_default}", *limits])
