"""Description of a kind of model server: how its process starts, and what it can serve. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Launch:
    """Settings for one start of a model server."""

    base: Path
    """Folder of the base model."""
    name: str
    """Name under which the server must list the base."""
    adapters: Mapping[str, Path]
    """Name on the server -> folder of a LoRA adapter in the format of peft."""
    rank: int
    """Largest rank of the adapters."""
    dtype: str
    """Dtype of weights and computation, e.g. `float32`."""
    device: str
    """`cpu` or `cuda`."""
    port: int
    """Port on 127.0.0.1."""
    tokens: int
    """Largest number of tokens of a prompt and its answer together."""
    requests: int
    """Largest number of requests at the same time."""


@dataclass(frozen=True)
class ServerKind:
    """A kind of model server that has the completions API of OpenAI, with streaming.

    It must accept token ids as prompts, and return token ids, as vLLM does for the request field
    `return_tokens_as_token_ids`. If it also has vLLM's paths `/v1/load_lora_adapter` and `/v1/unload_lora_adapter`, the
    harness measures the replacement of an adapter.
    """

    name: str
    """Name in suites."""
    module: str
    """Module that must be importable in the Python that runs the server."""
    arguments: Callable[[Launch], Sequence[str]]
    """Function that returns the command line after the path of the Python that runs the server."""
    environment: str = ""
    """Name of the environment that has the module; see `peft-harness env list`. Empty if the server needs none."""
    variables: Mapping[str, str] = field(default_factory=dict)
    """Environment variables of the server's process."""
    distributions: tuple[str, ...] = ()
    """Distributions whose versions the Record holds. Those that are not installed are left out."""
    dtypes: tuple[str, ...] = ("float32", "bfloat16", "float16")
    """Dtypes in which the server can compute."""
    start_s: float = 600.0
    """Seconds after the start of the server within which it must answer."""
    patience_s: float = 300.0
    """Seconds within which the server must answer a request."""
