"""A causal language model for lm-eval: answers and their likelihoods, without superfluous logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from lm_eval.api.model import TemplateLM
from torch import nn

from harness.cell.evaluation.generation import generate
from harness.cell.training.batches import Example, Prompts, collate, refuse_long_answers
from harness.cell.training.loop import last_logits
from harness.suites.task_schema import MAX_GEN_TOKS


class CausalScorer(TemplateLM):  # type: ignore[misc]
    """Answers log-likelihood and generation requests for `model`.

    Requests share equal forward passes: choices of one token cost one pass over the prompt. max_tokens: longer sequences
    lose their beginning. `cut` has lm-eval's numbers of these items.
    """

    def __init__(
        self, model: nn.Module, tokenizer: Any, batch: int, max_tokens: int, report: Callable[[int, int], None]
    ) -> None:
        super().__init__()
        self.model, self.tokenizer = model, tokenizer
        self.batch, self.max_tokens, self.report = batch, max_tokens, report
        self.cut: set[int] = set()
        self._too_long: list[bool] = []

    @property
    def eot_token_id(self) -> int:
        """The id that stands for an empty context."""
        return int(self.tokenizer.eos_token_id)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Return token ids; without special tokens unless requested."""
        return list(self.tokenizer.encode(string, add_special_tokens=bool(add_special_tokens)))

    def encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Return (context ids, continuation ids) as scoring uses them, for training on the same tokens."""
        context_ids, continuation_ids = self._encode_pair(context, continuation)
        return list(context_ids), list(continuation_ids)

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return (log-likelihood, greedy) of every request, in their order."""
        self._too_long = []
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm)
        self.cut |= {request.doc_id for request, cut in zip(requests, self._too_long, strict=False) if cut}
        return found

    @torch.inference_mode()
    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        self.model.eval()
        device = next(self.model.parameters()).device
        self._too_long = [len(context) + len(answer) > self.max_tokens for _, context, answer in requests]
        # The model need not read the last answer token. Without it, choices of one token share a pass.
        passes: dict[tuple[int, ...], list[tuple[int, list[int]]]] = {}
        for index, (_, context, answer) in enumerate(requests):
            refuse_long_answers(len(answer), self.max_tokens)
            sequence = tuple((context + answer)[-self.max_tokens :][:-1])  # cut as in training
            passes.setdefault(sequence, []).append((index, answer))
        results: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        ordered = sorted(passes.items(), key=lambda item: len(item[0]))
        pad = self.tokenizer.pad_token_id
        for start in range(0, len(ordered), self.batch):
            chosen = ordered[start : start + self.batch]
            count = max(len(answer) for _, answers in chosen for _, answer in answers)
            inputs = collate([Example("", sequence, 0) for sequence, _ in chosen], pad, "left").to(device)
            log_p = torch.log_softmax(last_logits(self.model, inputs.inputs, count).float(), dim=-1)
            for row, (_, answers) in enumerate(chosen):
                for index, answer in answers:
                    ids = torch.tensor(answer, device=device)
                    own = log_p[row, -len(answer) :]
                    likelihood = own.gather(1, ids[:, None]).sum()
                    results[index] = (float(likelihood), bool((own.argmax(-1) == ids).all()))
            self.report(min(start + self.batch, len(ordered)), len(ordered))
        return results

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> NoReturn:
        """Refuse: perplexity tasks are not offered yet."""
        raise NotImplementedError(
            "perplexity tasks (loglikelihood_rolling) are not offered; use multiple_choice or generate_until"
        )

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Return greedy answers. The prompt is cut as in training, without room for the answer."""
        prompts = Prompts(self.tokenizer, self.max_tokens)
        # All requests of a task have the same options.
        options = requests[0].args[1]
        until = [options["until"]] if isinstance(options["until"], str) else options["until"]
        examples = [prompts.open(str(request.doc_id), request.args[0]) for request in requests]
        self.cut |= {request.doc_id for request, one in zip(requests, examples, strict=True) if one.cut}
        tokens = [list(one.tokens) for one in examples]
        most = int(options.get("max_gen_toks", MAX_GEN_TOKS))
        return generate(self.model, self.tokenizer, tokens, until, most, self.batch, self.report)
