"""The subject of loader checks: the implementation, and one adapter from suites/adapters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from harness.conformance.adapter_files import corpus, variants
from harness.conformance.adapter_files.adapter_file import AdapterFile
from harness.conformance.adapter_files.reference_logits import (
    WeightedAdapterFile,
    combined,
    logits_of,
    reference_logits,
)
from harness.conformance.comparison.tolerance_policies import Judgement, carried_noise
from harness.conformance.subject import DTYPES
from harness.conformance.tolerance_constants import PERTURBED_DRAWS
from harness.methods.loader import ADAPTER_FILES, Loader
from harness.methods.module_copy import copied

FIRST, SECOND = "style", "style-2"
"""Names under which checks load two adapters. SECOND begins with FIRST, because some programs confuse such names."""


@dataclass(frozen=True)
class ExpectedAdapter:
    """An adapter on disk, usually from suites/adapters, with prompts and the logits that it defines for them."""

    name: str
    folder: Path
    """Folder with adapter_config.json and adapter_model.safetensors."""
    base: Path
    """Folder of the base model."""
    prompts: list[list[int]]
    """Token ids of each prompt."""
    logits: list[Tensor]
    """Logits of each prompt in float64: (tokens, vocabulary), or (labels,) for a classifier."""


@cache
def corpus_adapter(name: str) -> ExpectedAdapter:
    """Read the adapter `name` from suites/adapters, with the prompts and logits in its expected.safetensors."""
    file = AdapterFile.read(corpus.folder() / name)
    expected = load_file(file.folder / "expected.safetensors")
    count = sum(key.startswith("prompt.") for key in expected)
    return ExpectedAdapter(
        name,
        file.folder,
        (file.folder / file.config["base_model_name_or_path"]).resolve(),
        [expected[f"prompt.{index}"].tolist() for index in range(count)],
        [expected[f"logits.{index}"] for index in range(count)],
    )


@dataclass(frozen=True)
class LoaderSubject:
    """A loader under test, and the adapter of one case."""

    function: Callable[..., Loader]
    """Function (base_folder, dtype) -> Loader."""
    dtype: str
    """Name of the dtype of the base model."""
    adapter: ExpectedAdapter

    @property
    def method(self) -> str:
        """The name ADAPTER_FILES, for every loader. Check ids contain it in the place of a Method's name."""
        return ADAPTER_FILES

    def fresh(self) -> Loader:
        """Return a new loader with the base of the case, and without an adapter."""
        return self.function(self.adapter.base, self.dtype)

    def loaded(self) -> Loader:
        """Return a new loader with the base of the case and, under the name FIRST, the adapter of the case."""
        loader = self.fresh()
        loader.load(self.adapter.folder, FIRST)
        return loader

    def loaded_both(self) -> Loader:
        """Return a new loader with the base of the case, the adapter of the case as FIRST, and `another` as SECOND."""
        loader = self.loaded()
        loader.load(self.another, SECOND)
        return loader

    def truth(self) -> dict[str, Tensor]:
        """Return the float64 logits that the adapter defines, under the names `prompt 0`, `prompt 1` and so on."""
        return by_prompt(self.adapter.logits)

    def rounded(self) -> Iterator[dict[str, Tensor]]:
        """Yield the reference's logits in the case's dtype, named as in `truth`: first as computed, then with perturbed
        weights.
        """
        one, adapter = self.adapter, AdapterFile.read(self.adapter.folder)
        for seed in (None, *range(PERTURBED_DRAWS)):
            perturbation = None if seed is None else torch.Generator().manual_seed(seed)
            yield by_prompt(reference_logits(one.base, adapter, one.prompts, DTYPES[self.dtype], perturbation))

    @property
    def prompts(self) -> list[list[int]]:
        """A list with only the longest prompt. Checks that compute logits many times use it."""
        return [max(self.adapter.prompts, key=len)]

    @property
    def another(self) -> Path:
        """Folder of another adapter of the same layers: other values, a rank larger by 1, and twice the alpha."""
        return variants.another(self.adapter.folder, self.adapter.base)

    def compare(
        self, have: Mapping[str, Sequence[Tensor]], want: Mapping[str, Sequence[WeightedAdapterFile]]
    ) -> Judgement:
        """Judge logits by those that the reference computes in float64 for weighted sums of adapters.

        have: name of each sum -> its logits for `prompts`. want: name of each sum -> its adapters; an empty list stands
        for the base alone.
        """

        def expected(dtype: str, seed: int | None = None) -> dict[str, Tensor]:
            prompts = tuple(map(tuple, self.prompts))
            sums = {name: (self.adapter.base, tuple(parts), prompts, dtype, seed) for name, parts in want.items()}
            return dict(_named({name: _combined_logits(*one) for name, one in sums.items()}))

        draws = (expected(self.dtype, seed) for seed in (None, *range(PERTURBED_DRAWS)))
        return carried_noise(dict(_named(have)), expected("float64"), draws, self.dtype)


@cache
def _combined_logits(
    base: Path,
    parts: tuple[WeightedAdapterFile, ...],
    prompts: tuple[tuple[int, ...], ...],
    dtype: str,
    seed: int | None,
) -> list[Tensor]:
    model = _combined(base, parts, dtype)
    if seed is None:
        return logits_of(model, prompts)
    return logits_of(copied(model), prompts, torch.Generator().manual_seed(seed))


@lru_cache(maxsize=16)  # the draws of one judgement move the weights of the same few models
def _combined(base: Path, parts: tuple[WeightedAdapterFile, ...], dtype: str) -> nn.Module:
    return combined(base, parts, DTYPES[dtype])


def _named(logits: Mapping[str, Sequence[Tensor]]) -> Iterator[tuple[str, Tensor]]:
    for name, tensors in logits.items():
        for prompt, tensor in by_prompt(list(tensors)).items():
            yield f"{name}, {prompt}", tensor


def by_prompt(logits: list[Tensor]) -> dict[str, Tensor]:
    """Return a dict from the names `prompt 0`, `prompt 1` and so on to the tensors in `logits`."""
    return {f"prompt {index}": one for index, one in enumerate(logits)}
