"""A small model server with the completions API of vLLM, and mistakes that it makes on request.

It merges each adapter into a copy of the base by W + s B A, so it shares no code with the reference of the harness.
As a script, `model_server.py PORT NAME BASE [ADAPTER=FOLDER ...]`, it is a server for `serve:`. The variable
MODEL_SERVER_FAULT names its mistake: one of a ModelServer, or one of START.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

BASE = "tiny"
LONG = 400
"""Number of tokens above which a prompt is long for the faults."""
START = (
    "dies", "hangs at its start", "port taken", "another server", "dies while it serves", "no loading", "another dtype",
)  # fmt: skip
"""Mistakes of the script."""


class ModelServer:
    """The models of a server. `fault` is the name of the mistake that it makes; empty for none."""

    def __init__(self, base: Path, adapters: dict[str, Path], fault: str = "", **options: Any) -> None:
        """Read the options: dtype, loading (offers load and unload), scale (of every adapter), token, stops_after (a number
        of requests), on_request (called with their number), tokenizer (a folder), texts_only (no token ids), name (of the
        base), longest (largest number of tokens of a prompt and its answer), says_longest (in the list of models).
        """
        self.base, self.fault, self.options = base, fault, options
        self.name = options.get("name", BASE)
        self.dtype = options.get("dtype", torch.float32)
        self.stopped = False
        self.busiest = self.requests = self._busy = 0
        self.authorizations: set[str | None] = set()
        self.tokenizer = AutoTokenizer.from_pretrained(folder) if (folder := options.get("tokenizer")) else None
        self._lock, self._first_logits, self._last = threading.Lock(), {}, self.name
        self._kept: dict[str, Any] = {}
        self._batch: list[tuple[str, int]] = []
        self._hidden: dict[tuple[Any, ...], torch.Tensor] = {}
        self.models = {self.name: AutoModelForCausalLM.from_pretrained(base, dtype=self.dtype).eval()}
        self.static = list(adapters)
        for name, folder in adapters.items():
            self.load(name, folder)
        if fault == "wrong slot":
            first, second = self.static[:2]
            self._kept[first], self._kept[second] = self._kept[second], self._kept[first]
        if fault == "base rows changed":
            self.models[self.name] = self.models[self.static[0]]

    def load(self, name: str, folder: Path) -> None:
        if self.fault == "stale adapter" and name in self._kept:
            self.models[name] = self._kept[name]
            return
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        tensors = load_file(folder / "adapter_model.safetensors")
        model = AutoModelForCausalLM.from_pretrained(self.base, dtype=torch.float32)
        weights = model.state_dict()
        rslora = config.get("use_rslora") and self.fault != "rsLoRA ignored"
        s = config["lora_alpha"] / (config["r"] ** 0.5 if rslora else config["r"])
        s *= config["r"] if self.fault == "multiplied by alpha" else self.options.get("scale", 1.0)
        for key, A in tensors.items():
            if ".lora_A." in key:
                update = s * tensors[key.replace(".lora_A.", ".lora_B.")] @ A
                # Two processes compute a layer together: each has half of the inputs, or else half of the outputs.
                in_rows = ".o_proj." in key or ".down_proj." in key
                second = update.chunk(2, dim=1 if in_rows else 0)[1]
                if self.fault == "row-parallel shard not added" and in_rows:
                    second.zero_()
                if self.fault == "row-parallel shard added twice" and in_rows:
                    second.mul_(2)
                if self.fault == "column-parallel shard not added" and not in_rows:
                    second.zero_()
                path = key.removeprefix("base_model.model.").replace(".lora_A", "")
                if self.fault == "transposed" and update.shape[0] == update.shape[1]:
                    update = update.T
                if self.fault == "up_proj never loaded" and ".up_proj." in key:
                    continue
                weights[path] += update
        self.models[name] = self._kept[name] = model.to(self.dtype).eval()

    def unload(self, name: str) -> None:
        if self.fault != "unload ignored":
            del self.models[name]

    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        model, prompt = self._model(body["model"]), self._ids(body["prompt"])
        if self.fault == "drops a token under load" and self._busy > 1:
            prompt = prompt[:-1] or prompt
        ids, rows, head = list(prompt), [], self._head(body["model"], len(prompt))
        with torch.no_grad():
            for step in range(body["max_tokens"]):
                seen = ids[-LONG:] if self.fault == "last 400 tokens only" else ids
                hidden = self._last_hidden(model, seen)
                row = (head if step == 0 and head is not None else model).lm_head(hidden).float()
                if self.fault == "NaN in long prompts" and len(ids) > LONG:
                    row = row * torch.nan
                if step == 0 and self.fault == "prefix cache without adapter" and len(prompt) >= 16:
                    row = self._first_logits.setdefault(tuple(prompt), row)
                rows.append(row.log_softmax(-1))
                rank = 1 if self.fault == "not greedy" and step == 3 else 0
                ids.append(int(row.argsort(descending=True)[rank]))
            if body.get("echo"):
                table = model(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1)
                rows = list(table[:-1])
        start = 1 if body.get("echo") else len(prompt)
        entries = [(token, row) for token, row in zip(ids[start:], rows, strict=True)]
        found = {
            "tokens": [self._name(token) for token, _ in entries],
            "token_logprobs": [float(row[token]) for token, row in entries],
            "top_logprobs": [
                {self._name(i): float(row[i]) for i in row.topk(body["logprobs"]).indices.tolist()}
                for _, row in entries
            ],
        }
        if self.fault == "null in long prompts" and len(prompt) > LONG:
            found["token_logprobs"] = [None] * len(entries)
            found["top_logprobs"] = [dict.fromkeys(one) for one in found["top_logprobs"]]
        if body.get("echo"):
            found["tokens"].insert(0, self._name(ids[0]))
            found["token_logprobs"].insert(0, None)
            found["top_logprobs"].insert(0, None)
        if self.fault.startswith("few tokens"):
            found = {key: value[:-1] for key, value in found.items()}
        if self.fault == "no log-probabilities":
            found = None
        reason = {"few tokens": "length", "few tokens, aborted": "abort", "few tokens, no reason": None}
        return {
            "choices": [{"index": 0, "text": "", "logprobs": found, "finish_reason": reason.get(self.fault, "length")}],
            "usage": {"prompt_tokens": len(prompt), "completion_tokens": body["max_tokens"]},
        }

    def _last_hidden(self, model: Any, ids: list[int]) -> torch.Tensor:
        """Return the hidden state of the last token. A check sends each prompt in several phases; it is computed once."""
        key = model, tuple(ids)
        if (hidden := self._hidden.get(key)) is None:
            hidden = self._hidden[key] = model.model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1]
        return hidden

    def _head(self, name: str, tokens: int) -> Any:
        """Return the model whose head gets the first row of a request, or None for the model of the request.

        With the fault, requests that come in together are a batch. The head gets the last row of each prompt, and takes the
        adapters from the segments of the batch with all rows.
        """
        if self.fault != "head with the segments of all rows":
            return None
        with self._lock:
            batch, row = self._batch, len(self._batch)
            batch.append((name, tokens))
        time.sleep(0.05)  # other requests come in meanwhile
        with self._lock:
            if self._batch is batch:
                self._batch = []
        return self.models[[name for name, count in batch for _ in range(count)][row]]

    def _ids(self, prompt: str | list[int]) -> list[int]:
        if isinstance(prompt, list):
            return prompt
        return self.tokenizer(prompt)["input_ids"] + ([5] if self.fault == "another tokenizer" else [])

    def _name(self, token: int) -> str:
        return self.tokenizer.decode([token]) if self.options.get("texts_only") else f"token_id:{token}"

    def _model(self, name: str) -> Any:
        """Return the model that answers, with the mistakes of servers that hold one adapter at a time."""
        last = self._last
        if name != self.name or self.fault == "one adapter for all requests at a time":
            self._last = name
        if self.fault == "one adapter for all requests at a time":
            time.sleep(0.01)  # other requests come in meanwhile
            name = self._last
        if self.fault == "base rows keep the last adapter" and name == self.name:
            name = last
        return self._kept[name] if name in self._kept else self.models[name]  # an unloaded adapter may be the last one

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Count a completion that is being computed. It ends before its answer is sent, so the client cannot be ahead."""
        with self._lock:
            self._busy += 1
            self.busiest = max(self.busiest, self._busy)
        try:
            yield
        finally:
            with self._lock:
                self._busy -= 1

    def note_request(self) -> None:
        with self._lock:
            self.requests += 1
            self.options.get("on_request", lambda _: None)(self.requests)
            self.stopped |= self.requests > self.options.get("stops_after", 10**9)


class _Handler(BaseHTTPRequestHandler):
    server: Any

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._handle({})

    def do_POST(self) -> None:
        self._handle(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def _handle(self, body: dict[str, Any]) -> None:
        models: ModelServer = self.server.models
        models.note_request()
        sent = self.headers.get("Authorization")
        models.authorizations.add(sent)
        if models.stopped:
            return self.connection.close()
        if models.options.get("token") and sent != f"Bearer {models.options['token']}":
            return self._answer(401, {"error": {"message": f"not a valid token: {sent}"}})
        if models.fault == "deep JSON":
            return self._send(200, b"[" * 200_000, "application/json")
        if models.fault == "web page":
            return self._send(200, b"<!doctype html><title>Welcome</title>", "text/html")
        if self.path == "/v1/models":
            says = {"max_model_len": models.options["longest"]} if models.options.get("says_longest") else {}
            parents = {name: None if name == models.name else models.name for name in models.models}
            rows = [{"id": name, "parent": parent, **says} for name, parent in parents.items()]
            return self._answer(200, {"object": "list", "data": rows})
        if self.path == "/v1/completions":
            return self._completion(models, body)
        if self.path == "/v1/load_lora_adapter" and models.options.get("loading"):
            if body["lora_name"] in models.models and not body.get("load_inplace"):
                return self._answer(400, {"error": {"message": "already loaded"}})
            models.load(body["lora_name"], Path(body["lora_path"]))
            return self._send(200, b"Success", "text/plain")
        if self.path == "/v1/unload_lora_adapter" and models.options.get("loading"):
            models.unload(body["lora_name"])
            return self._send(200, b"Success", "text/plain")
        return self._answer(404, {"detail": "Not Found"})

    def _completion(self, models: ModelServer, body: dict[str, Any]) -> None:
        if body["model"] not in models.models:
            return self._answer(404, {"error": {"message": f"The model `{body['model']}` does not exist."}})
        if isinstance(body["prompt"], str) and models.tokenizer is None:
            return self._answer(400, {"error": {"message": "no tokenizer"}})
        if models.options.get("texts_only") and (not isinstance(body["prompt"], str) or "ignore_eos" in body):
            return self._answer(422, {"detail": "Unexpected fields, or token ids"})
        needed = len(body["prompt"]) + body["max_tokens"]
        if needed > models.options.get("longest", needed):
            return self._answer(
                400, {"error": {"message": f"{needed} tokens are more than {models.options['longest']}"}}
            )
        if models.fault == "fails on long prompts" and needed > LONG:
            return self._answer(500, {"error": {"message": "Out of range float values are not JSON compliant: nan"}})
        if models.fault == "hangs" and models.requests > 3:
            self.send_response(200)
            self.end_headers()
            while not models.stopped:  # a byte now and then, and never the end
                time.sleep(0.02)
                self.wfile.write(b" ")
                self.wfile.flush()
            return None
        if body.get("stream"):
            return self._stream(models, body)
        with models.counted():
            content = json.dumps(models.complete(body)).encode()
        if models.fault == "half an answer":
            content = content[: len(content) // 2]
        self._send(200, content, "application/json", cut=models.fault == "connection lost")
        return None

    def _stream(self, models: ModelServer, body: dict[str, Any]) -> None:
        """Send one event per token, and then the number of tokens."""
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        tokens = body["max_tokens"] - (1 if models.fault == "a token less in streams" else 0)
        with models.counted():
            for _ in range(tokens):
                models.complete({**body, "max_tokens": 1, "logprobs": 1})
                self._event({"choices": [{"index": 0, "text": "x"}], "usage": None})
        self._event({"choices": [], "usage": {"completion_tokens": tokens}})
        self.wfile.write(b"data: [DONE]\n\n")

    def _event(self, document: Any) -> None:
        self.wfile.write(b"data: " + json.dumps(document).encode() + b"\n\n")
        self.wfile.flush()

    def _answer(self, status: int, document: Any) -> None:
        self._send(status, json.dumps(document).encode(), "application/json")

    def _send(self, status: int, content: bytes, kind: str, cut: bool = False) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[:-9] if cut else content)


@contextmanager
def serving(models: ModelServer, port: int = 0) -> Iterator[str]:
    """Serve on a port, by default a free one, and yield the address."""
    server = ThreadingHTTPServer(("127.0.0.1", port), _Handler)
    server.daemon_threads = True
    server.models = models  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        models.stopped = True
        server.shutdown()
        server.server_close()


def _main(port: int, name: str, base: Path, adapters: dict[str, Path], fault: str) -> None:
    """Serve until this process is killed."""
    if fault == "dies":
        sys.exit("there is no licence for this server")
    if fault == "hangs at its start":
        time.sleep(600)
    if fault == "another server":
        name = "of somebody else"

    def die(number: int) -> None:
        if fault == "dies while it serves" and number > 60:
            os._exit(7)

    dtype = torch.bfloat16 if fault == "another dtype" else torch.float32
    models = ModelServer(base, adapters, fault, loading=fault != "no loading", name=name, on_request=die, dtype=dtype)
    taken = fault == "port taken" and ThreadingHTTPServer(("127.0.0.1", port), _Handler)  # it accepts no connection
    with contextlib.closing(taken.socket) if taken else contextlib.nullcontext(), serving(models, port):
        signal.pause()


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a worker of the harness ignores it, and so would its children
    torch.set_num_threads(1)
    given = {name: Path(folder) for name, _, folder in (one.partition("=") for one in sys.argv[4:])}
    _main(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), given, os.environ.get("MODEL_SERVER_FAULT", ""))
