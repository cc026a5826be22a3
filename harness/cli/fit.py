"""The command `fit`: predict which ranks and batches can be trained within a memory."""

from __future__ import annotations

from typing import Any

import click

from harness.cli import options
from harness.errors import Exit

_ANSWERS = {"yes": Exit.PASS, "no": Exit.FAIL, "unknown": Exit.INFRASTRUCTURE}
"""Exit code for each answer of `fit --batch`."""


@click.command(epilog="Example: peft-harness fit llama-7b --memory 24GiB")
@click.argument("model")
@click.option(
    "--memory", required=True, metavar="SIZE", help="Memory of the device, e.g. 24GiB or 24GB (24GiB is 7 % larger)."
)
@click.option("--method", "methods", multiple=True, metavar="M", help=f"Only this method. {options.AGAIN}")
@click.option(
    "--base", "bases", multiple=True, metavar="B",
    help=f"Quantisation of the frozen weights: none, nf4 or nf4-dq. {options.AGAIN}  [default: all]",
)  # fmt: skip
@click.option(
    "--optimizer", "optimizers", multiple=True, metavar="O",
    help=f"adamw, adamw-8bit, paged-adamw or paged-adamw-8bit. {options.AGAIN}  [default: adamw]",
)  # fmt: skip
@click.option(
    "--target", "targets", multiple=True, metavar="LAYER",
    help="Layers to adapt: a name, `attention`, `all-linear` or, for lora or qlora, `experts`: stacked weights of a mixture."
    f" {options.AGAIN}  [default: all linear layers but the output layer]",
)  # fmt: skip
@click.option(
    "--rank", "ranks", multiple=True, type=int, metavar="R",
    help=f"Rank to try. {options.AGAIN}  [default: 1, 2, 4, ... 256]",
)  # fmt: skip
@click.option(
    "--tokens", type=int, metavar="N", help="Length of each text.  [default: 512, or the model's maximum if shorter]"
)
@click.option(
    "--batch", type=int, metavar="N",
    help="Ask whether a batch of N texts fits, at the given --rank; the exit code is 1 if it fits nowhere."
    "  [default: find the largest that fits]",
)  # fmt: skip
@click.option("--dtype", default="bfloat16", show_default=True, metavar="D", help="Dtype of weights and adapter.")
@click.option(
    "--checkpointing", is_flag=True, help="Gradient checkpointing: store the inputs of blocks only, recompute the rest."
)
@click.option("--layerwise", is_flag=True, help="Layer-wise updates, for methods that train the model's own weights.")
@click.option(
    "--formulas", is_flag=True,
    help="Use closed-form estimates only, without simulated training steps: faster, some rows off by 20 %.",
)  # fmt: skip
@options.as_json
def fit(
    model: str, memory: str, methods: tuple[str, ...], formulas: bool, as_json: bool, **choices: Any
) -> Exit:  # fmt: skip
    """Predict what fits into a memory.

    Prints, for each method and each quantisation of the frozen weights, the largest rank and batch that fit, and the
    parts of the memory. With --batch, the first line says yes or no, and training runs that do not fit are listed with
    changes that would make them fit. Nothing is trained or downloaded: each prediction is the peak of a training step
    on fake tensors, which have shapes but no data.

    MODEL is a shape from the papers (llama-7b ... llama-65b, llama-3-8b, llama-3-70b, gpt-3-175b-shape), a name that
    `peft-harness list models` shows, a folder with a config.json, or a repository in the local cache of the hub.
    """
    from harness.memory_model import fit as fitting
    from harness.memory_model import fit_question, fit_search
    from harness.report import fit_answer, fit_table

    request = fitting.fit_request(model, memory, methods, **choices)
    counted = fitting.count_model(request)
    document = fitting.document_by_formulas(request, counted)
    if request.batch is not None:
        document = fit_question.answer(request, counted, document, by_steps=not formulas)
        options.print_document(document, as_json, fit_answer.lines)
        return _ANSWERS[document["answer"]]
    if not formulas:
        document = fit_search.search_by_steps(request, counted, document)
    options.print_document(document, as_json, fit_table.lines)
    return Exit.PASS
