"""Time a server under loads that alternate: base, one adapter, several adapters, base and adapters."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Barrier

from harness.conformance.served.client import Client
from harness.conformance.served.session import SWAPPED, Session
from harness.records.served import Load, ServedTimes

TOGETHER = 4
"""Number of simultaneous requests in a round of a load with several requests."""
TOKENS = 16
"""Number of tokens that the server generates for each request."""
ROUNDS = 6
"""Smallest number of timed rounds of each load. A round is a set of simultaneous requests. With fewer rounds, a median
has no 95 % interval."""


@dataclass
class _Target:
    load: Load
    models: Sequence[str]
    """Name of the model that each request of a round goes to."""
    adapters: int
    first_token_s: list[float] = field(default_factory=list)
    token_s: list[float] = field(default_factory=list)
    round_s: list[float] = field(default_factory=list)


def measure(
    client: Client, base: str, adapters: Sequence[str], ids: Sequence[int], prompt_tokens: int, seed: int,
    refused: Mapping[str, str], rounds: int = ROUNDS,
) -> list[ServedTimes]:  # fmt: skip
    """Return the times under each load. A load in `refused` gets its reason instead.

    base, adapters: names on the server; the first adapter is the trained one. ids: token ids from which prompts are
    drawn. Each request has a new prompt, so that no answer comes from a prefix cache. The loads take turns, and their
    order reverses in each round. The first round of each load is not timed.
    """
    draw = random.Random(f"{seed} served")  # noqa: S311  # prompts, not secrets
    targets = _targets(base, adapters)
    allowed = [one for one in targets if one.load not in refused]
    for number in range(rounds + 1):
        for target in allowed[:: -1 if number % 2 else 1]:
            prompts = [draw.choices(ids, k=prompt_tokens) for _ in target.models]
            wall, requests = _round(client, target.models, prompts)
            if number:
                target.round_s.append(wall)
                target.first_token_s += [first for first, _ in requests]
                target.token_s += [(last - first) / (TOKENS - 1) for first, last in requests]
    return [
        ServedTimes(
            load=one.load, requests=len(one.models), adapters=one.adapters, prompt_tokens=prompt_tokens, tokens=TOKENS,
            first_token_s=one.first_token_s, token_s=one.token_s, round_s=one.round_s,
            because=refused.get(one.load, ""),
        )
        for one in targets
    ]  # fmt: skip


def swaps(session: Session, ids: Sequence[int], prompt_tokens: int, rounds: int) -> list[float]:
    """Replace an adapter on the server by another one `rounds` times, and send a prompt after each replacement.

    Return the seconds from the start of each replacement to the first token of the answer. session: a session whose
    `swapped_alone` was called before, so that there is an adapter to replace. ids, prompt_tokens: as in `measure`.
    """
    draw = random.Random(f"{session.seed} swaps")  # noqa: S311  # prompts, not secrets
    names, found = list(session.adapters), []
    for number in range(rounds):
        prompt = draw.choices(ids, k=prompt_tokens)
        begun = time.perf_counter()
        session.replace(names[number % 2])
        loaded = time.perf_counter() - begun
        found.append(loaded + session.client.stream(SWAPPED, prompt, 1)[0])
    return found


def _targets(base: str, adapters: Sequence[str]) -> list[_Target]:
    one, several = adapters[0], [adapters[i % len(adapters)] for i in range(TOGETHER)]
    half = several[: TOGETHER // 2]
    return [
        _Target("base", [base], 0),
        _Target("one adapter", [one], 1),
        _Target("base", [base] * TOGETHER, 0),
        _Target("one adapter", [one] * TOGETHER, 1),
        _Target("several adapters", several, len({*several})),
        _Target("base and adapters", [*half, *[base] * (TOGETHER - len(half))], len({*half})),
    ]


def _round(
    client: Client, models: Sequence[str], prompts: Sequence[Sequence[int]]
) -> tuple[float, list[tuple[float, float]]]:
    """Send the requests at the same time. Return the wall time, and each request's seconds to its first and last token."""
    ready = Barrier(len(models) + 1)

    def request(model: str, prompt: Sequence[int]) -> tuple[float, float]:
        ready.wait()
        return client.stream(model, prompt, TOKENS)

    with ThreadPoolExecutor(len(models)) as pool:
        futures = [pool.submit(request, *one) for one in zip(models, prompts, strict=True)]
        ready.wait()
        started = time.perf_counter()
        found = [one.result() for one in futures]
        return time.perf_counter() - started, found
