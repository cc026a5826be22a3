"""Adapt a causal language model to lm-eval, so that lm-eval can score it.

To score a given answer, the model computes only the logits of the answer's tokens. Generation is greedy and in batches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from lm_eval.api.model import TemplateLM
from torch import Tensor, nn
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from harness.cell.training.batches import Example, Prompts, collate, refuse_long_answers
from harness.cell.training.loop import last_logits
from harness.suites.lm_eval_keys import MAX_GEN_TOKS


class CausalScorer(TemplateLM):  # type: ignore[misc]
    """A model for lm-eval. It uses `model` to answer requests of lm-eval: to score a text, or to generate a text.

    Requests with equal inputs share a forward pass. For example, if all choices of a question have a single token, one
    pass over the prompt scores all of them. max_tokens: a longer sequence loses its beginning. `cut` holds the numbers,
    as lm-eval counts them, of the items that lost their beginning.
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
        """The id of the token that replaces an empty context."""
        return int(self.tokenizer.eos_token_id)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Return the token ids of a text, without special tokens unless `add_special_tokens` is true."""
        return list(self.tokenizer.encode(string, add_special_tokens=bool(add_special_tokens)))

    def encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Return the token ids of the context and of the continuation, for training as well as for scoring."""
        context_ids, continuation_ids = self._encode_pair(context, continuation)
        return list(context_ids), list(continuation_ids)

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return a pair for each request, in the order of the requests.

        The pair is the log-likelihood of the request's answer, and whether greedy decoding would give this answer.
        """
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
        # The model need not read the last token of an answer. Without this token, choices of one token share a pass.
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
        """Raise NotImplementedError: perplexity tasks are not supported yet."""
        raise NotImplementedError(
            "perplexity tasks (loglikelihood_rolling) are not offered; use multiple_choice or generate_until"
        )

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Return the greedy answer to each request.

        `max_tokens` limits the prompt alone, without the answer. A longer prompt loses its beginning.
        """
        prompts = Prompts(self.tokenizer, self.max_tokens)
        # All requests of a task have the same options.
        options = requests[0].args[1]
        until = [options["until"]] if isinstance(options["until"], str) else options["until"]
        examples = [prompts.open(str(request.doc_id), request.args[0]) for request in requests]
        self.cut |= {request.doc_id for request, one in zip(requests, examples, strict=True) if one.cut}
        tokens = [list(one.tokens) for one in examples]
        most = int(options.get("max_gen_toks", MAX_GEN_TOKS))
        return generate(self.model, self.tokenizer, tokens, until, most, self.batch, self.report)


@torch.inference_mode()
def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    until: Sequence[str],
    most: int,
    batch: int,
    report: Callable[[int, int], None],
) -> list[str]:
    """Return the model's greedy answers in the order of the prompts.

    until: texts that end an answer; the answer does not include them. most: largest number of tokens of an answer.
    Prompts of similar length share a batch, which is padded on the left.
    """
    model.eval()
    device = next(model.parameters()).device
    config = _greedy(model, tokenizer, most)
    answers = [""] * len(prompts)
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(by_length), batch):
        chosen = by_length[start : start + batch]
        padded = collate([Example("", tuple(prompts[i]), 0) for i in chosen], tokenizer.pad_token_id, "left").to(device)
        ids, mask = padded.inputs["input_ids"], padded.inputs["attention_mask"]
        ends = StoppingCriteriaList([_Ends(tokenizer, until, ids.shape[1])])
        written = model.generate(ids, attention_mask=mask, generation_config=config, stopping_criteria=ends)
        texts = tokenizer.batch_decode(written[:, ids.shape[1] :], skip_special_tokens=True)
        for i, text in zip(chosen, texts, strict=True):
            answers[i] = min((text.partition(end)[0] for end in until), key=len, default=text)
        report(min(start + batch, len(by_length)), len(by_length))
    return answers


def _greedy(model: nn.Module, tokenizer: Any, most: int) -> GenerationConfig:
    """Return a config that always selects the likeliest token. `most` is the largest number of tokens.

    Of the model's own generation_config.json, only the end tokens have an effect.
    """
    # An instruction-tuned Llama ends its turns with another token than the end token of the tokenizer.
    own = getattr(model.generation_config, "eos_token_id", None)
    ends = {*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id} - {None}
    return GenerationConfig(
        max_new_tokens=most, do_sample=False, num_beams=1, temperature=1.0, top_p=1.0, top_k=50, repetition_penalty=1.0,
        no_repeat_ngram_size=0, min_new_tokens=0, use_cache=True, pad_token_id=tokenizer.pad_token_id,
        eos_token_id=sorted(ends),
    )  # fmt: skip


class _Ends(StoppingCriteria):  # type: ignore[misc]
    """A criterion that ends each answer of a batch as soon as the answer contains a text of `until`."""

    def __init__(self, tokenizer: Any, until: Sequence[str], prompt: int) -> None:
        self._tokenizer, self._until, self._prompt = tokenizer, until, prompt
        # Number of last tokens to search: a token has at least one byte. Decoding may change the first token of the window,
        # so that two tokens are added.
        self._window = 2 + max((len(text.encode()) for text in until), default=0)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        ended = [False] * len(input_ids)
        if self._until:
            first = max(self._prompt, input_ids.shape[1] - self._window)
            tails = self._tokenizer.batch_decode(input_ids[:, first:], skip_special_tokens=True)
            ended = [any(text in tail for text in self._until) for tail in tails]
        return torch.tensor(ended, device=input_ids.device)
