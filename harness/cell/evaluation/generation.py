"""Generate answers greedily in batches, up to a text that ends the answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from harness.cell.training.batches import Example, collate


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
    """Return the model's answers, in the order of the prompts, without the text of `until` that ends an answer.

    most: maximum tokens of an answer. Prompts of similar length share a batch, padded on the left.
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
    """Return a config for the likeliest token. It overrides all options in the model's own file."""
    # An instruction-tuned Llama ends its turns with another token than the tokenizer's.
    own = getattr(model.generation_config, "eos_token_id", None)
    ends = {*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id} - {None}
    return GenerationConfig(
        max_new_tokens=most, do_sample=False, num_beams=1, temperature=1.0, top_p=1.0, top_k=50, repetition_penalty=1.0,
        no_repeat_ngram_size=0, min_new_tokens=0, use_cache=True, pad_token_id=tokenizer.pad_token_id,
        eos_token_id=sorted(ends),
    )  # fmt: skip


class _Ends(StoppingCriteria):  # type: ignore[misc]
    """Ends each answer of a batch at the first text of `until`."""

    def __init__(self, tokenizer: Any, until: Sequence[str], prompt: int) -> None:
        self._tokenizer, self._until, self._prompt = tokenizer, until, prompt
        # A token has at least one byte. Two more tokens, because decoding may change the first one.
        self._window = 2 + max((len(text.encode()) for text in until), default=0)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        ended = [False] * len(input_ids)
        if self._until:
            first = max(self._prompt, input_ids.shape[1] - self._window)
            tails = self._tokenizer.batch_decode(input_ids[:, first:], skip_special_tokens=True)
            ended = [any(text in tail for text in self._until) for tail in tails]
        return torch.tensor(ended, device=input_ids.device)
