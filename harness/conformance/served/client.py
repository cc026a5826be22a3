"""Client of a model server with the OpenAI completions API. Imports no torch.

A connection serves one request and follows no redirect, so that the API key reaches only the server that the user
named.
"""

from __future__ import annotations

import contextlib
import errno
import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from harness.conformance.served import answers
from harness.conformance.served.answers import Answer, TokenNames
from harness.errors import HarnessError, ServerError, UsageError

TOKEN_VARIABLE = "PEFT_HARNESS_API_KEY"  # noqa: S105  # the name of the variable, not a token
TOP = 5
"""Number of most likely tokens to request per position. The API allows no more."""
_LARGEST_B = 64 << 20
_LONGEST_S = 1_000_000.0
"""Largest timeout of a socket, in seconds. The system cannot represent much longer ones."""
_EVENT = b"data: "
_EXTENSIONS: dict[str, Any] = {
    "return_tokens_as_token_ids": True, "return_token_ids": True, "ignore_eos": True, "repetition_penalty": 1.0,
}  # fmt: skip
"""Request fields of vLLM. The first two make it return token ids. The others make it ignore end tokens and the model's
default repetition penalty."""


_Read = Callable[[http.client.HTTPResponse, float], bytes]
"""Function that reads a body until a deadline, which is a value of time.monotonic()."""


class RequestRefusedError(UsageError):
    """The server refused a request: it answered with a status from 400 to 499, but not 401 or 403."""

    def __init__(self, what: str, *, status: int, where: str = "", hint: str = "") -> None:
        super().__init__(what, where=where, hint=hint)
        self.status = status


class RequestFailedError(ServerError):
    """The server answered a request with status 500, because it failed to compute the answer."""


@dataclass(frozen=True)
class ServedModel:
    """One model in the server's list `/v1/models`."""

    name: str
    parent: str
    """Name of the base model, if the server says that this model is an adapter; otherwise empty."""
    longest: int | None = None
    """Largest number of tokens of a prompt and its answer together. None if the server does not say."""


@dataclass(frozen=True)
class Dialect:
    """The form of requests that a server accepts."""

    token_ids: bool = True
    """True if a prompt may be a list of token ids. False if it must be text."""
    extensions: bool = True
    """True if a request may have fields that only vLLM knows."""


class Client:
    """Client of one server. Several threads may use it."""

    def __init__(self, url: str, token: str = "", patience: float = 120.0) -> None:
        """Prepare a client of the server at `url`, with or without `/v1`. No request is sent yet.

        token: API key that is sent with each request; empty for none. patience: timeout of a request, in seconds.
        Raises UsageError if url is not the address of a server, or if token is not printable ASCII.
        """
        parts = _parsed(url)
        if not all("!" <= one <= "~" for one in token):  # http.client would print such a token in its error
            raise UsageError(
                "is not printable ASCII without spaces", where=TOKEN_VARIABLE, hint="set it to the token alone"
            )
        self._secure, self._host, self._port = parts.scheme == "https", parts.hostname or "", parts.port
        self._prefix = parts.path.rstrip("/").removesuffix("/v1")
        self._token, self._patience = token, patience
        self._open: set[socket.socket] = set()
        """Copies of all sockets that are in use or still connecting."""
        self._lock, self._closed = threading.Lock(), False
        self.url = f"{parts.scheme}://{parts.netloc}{self._prefix}"
        self.dialect = Dialect()
        self.names: TokenNames = answers.token_id
        """Function that returns the id of a token from its name in an answer, or None for an unknown name."""

    def models(self) -> list[ServedModel]:
        """Return the models that the server lists. Raises UsageError if the answer is not such a list."""
        document = self._json("GET", "/v1/models")
        rows = document.get("data") if isinstance(document, dict) else None
        if not isinstance(rows, list) or not all(isinstance(row, dict) and "id" in row for row in rows):
            raise self._not_this_api("/v1/models", "the answer is not a list of models")
        return [
            ServedModel(str(row["id"]), str(row.get("parent") or ""), _count(row.get("max_model_len"))) for row in rows
        ]

    def complete(self, model: str, prompt: Sequence[int] | str, tokens: int, echo: bool = False) -> Answer:
        """Continue a prompt greedily by `tokens` tokens. Return these tokens with log-probabilities.

        echo: return the tokens of the prompt too. Raises ServerError for no answer or an incomplete answer,
        RequestFailedError for status 500, RequestRefusedError for a refused request, and UsageError for an answer
        without log-probabilities.
        """
        document = self._json("POST", "/v1/completions", self.body(model, prompt, tokens, echo))
        return answers.read(document, tokens, echo, self.names, f"{self.url}/v1/completions")

    def body(self, model: str, prompt: Sequence[int] | str, tokens: int, echo: bool) -> dict[str, Any]:
        """Return the body of a request for a completion, in the dialect of the server."""
        return {
            "model": model, "prompt": prompt if isinstance(prompt, str) else list(prompt), "max_tokens": tokens,
            "temperature": 0, "logprobs": TOP,
        } | ({"echo": True} if echo else {}) | (_EXTENSIONS if self.dialect.extensions else {})  # fmt: skip

    def stream(self, model: str, prompt: Sequence[int], tokens: int) -> tuple[float, float]:
        """Request a greedy continuation with `tokens` tokens, and return the seconds until its first and last token.

        The answer is a stream of events with one or a few tokens each. Raises ServerError for no answer or an incomplete
        one, and RequestRefusedError for a refused request.
        """
        body = {
            "model": model, "prompt": list(prompt), "max_tokens": tokens, "temperature": 0, "stream": True,
            "stream_options": {"include_usage": True},
        } | (_EXTENSIONS if self.dialect.extensions else {})  # fmt: skip
        started, lines = time.perf_counter(), list[tuple[float, bytes]]()

        def read(answer: http.client.HTTPResponse, deadline: float) -> bytes:
            rest = b""
            while part := answer.read1(1 << 16):
                when = time.perf_counter() - started
                *whole, rest = (rest + part).split(b"\n")
                lines.extend((when, line.removeprefix(_EVENT)) for line in whole if line.startswith(_EVENT))
                if time.monotonic() > deadline or len(rest) > _LARGEST_B:
                    raise TimeoutError
            return b""

        path = "/v1/completions"
        self._request("POST", path, body, read)
        try:
            events = [(when, json.loads(line)) for when, line in lines if line.strip() != b"[DONE]"]
            times = [when for when, event in events if event["choices"]]
            count = next((event["usage"]["completion_tokens"] for _, event in events if event.get("usage")), None)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            what = "incomplete answer: an event of its stream is no completion"
            raise ServerError(what, where=self.url + path, hint=_AGAIN) from error
        if not times or count != tokens:
            what = f"incomplete answer: a stream with {count} of {tokens} tokens"
            raise ServerError(what, where=self.url + path, hint=_AGAIN)
        return times[0], times[-1]

    def load(self, name: str, folder: Path, in_place: bool = False) -> None:
        """Load an adapter with vLLM's endpoint. in_place: True replaces a loaded adapter of this name."""
        body = {"lora_name": name, "lora_path": str(folder.resolve())} | ({"load_inplace": True} if in_place else {})
        self._request("POST", "/v1/load_lora_adapter", body)

    def unload(self, name: str) -> None:
        """Unload an adapter with vLLM's endpoint."""
        self._request("POST", "/v1/unload_lora_adapter", {"lora_name": name})

    def abort(self) -> None:
        """End all requests, even if they are still connecting, and refuse new ones until `reopen` is called.

        Each ended request raises ServerError in its thread. The look-up of a host's name is the only part that cannot
        be ended.
        """
        with self._lock:
            self._closed = True
            for one in self._open:
                with contextlib.suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)

    def reopen(self) -> None:
        """Allow requests again after `abort`."""
        self._closed = False

    @contextlib.contextmanager
    def _held(self, one: socket.socket) -> Iterator[None]:
        """Inside the context, let `abort` shut down the socket `one`.

        A copy of the socket is registered for this, because TLS takes over `one` itself.
        """
        with one.dup() as copy:
            with self._lock:
                self._open.add(copy)
            try:
                if self._closed:
                    raise ConnectionAbortedError(errno.ECONNABORTED, "the requests were ended")
                yield
            finally:
                with self._lock:
                    self._open.discard(copy)

    def _connect(self, address: tuple[str, int], stack: contextlib.ExitStack, deadline: float) -> socket.socket:
        """Connect to the first address of a host that answers, as `socket.create_connection` does, and return the
        socket.

        stack: `abort` can shut down the socket as long as this stack is open.
        """
        failed: OSError = ConnectionError(errno.EADDRNOTAVAIL, "the host has no address")
        for family, kind, protocol, _, place in socket.getaddrinfo(*address, 0, socket.SOCK_STREAM):
            one = socket.socket(family, kind, protocol)
            try:
                one.settimeout(min(max(deadline - time.monotonic(), 0.001), _LONGEST_S))
                with contextlib.ExitStack() as attempt:
                    attempt.enter_context(self._held(one))
                    one.connect(place)
                    if self._closed:  # the system reports success although `abort` shut the socket down
                        raise ConnectionAbortedError(errno.ECONNABORTED, "the requests were ended")
                    stack.push(attempt.pop_all())
            except OSError as error:
                one.close()
                failed = error
                if self._closed:
                    break
            else:
                return one
        raise failed

    def _json(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        content, kind = self._request(method, path, body)
        try:
            return json.loads(content)
        except RecursionError as error:
            what = "the answer is JSON with too many nested brackets"
            raise ServerError(what, where=self.url + path, hint="is this a model server?") from error
        except ValueError as error:
            if "html" in kind or content.lstrip()[:1] == b"<":
                raise self._not_this_api(path, "the answer is a web page, not JSON") from error
            raise ServerError(
                f"incomplete answer: its {len(content)} bytes are not complete JSON", where=self.url + path, hint=_AGAIN
            ) from error

    def _not_this_api(self, path: str, what: str) -> UsageError:
        hint = "--served takes the address of an OpenAI-compatible server, e.g. http://127.0.0.1:8000"
        return UsageError(what, where=self.url + path, hint=hint)

    def _request(
        self, method: str, path: str, body: dict[str, Any] | None = None, read: _Read | None = None
    ) -> tuple[bytes, str]:
        """Send a request, and return the body and the content type of the answer.

        read: function that reads the body of an accepted request; by default, the function `_read`.
        """
        where = self.url + path
        headers = {"Content-Type": "application/json", "Accept": "application/json", "Connection": "close"}
        if self._token:
            headers["Authorization"] = f"Bearer {self._token}"
        kind = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
        connection: Any = kind(self._host, self._port, timeout=self._patience)
        deadline = time.monotonic() + self._patience
        try:
            with contextlib.ExitStack() as stack:
                # http.client calls this function to connect; TLS follows on the same socket.
                connection._create_connection = lambda address, *_: self._connect(address, stack, deadline)
                connection.request(method, self._prefix + path, None if body is None else json.dumps(body), headers)
                answer = connection.getresponse()
                content = (
                    (read or _read)(answer, deadline) if answer.status == http.client.OK else _read(answer, deadline)
                )
        except TimeoutError as error:
            limit = f"no complete answer in {self._patience:g} seconds"
            raise ServerError(limit, where=where, hint="--patience SECONDS allows more time") from error
        except (UnicodeError, http.client.InvalidURL, OverflowError) as error:
            what = f"the address cannot be sent ({error})"
            raise UsageError(what, where=where, hint=f"use ASCII letters and digits, {_EXAMPLE}") from error
        except (http.client.HTTPException, ConnectionResetError, BrokenPipeError) as error:
            what = f"the server ended the connection before the end of its answer ({type(error).__name__})"
            raise ServerError(what, where=where, hint=_AGAIN) from error
        except OSError as error:
            raise ServerError(f"no connection ({error.strerror or error})", where=where, hint=_AGAIN) from error
        finally:
            connection.close()
        if answer.status != http.client.OK:
            raise self._refusal(answer, content, where)
        return content, answer.getheader("Content-Type", "")

    def _refusal(self, answer: http.client.HTTPResponse, content: bytes, where: str) -> HarnessError:
        reason = answer.reason
        if self._token:  # a server may repeat the token; it is removed before `message` cuts the text
            content = content.replace(self._token.encode(), b"***")
            reason = reason.replace(self._token, "***")
        said = answers.message(content)
        status, what = answer.status, f"HTTP {answer.status} {reason}" + (f": {said}" if said else "")
        if status in (http.client.UNAUTHORIZED, http.client.FORBIDDEN):
            given = "was refused" if self._token else "is needed"
            hint = f"set the environment variable {TOKEN_VARIABLE}"
            return UsageError(f"a token {given} ({what})", where=where, hint=hint)
        if 300 <= status < 400:
            hint = "give --served the address that the server redirects to"
            return UsageError(f"redirect to {answer.getheader('Location', 'nowhere')}", where=where, hint=hint)
        if 400 <= status < 500:
            hint = "the server refuses a request that the check needs; its log may have the reason"
            return RequestRefusedError(what, status=status, where=where, hint=hint)
        kind = RequestFailedError if status == http.client.INTERNAL_SERVER_ERROR else ServerError
        return kind(what, where=where, hint="the server's log has the reason")


_EXAMPLE = "e.g. http://127.0.0.1:8000"
_AGAIN = "is the server running? its log has the reason if it stopped"


def _count(value: Any) -> int | None:
    return value if type(value) is int and value > 0 else None


def _parsed(url: str) -> Any:
    try:
        parts = urlsplit(url)
        right = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # e.g. a port that is no number
        right = None
    if not right:
        raise UsageError(f"`{url}` is not the address of a server", where="--served", hint=_EXAMPLE)
    if parts.username or parts.password or parts.query or parts.fragment:
        hint = f"the address alone, {_EXAMPLE}; the token belongs into {TOKEN_VARIABLE}"
        raise UsageError("the address has a user, a password, a query or a fragment", where="--served", hint=hint)
    return parts


def _read(answer: http.client.HTTPResponse, deadline: float) -> bytes:
    """Read and return the body of an answer. Raises TimeoutError after the deadline, even if bytes still arrive."""
    parts: list[bytes] = []
    length = 0
    while part := answer.read1(1 << 16):
        parts.append(part)
        length += len(part)
        if time.monotonic() > deadline:
            raise TimeoutError
        if length > _LARGEST_B:
            raise http.client.HTTPException(f"more than {_LARGEST_B >> 20} MiB")
    # read1 does not compare the length with the header, as read does.
    if answer.length:
        raise http.client.IncompleteRead(b"", answer.length)
    return b"".join(parts)


def first_dialect(try_one: Callable[[Dialect], None], token_ids_only: bool) -> Dialect:
    """Return the first form of requests that the server accepts.

    try_one: function that sends a request in a given form. token_ids_only: True if there is no tokenizer, so that
    prompts cannot be text. If the server accepts no form, raises the error of the last one. A refusal with another status
    than 400 or 422 is raised at once.
    """
    dialects = [Dialect(ids, more) for ids in ((True,) if token_ids_only else (True, False)) for more in (True, False)]
    for dialect in dialects:
        try:
            try_one(dialect)
        except RequestRefusedError as error:
            if error.status not in (400, 422) or dialect == dialects[-1]:
                raise
        else:
            return dialect
    raise AssertionError
