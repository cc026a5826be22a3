"""Send requests to a server in phases: alone, mixed and concurrent, load, hot-swap, unload. Imports no torch."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, TypeVar

from harness.conformance.served.answers import Position
from harness.conformance.served.client import Client, RequestFailedError, RequestRefusedError
from harness.errors import HarnessError, ServerError, UsageError

BASE = ""
"""Name that stands for the base model where an adapter's name is expected."""
SWAPPED = "peft-harness-swap"
"""Name under which the check itself loads, replaces and unloads adapters."""
ALLOW = "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"
"""Environment variable of the server that allows vLLM to load and unload adapters while it runs."""
ROUNDS = 2
"""Number of rounds of mixed requests before the check loads adapters. Each round sends every prompt to every model, in
a new order."""


class RequestPhase(StrEnum):
    """Phase of the check. Phases differ in what else the server does while it answers a request."""

    ALONE = "alone"
    """Requests one after the other, first all for one model, then all for the next."""
    ADAPTERS = "adapters"
    """Requests to adapters in random order, without the base, several at the same time."""
    MIXED = "mixed"
    """Requests to base and adapters in random order, several at the same time."""
    LOADED = "loaded"
    """Mixed requests while the server loads an adapter under the name SWAPPED, then requests to this name."""
    SWAPPED = "hot-swapped"
    """Mixed requests while another adapter replaces the one under the name SWAPPED, then requests to this name."""
    RELOADED = "reloaded"
    """Mixed requests while the first adapter is loaded again, after an unload, then requests to the name SWAPPED."""
    ECHO = "echo"
    """Requests for the log-probabilities of the prompt's own tokens."""


@dataclass(frozen=True)
class Request:
    """One request for the continuation of a prompt."""

    phase: RequestPhase
    subject: str
    """Name of the adapter that must answer, or BASE."""
    served_as: str
    """Name of the model in the request: SWAPPED if the check itself loaded the adapter under this name."""
    prompt: int
    """Index of the prompt in `Session.prompts`."""


@dataclass(frozen=True)
class ServedAnswer:
    """The answer of the server to one request."""

    request: Request
    context: tuple[int, ...]
    """Ids of the tokens that precede those in `positions`."""
    positions: tuple[Position, ...]
    """Tokens of the answer in order, each with its log-probability."""
    greedy: bool
    """True if the server chose the tokens. False if they are tokens of the prompt."""

    @property
    def tokens(self) -> tuple[int, ...]:
        """Ids of the tokens in `positions`."""
        return tuple(one.token for one in self.positions)

    @property
    def missing(self) -> set[int]:
        """Indices in `positions` where the server returned NaN or null instead of a log-probability."""
        return {i for i, one in enumerate(self.positions) if any(map(math.isnan, one.values))}


@dataclass(frozen=True)
class FailedRequest:
    """A request for which the server failed to compute an answer."""

    request: Request
    context: tuple[int, ...]
    """Token ids of the prompt."""
    what: str
    """Status and message with which the server answered."""


_Outcome = TypeVar("_Outcome", ServedAnswer, FailedRequest)


@dataclass
class Session:
    """Sends the requests to one server, and keeps its answers."""

    client: Client
    base: str
    """Name of the base model on the server."""
    adapters: Mapping[str, Path]
    """Name of each adapter on the server -> its folder."""
    prompts: Sequence[Sequence[int]]
    """Token ids of each prompt."""
    texts: Sequence[str]
    """The prompts as text. Empty if the server accepts token ids."""
    tokens: int
    """Number of tokens to generate per request."""
    concurrency: int
    """Largest number of requests at the same time."""
    seed: int
    observations: list[ServedAnswer] = field(default_factory=list)
    not_offered: dict[str, str] = field(default_factory=dict)
    """Feature of servers, such as `hot-swap` -> reason why this server does not offer it."""
    findings: list[str] = field(default_factory=list)
    """Mistakes of the server that show without a comparison of log-probabilities, as sentences."""
    notes: list[str] = field(default_factory=list)
    """Messages to the user about what was not compared."""
    long: int = -1
    """Index of the long prompt in `prompts`. -1 if there is none."""
    skip_failed: bool = False
    """Decides what happens if the server answers with status 500. True records a FailedRequest. False stops with an
    error."""
    failures: list[FailedRequest] = field(default_factory=list)
    _loaded: list[str] = field(default_factory=list)

    def load_missing(self, listed: Sequence[str]) -> None:
        """Load the adapters that the server does not list. Raises UsageError if the server refuses this."""
        for name, folder in self.adapters.items():
            if name not in listed:
                try:
                    self._load(name, folder)
                except RequestRefusedError as error:
                    has = f"the server lists {', '.join(listed)}"
                    hint = f"--adapter NAME=DIR names a listed one; vLLM loads others if {ALLOW} is set"
                    what = f"the server has no adapter {name}, and does not load it ({error.what}); {has}"
                    raise UsageError(what, where="--adapter", hint=hint) from error

    def add_long(self, prompt: Sequence[int], text: str = "") -> None:
        """Add a long prompt. If the server refuses it, only add a note that long prompts are not compared.

        text: the prompt as text, if the server takes no token ids.
        """
        try:
            self.client.complete(self.base, text or prompt, self.tokens)
        except RequestRefusedError as error:
            self.notes.append(f"long prompts not compared: the server refuses {len(prompt)} tokens ({error.what})")
            return
        except RequestFailedError:
            pass  # the phases show for which models
        self.long, self.prompts = len(self.prompts), [*self.prompts, prompt]
        self.texts = [*self.texts, text] if text else self.texts

    def alone(self, subject: str) -> None:
        """Send every prompt to one model, one request at a time."""
        self._send([self._request(RequestPhase.ALONE, subject, i) for i in range(len(self.prompts))], 1)

    def mixed(self, phase: RequestPhase = RequestPhase.MIXED, meanwhile: Callable[[], None] | None = None) -> None:
        """Send every prompt to every model in random order. In the phase ADAPTERS, leave out the base.

        meanwhile: called while the requests run.
        """
        order = random.Random(f"{self.seed} {phase} {len(self.observations)}")  # noqa: S311  # an order, not a secret
        requests = [one for one in self._of_all(phase) if one.subject != BASE or phase is not RequestPhase.ADAPTERS]
        order.shuffle(requests)
        self._send(requests, self.concurrency, meanwhile)

    def swaps(self) -> None:
        """Load the first adapter as SWAPPED, replace it by the second, unload it, and load the first again.

        Mixed requests run at the same time. Features that the server refuses are added to `not_offered`.
        """
        first, *others = self.adapters
        before, failed = len(self.observations), len(self.failures)
        self.mixed(RequestPhase.LOADED, lambda: self._load_if_offered(SWAPPED, self.adapters[first]))
        if SWAPPED not in self._loaded:
            self.observations[before:] = [_in_phase(RequestPhase.MIXED, one) for one in self.observations[before:]]
            self.failures[failed:] = [_in_phase(RequestPhase.MIXED, one) for one in self.failures[failed:]]
            return
        self._swapped(RequestPhase.LOADED, first)
        if others:
            self.mixed(RequestPhase.SWAPPED, lambda: self._replace(SWAPPED, self.adapters[others[0]]))
            self._swapped(RequestPhase.SWAPPED, others[0])
        else:
            self.not_offered["hot-swap"] = "it needs two adapters"
        self._unload(SWAPPED)
        try:
            self.client.complete(SWAPPED, self._sent(0), self.tokens)
        except RequestRefusedError:
            pass
        else:
            self.findings.append(f"the server still answers for {SWAPPED} after it has unloaded it")
            return
        self.mixed(RequestPhase.RELOADED, lambda: self._load(SWAPPED, self.adapters[first]))
        self._swapped(RequestPhase.RELOADED, first)
        self._unload(SWAPPED)

    def swapped_alone(self, first: str, second: str) -> None:
        """Load the adapter `first` as SWAPPED, replace it by `second`, and send every prompt to SWAPPED.

        Raises RequestRefusedError if the server does not load adapters.
        """
        self._load(SWAPPED, self.adapters[first])
        self.replace(second)
        self._swapped(RequestPhase.SWAPPED, second)

    def replace(self, name: str) -> None:
        """Replace the adapter that `swapped_alone` loaded. name: name of the new adapter."""
        self._replace(SWAPPED, self.adapters[name])

    def echoes(self) -> None:
        """Ask every model for the log-probabilities of the tokens of each prompt, except the long prompt.

        The first token of a prompt has no log-probability.
        """
        several = self._of_all(RequestPhase.ECHO)
        self._send([one for one in several if len(self.prompts[one.prompt]) > 1 and one.prompt != self.long], 1)

    def tidy(self) -> str:
        """Unload the adapters that this session loaded. Return a message about those that are still loaded, or ""."""
        left = []
        for name in list(self._loaded):
            try:
                self._unload(name)
            except HarnessError as error:
                left.append(f"{name} is still loaded on the server: {error.what}")
        return "; ".join(left)

    def _of_all(self, phase: RequestPhase) -> list[Request]:
        """Return one request for every prompt of every model."""
        return [self._request(phase, one, i) for one in (BASE, *self.adapters) for i in range(len(self.prompts))]

    def _request(self, phase: RequestPhase, subject: str, prompt: int, served_as: str = "") -> Request:
        return Request(phase, subject, served_as or subject or self.base, prompt)

    def _sent(self, prompt: int) -> Sequence[int] | str:
        return self.texts[prompt] if self.texts else self.prompts[prompt]

    def _swapped(self, phase: RequestPhase, subject: str) -> None:
        requests = [self._request(phase, subject, i, SWAPPED) for i in range(len(self.prompts))]
        self._send(requests, self.concurrency)

    def _send(self, requests: Sequence[Request], workers: int, meanwhile: Callable[[], None] | None = None) -> None:
        """Send requests from `workers` threads. Keep the answers so far even if a request fails or the user interrupts.

        meanwhile: called while the requests run.
        """
        try:
            with ThreadPoolExecutor(workers) as pool:
                futures: list[Future[ServedAnswer | FailedRequest]] = [
                    pool.submit(self._answer, one) for one in requests
                ]
                try:
                    if meanwhile is not None:
                        meanwhile()
                    for future in as_completed(futures):
                        future.result()
                except BaseException:
                    pool.shutdown(wait=False, cancel_futures=True)
                    self.client.abort()
                    raise
                finally:
                    done = (one for one in futures if one.done() and not one.cancelled() and one.exception() is None)
                    for found in (one.result() for one in done):  # in the order of the requests
                        if isinstance(found, FailedRequest):
                            self.failures.append(found)
                        else:
                            self.observations.append(found)
        finally:
            self.client.reopen()  # all threads have ended; the adapters are still to be unloaded

    def body_of(self, one: Request, tokens: int = 0) -> dict[str, Any]:
        """Return the body to send a request again. tokens: number of tokens to generate; 0 for as many as before."""
        echo = one.phase is RequestPhase.ECHO
        tokens = tokens or (1 if echo else self.tokens)
        return self.client.body(one.served_as, self._sent(one.prompt), tokens, echo)

    def _answer(self, request: Request) -> ServedAnswer | FailedRequest:
        """Send a request and return the answer. After status 500, return a FailedRequest if `skip_failed`, else raise
        the error.
        """
        try:
            return self._observe(request)
        except RequestFailedError as error:
            if not self.skip_failed:
                raise
            return FailedRequest(request, tuple(self.prompts[request.prompt]), error.what)

    def _observe(self, request: Request) -> ServedAnswer:
        prompt, echo = tuple(self.prompts[request.prompt]), request.phase is RequestPhase.ECHO
        answer = self.client.complete(request.served_as, self._sent(request.prompt), 1 if echo else self.tokens, echo)
        if echo:
            if tuple(one.token for one in answer.positions[: len(prompt)]) != prompt:
                raise ServerError(
                    "incomplete answer: it does not begin with the prompt's tokens",
                    where=self.client.url,
                    hint="leave out --echo",
                )
            return ServedAnswer(request, prompt[:1], answer.positions[1 : len(prompt)], greedy=False)
        return ServedAnswer(request, prompt, answer.positions, greedy=True)

    def _load(self, name: str, folder: Path) -> None:
        self._loaded.append(name)  # before the request, which a time-out may end while the server goes on loading
        try:
            self.client.load(name, folder)
        except RequestRefusedError:
            self._loaded.remove(name)
            raise

    def _load_if_offered(self, name: str, folder: Path) -> None:
        try:
            self._load(name, folder)
        except RequestRefusedError as error:
            self.not_offered["load, hot-swap and unload"] = error.what

    def _replace(self, name: str, folder: Path) -> None:
        """Load an adapter under a name that is in use: in place or, if the server refuses that, after an unload."""
        try:
            self.client.load(name, folder, in_place=True)
        except RequestRefusedError:
            self._unload(name)
            self._load(name, folder)

    def _unload(self, name: str) -> None:
        self.client.unload(name)
        self._loaded.remove(name)


def _in_phase(phase: RequestPhase, one: _Outcome) -> _Outcome:
    return replace(one, request=replace(one.request, phase=phase))
