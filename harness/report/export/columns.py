"""What each column of the tables is: its dtype, its unit, its meaning. The one place that documents them.

Units are base units: `s`, `B` (bytes), `J`, `W`, `Hz`, `°C`, `1` (a number, a share, a count); empty where a column is no
quantity. A missing value is NA, never 0 and never an empty text.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

TABLES = ("cells", "samples", "items", "checks")

TEXT, INTEGER, FLOAT, BOOLEAN, TIME = "string", "Int64", "Float64", "boolean", "datetime64[us, UTC]"


@dataclass(frozen=True)
class Column:
    """A column. dtype: of pandas. A name that ends in `.*` stands for many: `config.*` for every knob there is."""

    name: str
    dtype: str
    unit: str
    meaning: str


_KEY = (
    Column("run", TEXT, "", "id of the run"),
    Column("cell_id", TEXT, "", "the Cell: equal in every run that asks the same of it"),
    Column("attempt", INTEGER, "1", "which attempt at the Cell, from 1; with run and cell_id the key of all tables"),
)

GPU_EDGES = ("start", "end")
GPU_PHASE = {
    "reserved_B": Column("", INTEGER, "B", "of the training phase: highest memory that torch's allocator held"),
    "driver_B": Column(
        "", INTEGER, "B", "the same: highest in use on the device by its driver, looked at ten times a second"
    ),
    "alloc_retries": Column(
        "", INTEGER, "1", "the same: how often the allocator gave back what it held and asked again"
    ),
    "ooms": Column("", INTEGER, "1", "the same: allocations that failed"),
}
GPU_STATE = {
    "uuid": Column("", TEXT, "", "which GPU"),
    "sm_clock_Hz": Column("", INTEGER, "Hz", "clock of its processors"),
    "memory_clock_Hz": Column("", INTEGER, "Hz", "clock of its memory"),
    "power_W": Column("", FLOAT, "W", "what it drew"),
    "temperature_C": Column("", FLOAT, "°C", "its temperature"),
    "throttle": Column("", TEXT, "", "why its clocks were not higher, several with commas"),
}
_GPU = (
    *(replace(column, name=f"gpu.{name}") for name, column in GPU_PHASE.items()),
    *(
        replace(column, name=f"gpu.{edge}.{name}", meaning=f"{column.meaning}, as training {edge}ed")
        for edge in GPU_EDGES
        for name, column in GPU_STATE.items()
    ),
)

_CELLS = (
    *_KEY,
    Column("latest", BOOLEAN, "", "whether this attempt stands for its Cell in the run; older attempts do not count"),
    Column("status", TEXT, "", "ok, or how the attempt ended; `peft-harness explain STATUS`"),
    Column("because", TEXT, "", "why the status is not ok"),
    Column(
        "label", TEXT, "", "a name for plots, which Cells share that differ in the seed alone; cell_id alone is unique"
    ),
    Column("model", TEXT, "", "the base model"),
    Column("task", TEXT, "", "what is trained and scored"),
    Column("method", TEXT, "", "e.g. lora; `peft-harness list methods`"),
    Column("implementation", TEXT, "", "whose program, e.g. hf-peft"),
    Column("provider", TEXT, "", "the distribution that the implementation came from"),
    Column("provider_version", TEXT, "", "its version"),
    Column("base", TEXT, "", "the frozen weights: none (not quantised), nf4, nf4-dq"),
    Column("base_implementation", TEXT, "", "who quantised them"),
    Column("optimizer", TEXT, "", "the optimizer"),
    Column("dtype", TEXT, "", "of the weights and the computation"),
    Column("seed", INTEGER, "1", "of everything drawn at random"),
    Column("device", TEXT, "", "cpu or cuda"),
    Column("rank", INTEGER, "1", "config.rank, or r of an adapter_config, where it is a whole number"),
    Column(
        "config.*", "", "1", "a knob of the method; lists and mappings as JSON; NA: not a knob of this method, or unset"
    ),
    Column("training.steps", INTEGER, "1", "optimizer steps asked for; 0: evaluation only"),
    Column("training.batch", INTEGER, "1", "examples per step"),
    Column("training.lr", FLOAT, "1", "peak learning rate"),
    Column("training.head_lr", FLOAT, "1", "of a new task head; NA: training.lr"),
    Column("training.warmup", INTEGER, "1", "steps of learning-rate warm-up"),
    Column("training.weight_decay", FLOAT, "1", "weight decay"),
    Column("training.max_tokens", INTEGER, "1", "longer texts are truncated"),
    Column("training.accumulate", INTEGER, "1", "parts that a step's batch goes through the model in"),
    Column("training.checkpointing", BOOLEAN, "", "whether activations are computed again in the backward pass"),
    Column("training.compile", BOOLEAN, "", "whether the model was compiled by torch.compile in gate and training"),
    Column(
        "training.layerwise",
        BOOLEAN,
        "",
        "whether weights were stepped within the backward pass",
    ),
    Column("training.lr_ratio", FLOAT, "1", "LoRA+: learning rate of factors B over training.lr"),
    Column("evaluation.items", INTEGER, "1", "test items asked for"),
    Column("evaluation.batch", INTEGER, "1", "test items per forward pass"),
    Column("evaluation.latency", BOOLEAN, "", "whether latencies were asked for"),
    Column("evaluation.prompt_batch", INTEGER, "1", "of latencies: prompts in a forward pass"),
    Column("evaluation.prompt_tokens", INTEGER, "1", "of latencies: tokens asked for in each prompt"),
    Column("evaluation.passes", INTEGER, "1", "of latencies: timed passes of each variant, at least"),
    Column(
        "evaluation.skip", INTEGER, "1", "test items passed over first; not 0: a try of a search for a learning rate"
    ),
    Column("parameters.adapter", INTEGER, "1", "scalars that the method trains"),
    Column("parameters.head", INTEGER, "1", "scalars of a new task head, trained too"),
    Column("parameters.trainable", INTEGER, "1", "what the optimizer updates: the two above"),
    Column("parameters.total", INTEGER, "1", "all scalars of the model"),
    Column("accuracy", FLOAT, "1", "share of the test items that are right"),
    Column("accuracy_low", FLOAT, "1", "its interval, for a new sample of items: says nothing of other seeds"),
    Column("accuracy_high", FLOAT, "1", "the same"),
    Column("accuracy_n", INTEGER, "1", "test items scored"),
    Column("accuracy_metric", TEXT, "", "the metric"),
    Column("accuracy_interval", TEXT, "", "how the interval was made"),
    Column("scored_by", TEXT, "", "lm-eval with its version, or harness"),
    Column(
        "cut_items", INTEGER, "1", "scored items that lost something, being longer than max_tokens; NA: not counted"
    ),
    Column("text_rules", TEXT, "", "how texts became tokens in training, and which of them carry loss"),
    Column("cut_examples", INTEGER, "1", "trained examples that lost something, being too long; NA: not counted"),
    Column(
        "training_peak_B", INTEGER, "B", "highest memory in the training phase: resident on a CPU, allocated on a GPU"
    ),
    Column("training_peak_above_imports_B", INTEGER, "B", "the same, less what the process took before the model"),
    Column(
        "training_energy_J",
        FLOAT,
        "J",
        "energy of the training phase; NA where nothing counts it, under 2 s, and by rapl where other Cells ran at once",
    ),
    Column("energy.source", TEXT, "", "who counts it: nvml (the GPU), rapl (all CPU packages)"),
    Column("energy.because", TEXT, "", "why nobody does"),
    Column("checkpoint.adapter_file_B", INTEGER, "B", "size of a safetensors file with adapter and head, as written"),
    Column("checkpoint.head_B", INTEGER, "B", "of that, the head's tensors"),
    Column(
        "checkpoint.model_B", INTEGER, "B", "the whole model as saved when merged or fully trained, summed over tensors"
    ),
    Column("checkpoint.because", TEXT, "", "why there is no adapter's file"),
    Column("memory.source", TEXT, "", "how the peaks were taken"),
    Column("memory.baseline_B", INTEGER, "B", "resident after the imports, before the model"),
    Column("memory.weights_B", INTEGER, "B", "frozen weights, summed over tensors"),
    Column("memory.adapter_B", INTEGER, "B", "trainable tensors"),
    Column("memory.gradients_B", INTEGER, "B", "their gradients"),
    Column("memory.optimizer_B", INTEGER, "B", "the state of the optimizer"),
    Column(
        "memory.optimizer_host_B",
        INTEGER,
        "B",
        "of a run on a GPU: optimizer states in the host's memory, not in the above",
    ),
    Column(
        "memory.counted_peak_B",
        INTEGER,
        "B",
        "most that tensors took at one time in a training step; on a CPU counted in one more, after the training",
    ),
    Column("memory.predicted.weights_B", INTEGER, "B", "what the shape alone lets expect of memory.weights_B"),
    Column("memory.predicted.adapter_B", INTEGER, "B", "of memory.adapter_B"),
    Column("memory.predicted.gradients_B", INTEGER, "B", "of memory.gradients_B"),
    Column("memory.predicted.optimizer_B", INTEGER, "B", "of memory.optimizer_B"),
    Column("memory.predicted.optimizer_host_B", INTEGER, "B", "of memory.optimizer_host_B"),
    Column("memory.predicted.activations_B", INTEGER, "B", "of what is kept for a backward pass, at max_tokens a text"),
    Column("memory.predicted.logits_B", INTEGER, "B", "of the logits and their gradient, where every token has some"),
    Column(
        "memory.predicted.step_B", INTEGER, "B", "of what exists only in an optimizer's step, without the two above"
    ),
    Column("memory.predicted.peak_B", INTEGER, "B", "of memory.counted_peak_B, by a step on tensors without data"),
    Column("memory.predicted.peak_by", TEXT, "", "whose code took that step, where it was not the Cell's own"),
    Column("memory.predicted.no_peak", TEXT, "", "why there is none"),
    Column(
        "memory.predicted.untouched",
        TEXT,
        "",
        "how many weights neither all-linear nor a base in 4 bits reaches: experts",
    ),
    Column("memory.not_predicted", TEXT, "", "why nothing was predicted"),
    Column("step_s", FLOAT, "s", "median time of a steady step; NA where no_speed says why"),
    Column("step_low_s", FLOAT, "s", "its 95 % interval, over the steps of this one process"),
    Column("step_high_s", FLOAT, "s", "the same"),
    Column("step_n", INTEGER, "1", "steady steps it was taken from"),
    Column("tokens_per_s", FLOAT, "1/s", "real tokens, padding not counted, over the steady steps; NA as step_s"),
    Column("no_speed", TEXT, "", "why no speed of this Cell may be told: a check failed, or there is no reference"),
    Column("busy", TEXT, "", "in numbers, that the steps waited for a CPU that others were using"),
    Column("notes", TEXT, "", "what a reader of the attempt must know: a list, as JSON"),
    Column("started", TIME, "", "when the attempt began"),
    Column("duration_s", FLOAT, "s", "wall time of the whole attempt, start-up and all"),
    Column("phase_s.*", FLOAT, "s", "wall time of a phase of the attempt"),
    Column("phase_peak_B.*", INTEGER, "B", "highest memory inside the phase"),
    Column("phase_energy_J.*", FLOAT, "J", "energy of a phase; NA as training_energy_J"),
    *_GPU,
    Column("failure.kind", TEXT, "", "exception class, signal, or the runner's own word"),
    Column("failure.message", TEXT, "", "its message"),
    Column("failure.phase", TEXT, "", "where it happened"),
    Column("failure.requested_B", INTEGER, "B", "what an out-of-memory allocation asked for"),
    Column("failure.last_peak_B", INTEGER, "B", "highest memory before it failed"),
    Column("environment.id", TEXT, "", "equal where times may be compared: the same software and machine"),
    Column("environment.python", TEXT, "", "version"),
    Column("environment.torch", TEXT, "", "version"),
    Column("environment.transformers", TEXT, "", "version"),
    Column("environment.os", TEXT, "", "system and release"),
    Column("environment.cpu", TEXT, "", "model name"),
    Column("environment.cores", INTEGER, "1", "physical cores the process could use"),
    Column("environment.memory_B", INTEGER, "B", "memory of the machine"),
    Column("environment.gpu", TEXT, "", "the first GPU: uuid, name, driver, memory"),
    Column("environment.threads", INTEGER, "1", "threads torch computed with"),
    Column("environment.code_version", TEXT, "", "hash of harness/ and reference/"),
    Column("environment.git_sha", TEXT, "", "commit of the checkout"),
    Column("environment.git_dirty", BOOLEAN, "", "whether the checkout had changes"),
)

_SAMPLES = (
    *_KEY,
    Column("kind", TEXT, "", "step_seconds, losses, gradient_norms, tokens, padded_tokens (one per optimizer step); "
           "latency_forward, latency_prefill (per call), latency_decode (per generated token)"),
    Column("variant", TEXT, "", "of a latency: base, unmerged, merged, multi-adapter"),
    Column("latency_batch", INTEGER, "1", "of a latency: its batch"),
    Column("latency_tokens", INTEGER, "1", "of a latency: tokens of the prompt, or for decode tokens generated"),
    Column("latency_adapters", INTEGER, "1", "adapters that a batch of several mixes, or 1: the same batch beside it"),
    Column("index", INTEGER, "1", "which sample of its kind and variant, in the order taken, from 0"),
    Column("value", FLOAT, "", "the sample, in the unit beside it"),
    Column("unit", TEXT, "", "s, or 1: losses are in nats, tokens are counts"),
    Column("warmup", BOOLEAN, "", "a real step, but not counted as steady in step_s and tokens_per_s"),
    Column("no_speed", TEXT, "", "of times: why no speed may be told from them: a check failed, or there is no reference"),
)  # fmt: skip

_ITEMS = (
    *_KEY,
    Column("task", TEXT, "", "the task"),
    Column("index", INTEGER, "1", "place among the scored items, from 0"),
    Column("item", TEXT, "", "id of the test item, equal for every Cell that was asked it"),
    Column("correct", INTEGER, "1", "1 if right, 0 if not"),
)

_CHECKS = (
    *_KEY,
    Column("check", TEXT, "", "method/check/dtype/state; `peft-harness explain CHECK` tells its rule"),
    Column("outcome", TEXT, "", "pass, fail, skipped"),
    Column("error", FLOAT, "1", "the worst error, in the norm that policy names; NA: not finite, or none"),
    Column("allowed", FLOAT, "1", "the largest error that passes"),
    Column("tensor", TEXT, "", "the tensor with the worst ratio of the two"),
    Column("worst", TEXT, "", "its worst element: index, what it was, what it should be"),
    Column("policy", TEXT, "", "the tolerance policy"),
    Column("nonfinite", INTEGER, "1", "elements that are NaN or infinite where the reference is finite"),
    Column("detail", TEXT, "", "why it failed or was skipped"),
)

COLUMNS: dict[str, tuple[Column, ...]] = dict(zip(TABLES, (_CELLS, _SAMPLES, _ITEMS, _CHECKS), strict=True))


def columns(table: str, found: list[str]) -> list[Column]:
    """Return the columns of a table, in order, with every `.*` multiplied out by the names `found` in its rows.

    A name that nobody declared is a KeyError: it would have neither unit nor meaning.
    """
    declared = {column.name: column for column in COLUMNS[table]}
    many: dict[str, list[Column]] = {name: [] for name in declared if name.endswith(".*")}
    for name in found:
        if name not in declared:
            pattern = name.partition(".")[0] + ".*"
            many[pattern].append(replace(declared[pattern], name=name))
    return [one for name, column in declared.items() for one in many.get(name, [column])]
