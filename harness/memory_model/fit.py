"""For each Method, base and optimizer, find the largest training that fits into a given memory. Imports no torch.

A child process counts bytes (`harness.memory_model.counting`). The search itself is arithmetic. It maximises rank x
batch for texts of a given length. Among equal products it takes the smallest rank.

The result has one row per Method, base and optimizer. Columns of a row:

trainable: number of trainable parameters.
longest: number of tokens of the longest text that fits alone at this rank, and that the model can read.
peak: largest number of bytes in tensors during a training step on fake tensors. The step runs the CPU code of `fused`
  or, if this is not possible, of `reference`; `--json` names the code. In tests, the peak differs by at most 3 % from
  measured steps of small models.
total: sum of the closed forms, without temporary tensors. Among the ranks whose total fits, the search chooses one.
needed: the peak, or the total with --formulas. It decides what fits.
other: needed minus the columns from weights to logits: temporary tensors. It is negative if parts do not exist at the
  same time.
free: the given memory minus what is needed. It is negative if the row does not fit. In JSON, it is called left.

In tests, weights, adapter, gradients and optimizer differ by at most 3 % from the ledgers of real Cells. Activations
have a closed form for Llama-like models only. In tests, this form differs by at most 2 % from what autograd saves in
small Llamas.

The prediction leaves out waste of the allocator, workspaces of kernels, the CUDA context (hundreds of MiB) and other
programs. Libraries may need more than the references: in 16 bits, hf-peft casts inputs of adapters to float32. Nothing
has been compared with a GPU yet. `harness/memory_model/README.md` has the accuracy of each part.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from harness.assets import misfit
from harness.console import print_note
from harness.errors import HarnessError, Problem, UsageError, did_you_mean, usage_error
from harness.memory_model import counting_client, model_shapes, size_units
from harness.memory_model.ledger import BASES, DTYPES, OPTIMIZERS, OWN, Ledger
from harness.memory_model.messages import CountRequest, MethodCount, ModelCount
from harness.memory_model.model_shapes import ModelShape
from harness.methods import experts
from harness.methods.spec import MethodInfo, methods

RANKS = tuple(2**n for n in range(9))
"""Default ranks to try: from 1 to 256, the range in the Methods' papers."""
TOKENS = 512
"""Default number of tokens per text. It is lower for a model that reads fewer tokens."""
DOES_NOT_FIT = "does not fit"


@dataclass(frozen=True)
class FitRequest:
    """Validated arguments of `peft-harness fit`."""

    model: ModelShape
    memory: size_units.MemorySize
    methods: dict[str, tuple[int | None, ...]]
    """Ranks to try for each Method. A Method without a rank has (None,)."""
    bases: tuple[str, ...]
    optimizers: tuple[str, ...]
    targets: tuple[str, ...]
    """Names of layers to adapt. An empty tuple means every linear layer except the output layer."""
    tokens: int | None
    """Tokens per text. None means `TOKENS`, or the model's limit if this is lower."""
    dtype: str
    checkpointing: bool
    """True to use gradient checkpointing."""
    layerwise: bool = False
    """True to use layer-wise updates, for Methods that train the model's own weights."""
    batch: int | None = None
    """Number of texts in the batch that the user asks about. None means: find the largest that fits."""


@dataclass(frozen=True)
class FitRow:
    """A row of the result of `peft-harness fit`: what fits with one Method, base and optimizer."""

    method: str
    base: str
    optimizer: str
    because: str = ""
    """Reason why nothing fits. Empty if something fits."""
    rank: int | None = None
    trainable: int = 0
    """Number of trainable parameters."""
    batch: int | None = None
    """Number of texts in a batch: the requested number, or the largest that fits (1 if none fits). None if the size of
    activations is unknown."""
    longest: int | None = None
    """Number of tokens of the longest text that fits alone at this rank. None if the size of activations is unknown,
    if nothing fits, or if the user asked about a batch."""
    ledger: Ledger | None = None
    """Bytes of each part of the memory. None if nothing was counted."""
    left: int = 0
    """Bytes that remain free. Negative if nothing fits."""
    untouched: str = ""
    """Note about weights that the Method leaves unadapted and unpacked. Empty if the user named the layers to adapt."""


def fit_request(
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
    batch: int | None = None,
) -> FitRequest:
    """Validate the arguments of `peft-harness fit`, and return them. Raises one UsageError for all problems."""
    problems: list[Problem] = []

    def known(option: str, given: Sequence[str], there: Sequence[str], what: str) -> tuple[str, ...]:
        problems.extend(
            Problem(option, f"no {what} is called `{n}`", did_you_mean(n, there)) for n in given if n not in there
        )
        return tuple(dict.fromkeys(given))

    found, size = None, None
    try:
        found = model_shapes.find_model(model)
    except HarnessError as error:
        problems.append(Problem(error.where, error.what, error.hint))
    try:
        size = size_units.parse_size(memory)
    except ValueError as error:
        what, _, hint = str(error).partition("; ")
        problems.append(Problem("--memory", what, hint))
    there = methods()
    chosen = known("--method", names, list(there), "method") or tuple(there)
    of_base = known("--base", bases, BASES, "base") or BASES
    of_optimizer = known("--optimizer", optimizers, OPTIMIZERS, "optimizer") or OPTIMIZERS[:1]
    known("--dtype", [dtype], DTYPES, "dtype")
    if tokens is not None and tokens < 1:
        problems.append(Problem("--tokens", f"{tokens} is not at least 1", "write a whole number above 0"))
    of_rank = {name: there[name].fields["rank"] for name in chosen if name in there and "rank" in there[name].fields}
    problems += [
        Problem("--rank", f"{n}: {p}") for n, field in of_rank.items() for r in ranks if (p := field.problem(r))
    ]
    if batch is not None and batch < 1:
        problems.append(Problem("--batch", f"{batch} is not at least 1", "write a whole number above 0"))
    if batch is not None and of_rank and not ranks:
        problems.append(Problem("--batch", "the rank is missing", "add e.g. `--rank 16`"))
    if problems or found is None or size is None:
        raise usage_error(problems)
    tried = {n: tuple(ranks or RANKS) if "rank" in there[n].fields else (None,) for n in chosen}
    return FitRequest(
        found, size, tried, of_base, of_optimizer, tuple(targets), tokens, dtype, checkpointing, layerwise, batch
    )


def document_by_formulas(request: FitRequest, counted: ModelCount) -> dict[str, Any]:
    """Return the closed-form results as a document for JSON. Sizes are in bytes.

    counted: result of `count_model`. Raises UsageError for targets that match no layer, and for texts that are longer
    than the model reads.
    """
    if misfits := counted.get("misfits"):
        name = request.model.name
        raise usage_error([Problem("--target", one["reason"], misfit.hint(one, name)) for one in misfits.values()])
    most = counted["positions"]
    tokens = request.tokens or min(TOKENS, most or TOKENS)
    if most is not None and tokens > most:
        what = f"{request.model.name} reads {most} tokens at most, got {tokens}"
        raise UsageError(what, where="--tokens", hint=f"write at most {most}")
    rows = [row for method in request.methods for row in _rows(request, counted, method, tokens)]
    return {
        "model": request.model.name,
        "source": request.model.source,
        "parameters": counted["parameters"],
        "memory_B": request.memory.number_B,
        "unit": request.memory.unit,
        "dtype": request.dtype,
        "tokens": tokens,
        "targets": counted["targets"],
        "gradient_checkpointing": request.checkpointing,
        "layerwise_updates": request.layerwise,
        "activations_known": counted["logits"] is not None,
        "checked": False,
        "rows": [row_document(row) for row in rows],
        "left_out": [
            {"method": method, "rank": one["rank"], "because": one["error"]}
            for method in request.methods
            for one in counted["methods"][method]
            if one["error"] and one["rank"] is not None
        ],
    }


def count_model(request: FitRequest) -> ModelCount:
    """Count the model in a child process, without weights, and return the counts. Raises UsageError if the child fails."""
    configs = {name: [config_at(methods()[name], rank) for rank in ranks] for name, ranks in request.methods.items()}
    message: CountRequest = {
        "config": request.model.config, "kind": request.model.kind, "dtype": request.dtype, "methods": configs,
        "targets": list(request.targets),
    }  # fmt: skip
    print_note(f"counting {request.model.name} without its weights ...")
    answers = counting_client.answer_requests([message])
    found: ModelCount = {"error": answers} if isinstance(answers, str) else answers[0]
    if why := found.get("error"):
        hint = "check config.json and the version of transformers"
        raise UsageError(f"{request.model.name}: {why}", where=request.model.source, hint=hint)
    return found


def config_at(info: MethodInfo, rank: int | None) -> dict[str, Any]:
    """Return a Method's config at `rank`, or {} if `rank` is None.

    Other ranks in the config, such as AdaLoRA's `target_rank`, are limited to `rank`.
    """
    if rank is None:
        return {}
    others = {k: min(f.default, rank) for k, f in info.fields.items() if k.endswith("_rank")}
    return {"rank": rank, **others}


def _rows(request: FitRequest, counted: ModelCount, method: str, tokens: int) -> Iterator[FitRow]:
    of_ranks = [one for one in counted["methods"][method] if not one["error"]]
    if not of_ranks:
        yield FitRow(method, "-", "-", because=counted["methods"][method][0]["error"])
        return
    if not of_ranks[0]["trainable"]:
        yield FitRow(method, "-", "-", because="nothing of this model trains")
        return
    own = list(of_ranks[0]["optimizer"])
    wanted = own if OWN in own else [name for name in request.optimizers if name in own]
    if not wanted:
        yield FitRow(method, "-", "-", because=f"it has its own optimizer: {' or '.join(own)}")
    bases = [base for base in of_ranks[0]["weights"] if base in (*request.bases, OWN)]
    if not bases:
        trains = "it trains the model's own weights, which a packed base excludes"
        own_weights = methods()[method].spec.trains_weights
        yield FitRow(method, "-", "-", because=trains if own_weights else of_ranks[0]["unpackable"])
    for base in bases:
        for optimizer in wanted:
            if request.batch is None:
                yield best_row(request, counted, tokens, of_ranks, method, base, optimizer)
            else:
                yield from (requested_row(request, counted, tokens, one, method, base, optimizer) for one in of_ranks)


def requested_row(
    request: FitRequest, counted: ModelCount, tokens: int, one: MethodCount, method: str, base: str, optimizer: str
) -> FitRow:
    """Return the row for the batch that the user asks about, at one rank. one: counts of the Method at this rank."""
    needed = _ledger(request, counted, one, method, base, optimizer, tokens * (request.batch or 1))
    left = request.memory.number_B - needed.total
    known = counted["logits"] is not None
    return FitRow(
        method, base, optimizer, "" if left >= 0 else DOES_NOT_FIT, one["rank"], one["trainable"],
        batch=request.batch if known else None, ledger=needed, left=left, untouched=_untouched(request, counted, one),
    )  # fmt: skip


def _ledger(
    request: FitRequest, counted: ModelCount, one: MethodCount, method: str, base: str, optimizer: str, tokens: int
) -> Ledger:
    layerwise = request.layerwise and methods()[method].spec.trains_weights
    how = {"checkpointing": request.checkpointing, "layerwise": layerwise}
    return Ledger.of(one, base, optimizer, counted["logits"], tokens, **how)


def _untouched(request: FitRequest, counted: ModelCount, one: MethodCount) -> str:
    means_all = not request.targets or experts.ALL_LINEAR in request.targets
    words = "`--target all-linear --target experts`"
    return experts.note(one["untouched"], counted["parameters"], words) if means_all else ""


def best_row(
    request: FitRequest,
    counted: ModelCount,
    tokens: int,
    of_ranks: list[MethodCount],
    method: str,
    base: str,
    optimizer: str,
) -> FitRow:
    """Return the row with the largest rank x batch that fits.

    of_ranks: counts of the Method, one per rank. If the size of activations is unknown, return the row with the largest
    rank that fits. If nothing fits, return a row for the first rank, with the reason in `because`.
    """
    found: tuple[int, FitRow] | None = None
    room, logits, most = request.memory.number_B, counted["logits"], counted["positions"]

    def ledger(one: MethodCount, batch: int) -> Ledger:
        return _ledger(request, counted, one, method, base, optimizer, tokens * batch)

    untouched = _untouched(request, counted, of_ranks[0])
    for one in of_ranks:
        per_token = (
            one["activations"][request.checkpointing] + logits if one["activations"] and logits is not None else 0
        )
        smallest = ledger(one, 1)
        if smallest.total > room:
            continue
        longest = (room - smallest.lasting) // per_token if per_token else None
        batch = longest // tokens if longest is not None else None
        largest = ledger(one, batch or 1)
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
    least = ledger(of_ranks[0], 1)
    return FitRow(
        method, base, optimizer, DOES_NOT_FIT, of_ranks[0]["rank"], of_ranks[0]["trainable"],
        batch=1 if logits is not None else None, ledger=least, left=room - least.total, untouched=untouched,
    )  # fmt: skip


def row_document(row: FitRow) -> dict[str, Any]:
    """Return a row as an entry of the JSON document."""
    parts = {f"{part}_B": size for part, size in asdict(row.ledger).items()} if row.ledger else None
    if parts and row.batch is None:
        parts |= {"activations_B": None, "logits_B": None}  # unknown, not zero
    total = {"total_B": row.ledger.total, "left_B": row.left} if row.ledger else {}
    facts = {k: v for k, v in asdict(row).items() if k not in ("ledger", "left")}
    return facts | {"ledger": parts and parts | total}
