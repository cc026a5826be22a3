"""Measurements of a model server that served a Cell's adapters. Imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from harness.records.base_model import Bytes, Count, FrozenModel, Seconds

Load = Literal["base", "one adapter", "several adapters", "base and adapters"]
"""A load: the models to which timed requests go. In the last two kinds of load, simultaneous requests go to different
models."""


class ServedTimes(FrozenModel):
    """Times of a server under one load. The server gets rounds of `requests` simultaneous requests."""

    load: Load
    """Models to which the requests go."""
    requests: Count
    """Number of requests at the same time."""
    adapters: Count
    """Number of different adapters among the requests of a round."""
    prompt_tokens: Count
    """Number of tokens of each prompt."""
    tokens: Count
    """Number of tokens that the server generates for each request."""
    first_token_s: list[Seconds] = Field(default=[])
    """Seconds from the start of each request to its first token."""
    token_s: list[Seconds] = Field(default=[])
    """Mean seconds per token after the first, for each request."""
    round_s: list[Seconds] = Field(default=[])
    """Seconds from the start of each round to the last token of its last request."""
    because: str = ""
    """Reason why nothing was timed. Empty if the load was timed."""


class Served(FrozenModel):
    """A server that loaded the Cell's base and adapters, and its times."""

    server: str
    """Kind of server, e.g. `vllm`."""
    software: dict[str, str] = Field(default={})
    """Library -> version, for the server and libraries that matter to it, as installed in the server's Python."""
    start_s: Seconds | None = None
    """Seconds from the start of the server's process to its first answer. None if it gave none."""
    times: list[ServedTimes] = Field(default=[])
    """Times under each load."""
    swap_s: list[Seconds] = Field(default=[])
    """Seconds for each replacement of an adapter by another one, up to the first token of the new one."""
    swap_because: str = ""
    """Reason why no replacement was timed."""
    memory_B: Bytes | None = None
    """Resident memory of all processes of the server after the timing."""
    wall_s: Seconds | None = None
    """Wall time of all timed requests and replacements together."""
    own_cpu_s: Seconds | None = None
    """CPU seconds of the server and of the Cell's process during the timing."""
    other_cpu_s: Seconds | None = None
    """CPU seconds of all other processes of the machine during the timing."""
    because: str = ""
    """Reason why nothing was timed. Empty if at least one load was timed."""
