"""The largest training that fits into a memory, for each Method, base and optimizer: asked of a child process. No torch.

The child counts (`harness.memory_model.counting`); what is searched here is only arithmetic. Of all rank x batch with the given
tokens the largest product is taken, and of equals the smallest rank.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from harness.errors import HarnessError, Problem, UsageError, did_you_mean
from harness.memory_model import choices, counting_client, models, size_units
from harness.memory_model.ledger import Ledger
from harness.memory_model.models import ModelShape
from harness.methods import experts
from harness.methods.spec import MethodInfo, methods

RANKS = tuple(2**n for n in range(9))
"""The ranks that are tried, where none is given: 1 to 256, the range that the Methods' papers look at."""
TOKENS = 512
"""Of each text, where no number is given and the model reads so many."""
DOES_NOT_FIT = "does not fit"


@dataclass(frozen=True)
class FitRequest:
    """The question, checked. methods: by name, each with the ranks to try; (None,) for one without a rank.

    tokens: of each text; None for `TOKENS`, or fewer if the model reads no more. layerwise: for those that train the model's
    own weights.
    """

    model: ModelShape
    memory: size_units.MemorySize
    methods: dict[str, tuple[int | None, ...]]
    bases: tuple[str, ...]
    optimizers: tuple[str, ...]
    targets: tuple[str, ...]
    tokens: int | None
    dtype: str
    checkpointing: bool
    layerwise: bool = False


@dataclass(frozen=True)
class FitRow:
    """One answer. because: why nothing fits. batch: None where nothing is known of activations. longest: tokens of the
    longest text that fits alone, at this rank. left: bytes of the memory that stay free. untouched:
    which weights neither an adapter nor a packed base reaches, where all linear layers are meant.
    """

    method: str
    base: str
    optimizer: str
    because: str = ""
    rank: int | None = None
    trainable: int = 0
    batch: int | None = None
    longest: int | None = None
    ledger: Ledger | None = None
    left: int = 0
    untouched: str = ""


def ask(
    model: str,
    memory: str,
    names: Sequence[str] = (),
    *,
    bases: Sequence[str] = (),
    optimizers: Sequence[str] = (),
    targets: Sequence[str] = (),
    ranks: Sequence[int] = (),
    tokens: int | None = None,
    dtype: str = "bfloat16",
    checkpointing: bool = False,
    layerwise: bool = False,
) -> FitRequest:
    """Check a question. Raises UsageError with everything that is wrong with it."""
    problems: list[Problem] = []

    def known(option: str, given: Sequence[str], there: Sequence[str], what: str) -> tuple[str, ...]:
        problems.extend(
            Problem(option, f"no {what} is called `{n}`", did_you_mean(n, there)) for n in given if n not in there
        )
        return tuple(dict.fromkeys(given))

    found, size = None, None
    try:
        found = models.find(model)
    except HarnessError as error:
        problems.append(Problem(error.where, error.what, error.hint))
    try:
        size = size_units.parse(memory)
    except ValueError as error:
        what, _, hint = str(error).partition("; ")
        problems.append(Problem("--memory", what, hint))
    there = methods()
    chosen = known("--method", names, list(there), "method") or tuple(there)
    of_base = known("--base", bases, choices.BASES, "base") or choices.BASES
    of_optimizer = known("--optimizer", optimizers, choices.OPTIMIZERS, "optimizer") or choices.OPTIMIZERS[:1]
    known("--dtype", [dtype], choices.DTYPES, "dtype")
    if tokens is not None and tokens < 1:
        problems.append(Problem("--tokens", f"{tokens} is not at least 1", "write a whole number above 0"))
    of_rank = {name: there[name].fields["rank"] for name in chosen if name in there and "rank" in there[name].fields}
    problems += [
        Problem("--rank", f"{n}: {p}") for n, field in of_rank.items() for r in ranks if (p := field.problem(r))
    ]
    if problems or found is None or size is None:
        count = f"{len(problems)} mistake{'s' if len(problems) != 1 else ''}, nothing was predicted"
        raise UsageError("\n".join([count, *(f"  {problem}" for problem in problems)]), where="fit")
    tried = {n: tuple(ranks or RANKS) if "rank" in there[n].fields else (None,) for n in chosen}
    return FitRequest(
        found, size, tried, of_base, of_optimizer, tuple(targets), tokens, dtype, checkpointing, layerwise
    )


def answer(asked: FitRequest, counted: Mapping[str, Any]) -> dict[str, Any]:
    """Return the answer by formulas as one document, ready for JSON; sizes in bytes. counted: what `counts` returned.

    Raises UsageError for targets that the model does not have, and texts longer than it reads.
    """
    if misfits := counted.get("misfits"):
        hint = f"name layers of {asked.model.name}"
        raise UsageError("; ".join(misfits.values()), where="--target", hint=hint)
    most = counted["positions"]
    tokens = asked.tokens or min(TOKENS, most or TOKENS)
    if most is not None and tokens > most:
        what = f"{asked.model.name} reads {most} tokens at once, and {tokens} are asked for"
        raise UsageError(what, where="--tokens", hint=f"write at most {most}")
    rows = [row for method in asked.methods for row in _rows(asked, counted, method, tokens)]
    return {
        "model": asked.model.name,
        "source": asked.model.source,
        "parameters": counted["parameters"],
        "memory_B": asked.memory.number_B,
        "unit": asked.memory.unit,
        "dtype": asked.dtype,
        "tokens": tokens,
        "targets": counted["targets"],
        "gradient_checkpointing": asked.checkpointing,
        "layerwise_updates": asked.layerwise,
        "activations_known": counted["logits"] is not None,
        "checked": False,
        "rows": [document_of(row) for row in rows],
        "left_out": [
            {"method": method, "rank": one["rank"], "because": one["error"]}
            for method in asked.methods
            for one in counted["methods"][method]
            if one["error"] and one["rank"] is not None
        ],
    }


def counts(asked: FitRequest) -> dict[str, Any]:
    """Let a child process build the model without weights, and count. Raises UsageError with what it said if it cannot."""
    configs = {name: [config_at(methods()[name], rank) for rank in ranks] for name, ranks in asked.methods.items()}
    words = {
        "config": asked.model.config, "kind": asked.model.kind, "dtype": asked.dtype, "methods": configs,
        "targets": list(asked.targets),
    }  # fmt: skip
    print(f"counting {asked.model.name} without its weights ...", file=sys.stderr)
    answers = counting_client.ask([words])
    found = {"error": answers} if isinstance(answers, str) else answers[0]
    if why := found.get("error"):
        hint = "look at config.json and at the version of transformers"
        raise UsageError(f"{asked.model.name}: {why}", where=asked.model.source, hint=hint)
    return found


def config_at(info: MethodInfo, rank: int | None) -> dict[str, Any]:
    """Return a Method's config at a rank: its defaults, and none of its other ranks (AdaLoRA's target) above that."""
    if rank is None:
        return {}
    others = {k: min(f.default, rank) for k, f in info.fields.items() if k.endswith("_rank")}
    return {"rank": rank, **others}


def _rows(asked: FitRequest, counted: Mapping[str, Any], method: str, tokens: int) -> Iterator[FitRow]:
    of_ranks = [one for one in counted["methods"][method] if not one["error"]]
    if not of_ranks:
        yield FitRow(method, "-", "-", because=counted["methods"][method][0]["error"])
        return
    if not of_ranks[0]["trainable"]:
        yield FitRow(method, "-", "-", because="nothing of this model trains")
        return
    own = list(of_ranks[0]["optimizer"])
    wanted = own if choices.OWN in own else [name for name in asked.optimizers if name in own]
    if not wanted:
        yield FitRow(method, "-", "-", because=f"it steps by its own optimizer: {' or '.join(own)}")
    bases = [base for base in of_ranks[0]["weights"] if base in (*asked.bases, choices.OWN)]
    if not bases:
        yield FitRow(method, "-", "-", because="it trains the weights themselves, which a packed base does not let it")
    for base in bases:
        for optimizer in wanted:
            yield best(asked, counted, tokens, of_ranks, method, base, optimizer)


def best(
    asked: FitRequest,
    counted: Mapping[str, Any],
    tokens: int,
    of_ranks: list[dict[str, Any]],
    method: str,
    base: str,
    optimizer: str,
) -> FitRow:
    """Return the row of the largest rank x batch that fits; without activations, of the largest rank whose rest fits."""
    found: tuple[int, FitRow] | None = None
    room, known, most = asked.memory.number_B, counted["logits"] is not None, counted["positions"]
    how = (asked.checkpointing, asked.layerwise and methods()[method].spec.trains_weights)
    means_all = not asked.targets or experts.ALL_LINEAR in asked.targets
    untouched = experts.note(of_ranks[0]["untouched"], counted["parameters"]) if means_all else ""
    for one in of_ranks:
        a_token = one["activations"][asked.checkpointing] + counted["logits"] if known else 0
        smallest = ledger(one, base, optimizer, counted["logits"], tokens, *how)
        if smallest.total > room:
            continue
        batch = (room - smallest.lasting) // (a_token * tokens) if known else None
        longest = (room - smallest.lasting) // a_token if known else None
        largest = ledger(one, base, optimizer, counted["logits"], tokens * (batch or 1), *how)
        row = FitRow(
            method, base, optimizer, rank=one["rank"], trainable=one["trainable"], batch=batch, ledger=largest,
            longest=min(longest, most) if longest is not None and most else longest, left=room - largest.total,
            untouched=untouched,
        )  # fmt: skip
        value = (one["rank"] or 1) * (batch or 1)
        if found is None or value > found[0]:
            found = value, row
    if found is not None:
        return found[1]
    least = ledger(of_ranks[0], base, optimizer, counted["logits"], tokens, *how)
    return FitRow(
        method, base, optimizer, DOES_NOT_FIT, of_ranks[0]["rank"], of_ranks[0]["trainable"], 1 if known else None,
        ledger=least, left=room - least.total, untouched=untouched,
    )  # fmt: skip


def ledger(
    one: Mapping[str, Any],
    base: str,
    optimizer: str,
    logits: int | None,
    tokens: int,
    checkpointing: bool,
    layerwise: bool = False,
) -> Ledger:
    """Return the ledger of what was counted of a Method, with `tokens` in all texts of a batch together.

    layerwise: with layer-wise updates, so that the step belongs to the gradient that there is.
    """
    device, host = one["optimizer"][optimizer]
    return Ledger(
        weights=one["weights"][base],
        adapter=one["adapter"],
        gradients=one["layerwise"] if layerwise else one["gradients"],
        optimizer=device,
        host=host,
        activations=one["activations"][checkpointing] * tokens if one["activations"] else 0,
        logits=logits * tokens if logits is not None else 0,
        step=0 if layerwise else one["step"],
    )


def document_of(row: FitRow) -> dict[str, Any]:
    """Return a row as the document has it."""
    parts = {f"{part}_B": size for part, size in asdict(row.ledger).items()} if row.ledger else None
    if parts and row.batch is None:
        parts |= {"activations_B": None, "logits_B": None}  # nothing is known of them, which is not nothing
    total = {"total_B": row.ledger.total, "left_B": row.left} if row.ledger else {}
    facts = {k: v for k, v in asdict(row).items() if k not in ("ledger", "left")}
    return facts | {"ledger": parts and parts | total}
