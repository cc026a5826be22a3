"""The subject of a check of a loader: the implementation, and one adapter of the corpus in suites/adapters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from harness.conformance.adapter_files import corpus
from harness.conformance.adapter_files.adapter_file import AdapterFile
from harness.conformance.adapter_files.reference_logits import reference_logits
from harness.conformance.subject import DTYPES
from harness.conformance.tolerance_constants import PERTURBED_DRAWS
from harness.methods.loader import ADAPTER_FILES, Loader


@dataclass(frozen=True)
class CorpusAdapter:
    """One adapter of the corpus."""

    name: str
    folder: Path
    """Folder with adapter_config.json, adapter_model.safetensors and expected.safetensors."""
    base: Path
    """Folder of the base model."""
    prompts: list[list[int]]
    """Token ids of each prompt."""
    logits: list[Tensor]
    """Logits of each prompt in float64: (tokens, vocabulary), or (labels,) for a classifier."""


@cache
def corpus_adapter(name: str) -> CorpusAdapter:
    """Read one adapter of the corpus."""
    file = AdapterFile.read(corpus.folder() / name)
    expected = load_file(file.folder / "expected.safetensors")
    count = sum(key.startswith("prompt.") for key in expected)
    return CorpusAdapter(
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
    adapter: CorpusAdapter

    @property
    def method(self) -> str:
        """The target. Check ids contain it in the place of a Method's name."""
        return ADAPTER_FILES

    def fresh(self) -> Loader:
        """Load the base of the case again, and return the loader without an adapter."""
        return self.function(self.adapter.base, self.dtype)

    def loaded(self, name: str = "first") -> Loader:
        """Load the base of the case and its adapter, under this name."""
        loader = self.fresh()
        loader.load(self.adapter.folder, name)
        return loader

    def truth(self) -> dict[str, Tensor]:
        """Map the name of each prompt to the logits that the corpus has for it, in float64."""
        return by_prompt(self.adapter.logits)

    def rounded(self) -> Iterator[dict[str, Tensor]]:
        """Yield the reference's logits in the dtype of the case, by prompt. Further draws perturb its weights."""
        one, adapter = self.adapter, AdapterFile.read(self.adapter.folder)
        for seed in (None, *range(PERTURBED_DRAWS)):
            perturbation = None if seed is None else torch.Generator().manual_seed(seed)
            yield by_prompt(reference_logits(one.base, adapter, one.prompts, DTYPES[self.dtype], perturbation))


def by_prompt(logits: list[Tensor]) -> dict[str, Tensor]:
    """Map the names `prompt 0`, `prompt 1` and so on to logits."""
    return {f"prompt {index}": one for index, one in enumerate(logits)}
