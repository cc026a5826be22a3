"""Assets that the harness makes itself, so that a whole run needs no download.

Run as `python -m harness.assets.generated NAME FOLDER`. The sentences and the model's words belong together: the tiny model
reads every word that the toy data use.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from pathlib import Path

_LABELS = ("bad", "good")
OPINIONS = (
    ("bitter", "clumsy", "cold", "dull", "empty", "noisy", "slow", "stale", "ugly", "weak"),
    ("brave", "bright", "clever", "fresh", "funny", "gentle", "lovely", "sharp", "sweet", "warm"),
)
_SUBJECTS = ("cast", "ending", "film", "music", "plot", "scene", "story", "title")
_FILLERS = ("again", "also", "here", "now", "often", "perhaps", "still", "then", "there", "today")
_REST = ("the", "is", "and", "but", "=", "Review:", "Sentiment:", "negative", "positive")
_ROWS = 600


def toy_sentiment(folder: Path) -> None:
    """Write rows.jsonl: sentences of two or three opinions. The label is the majority's opinion. Labels are balanced."""
    chance = random.Random(0)  # noqa: S311  # reproducible, not secret
    texts: dict[str, int] = {}
    while len(texts) < _ROWS:
        label = len(texts) % 2
        words = chance.sample(OPINIONS[label], 2)
        if chance.random() < 0.5:  # a third opinion, of the other kind: no single word decides
            words.append(chance.choice(OPINIONS[1 - label]))
        chance.shuffle(words)
        first, *others = words
        text = f"the {chance.choice(_SUBJECTS)} is {first}"
        for word in others:
            text += f" {chance.choice(('and', 'but'))} {chance.choice(_FILLERS)} {word}"
        texts.setdefault(text, label)
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as file:
        for number, (text, label) in enumerate(texts.items(), 1):
            file.write(json.dumps({"id": f"toy-{number}", "text": text, "label": label}) + "\n")


def tiny_llama(folder: Path) -> None:
    """Write a Llama of two layers with seeded random weights, and a tokenizer with one token per word."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    # A word carries its space, as in the tokenizers of real Llamas: " bad" is one token, and decoding gives the text.
    words = [f"▁{word}" for word in (*_LABELS, *OPINIONS[0], *OPINIONS[1], *_SUBJECTS, *_FILLERS, *_REST)]
    vocabulary = {token: index for index, token in enumerate([*special.values(), *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=special["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=256, **special).save_pretrained(folder)

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        # 1/sqrt(hidden): each layer then changes what it reads about as much as a trained one does.
        initializer_range=0.125,
        pad_token_id=vocabulary["<pad>"],
        bos_token_id=vocabulary["<s>"],
        eos_token_id=vocabulary["</s>"],
    )
    LlamaForCausalLM(config).save_pretrained(folder)


MODELS: dict[str, Callable[[Path], None]] = {"tiny-llama": tiny_llama}
DATA: dict[str, Callable[[Path], None]] = {"toy-sentiment": toy_sentiment}


if __name__ == "__main__":
    (MODELS | DATA)[sys.argv[1]](Path(sys.argv[2]))
