"""Run `check --served`: compare the answers of a model server with the adapter files, computed in float64."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from harness.conformance.served import prompts
from harness.conformance.served.client import TOKEN_VARIABLE, Client, Dialect, ServedModel, first_dialect
from harness.conformance.served.noise import NARROWEST_NOISE_FIRST
from harness.conformance.served.report import ServedReport, SubjectResult, SubjectVerdict
from harness.conformance.served.session import BASE, ROUNDS, Session
from harness.console import print_json, print_lines, print_note
from harness.errors import Exit, HarnessError, UsageError, did_you_mean
from harness.process.signals import handle_termination
from harness.records.environment import describe
from harness.report import served_terminal

if TYPE_CHECKING:
    from harness.conformance.adapter_files.adapter_file import AdapterFile
    from harness.conformance.served.comparison import AnswerComparison, NoiseFloor


@dataclass(frozen=True)
class ServedRequest:
    """Options of `check --served`."""

    url: str
    adapters: Sequence[str]
    """Values of `--adapter`, each DIR or NAME=DIR."""
    base_model: str
    """Value of `--base-model`: FOLDER or NAME=FOLDER."""
    dtypes: Sequence[str] = ()
    """Dtypes that the server may use. Empty for float32, float16 and bfloat16."""
    concurrency: int = 8
    patience: float = 120.0
    """Seconds to wait for one answer."""
    echo: bool = False
    """True to compare the log-probabilities of the prompts' tokens, too."""
    seed: int = 0


def check(request: ServedRequest, as_json: bool) -> Exit:
    """Compare the server's answers with the adapters, print the report, and return the exit code.

    Raises UsageError for wrong options, a wrong model or a server that cannot be compared. Raises ServerError if the
    server stops before its rounding errors are measured. If it stops later, the report has the results so far.
    """
    from harness.conformance.served.comparison import AnswerComparison

    dtypes = [one for one in NARROWEST_NOISE_FIRST if one in (request.dtypes or NARROWEST_NOISE_FIRST)]
    if unknown := set(request.dtypes) - set(dtypes):
        hint = f"one or more of {', '.join(NARROWEST_NOISE_FIRST)}"
        raise UsageError(f"unknown dtype: {', '.join(sorted(unknown))}", where="--dtype", hint=hint)
    folders = prompts.adapters(request.adapters)
    base_name, base = prompts.split(request.base_model)
    files = {name: _read(folder) for name, folder in folders.items()}
    drawn = prompts.drawn(base, request.seed)
    client = Client(request.url, os.environ.get(TOKEN_VARIABLE, ""), request.patience)
    with handle_termination():
        listed = client.models()
        base_name = _base_name(base_name, base, listed, folders)
        session = Session(client, base_name, folders, drawn, (), prompts.TOKENS, request.concurrency, request.seed)
        session.skip_failed = True
        tokenizer = prompts.Tokenizer.find(base)
        _find_dialect_and_set_prompts(client, session, tokenizer)
        longest = next((one.longest for one in listed if one.name == base_name), None)
        _add_long(session, base, tokenizer, longest)
        comparison = AnswerComparison(client.url, base, files, session.body_of)
        stopped, code = "", Exit.PASS
        try:
            session.load_missing([one.name for one in listed])
            print_note(f"base: {len(session.prompts)} requests")
            session.alone(BASE)
            # The long prompt is left out, so that an error in it is judged like any other one.
            short = [one for one in session.observations if one.request.prompt != session.long]
            floor = comparison.noise_floor(short, dtypes)
            try:
                _send_all(session, request.echo)
            except HarnessError as error:
                stopped, code = str(error), error.exit_code
            except KeyboardInterrupt:
                stopped, code = "interrupted", Exit.INFRASTRUCTURE
        finally:
            left = session.tidy()
        print_note("comparing with the float64 reference")
        subjects = [_judge(comparison, session, name, floor) for name in (BASE, *folders)]
        report = ServedReport(
            url=client.url, dtype=floor.dtype, subjects=subjects,
            not_offered=session.not_offered, findings=session.findings, stopped=stopped, stopped_exit=code,
            notes=[*session.notes, *([left] if left else [])], software=describe().software,
        )  # fmt: skip
    if as_json:
        print_json(report.document())
    else:
        print_lines(served_terminal.lines(report))
    return report.exit


def _judge(comparison: AnswerComparison, session: Session, name: str, floor: NoiseFloor) -> SubjectResult:
    try:
        return comparison.judge(name, session.observations, floor, session.failures)
    except UsageError as error:  # the file of this adapter does not fit the base
        folder = session.adapters.get(name, comparison.base)
        return SubjectResult(name, str(folder), SubjectVerdict.NOT_COMPARED, reason=str(error))


def _read(folder: Path) -> AdapterFile:
    """Read an adapter. Raises UsageError if it has a setting that the reference does not implement."""
    from harness.conformance.adapter_files.adapter_file import AdapterFile
    from harness.methods.unsupported_adapters import reason, unsupported

    adapter = AdapterFile.read(folder)
    hint = "the reference does not implement it; check the other adapters"
    if found := unsupported(adapter.config):
        raise UsageError(reason(found), where=str(folder), hint=hint)
    if (task := adapter.settings.task_type) not in (None, "CAUSAL_LM"):
        raise UsageError(
            f"task_type is {task}: it completes no text", where=str(folder), hint="check the other adapters"
        )
    return adapter


def _send_all(session: Session, echo: bool) -> None:
    for name in session.adapters:
        print_note(f"{name}: {len(session.prompts)} requests")
        session.alone(name)
    print_note(f"mixed: base and adapters in random order, {session.concurrency} requests at the same time")
    for _ in range(ROUNDS):
        session.mixed()
    print_note("load, hot-swap, unload")
    session.swaps()
    if echo:
        print_note("log-probabilities of the prompts")
        session.echoes()


def _add_long(session: Session, base: Path, tokenizer: prompts.Tokenizer | None, longest: int | None) -> None:
    """Add a long prompt to the session, or a note if there is no room for one.

    longest: largest number of tokens that the server accepts for a prompt and its answer together.
    """
    room = prompts.room(base, longest)
    tokens = prompts.LONG + prompts.TOKENS if room is None else room
    if session.texts and tokenizer is not None:
        text = prompts.long_text(tokenizer, tokens)
        prompt = tokenizer.encode(text) if text else []
    else:
        text, prompt = "", prompts.long_prompt(base, session.seed, tokens)
    if prompt:
        session.add_long(prompt, text)
    else:
        session.notes.append(f"long prompts not compared: prompt and answer may have at most {tokens} tokens")


def _base_name(name: str, folder: Path, listed: Sequence[ServedModel], adapters: Mapping[str, Path]) -> str:
    """Return the name of the base on the server. Raises UsageError if the server does not list it."""
    names = [one.name for one in listed]
    bases = [one.name for one in listed if not one.parent and one.name not in adapters]
    if name:
        if names and name not in names:  # `transformers serve` may list no model, although it has one
            raise UsageError(
                f"the server has no model {name}", where="--base-model", hint=did_you_mean(name, names, "it has")
            )
        return name
    for likely in (str(folder), folder.resolve().name):
        if likely in bases:
            return likely
    if len(bases) != 1:
        hint = f"--base-model NAME=FOLDER with one of: {', '.join(bases) or 'none'}"
        raise UsageError(f"the server lists {len(bases)} base models", where="--base-model", hint=hint)
    return bases[0]


def _find_dialect_and_set_prompts(client: Client, session: Session, tokenizer: prompts.Tokenizer | None) -> None:
    """Find the dialect of the server's API, check that the server uses the base's tokenizer, and set the prompts."""
    if tokenizer is not None:
        known = client.names

        def names(text: str) -> int | None:
            found = known(text)
            return tokenizer.name_id(text) if found is None else found

        client.names = names

    def try_one(dialect: Dialect) -> None:
        client.dialect = dialect
        client.complete(session.base, session.prompts[0] if dialect.token_ids else prompts.TEXTS[0], 1)

    client.dialect = first_dialect(try_one, tokenizer is None)
    if tokenizer is not None:
        prompts.require_tokenizer(client, session.base, tokenizer)
    if not client.dialect.token_ids and tokenizer is not None:
        session.texts = prompts.TEXTS
        session.prompts = [tokenizer.encode(text) for text in prompts.TEXTS]
