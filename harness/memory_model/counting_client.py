"""Answer requests to count bytes or to take steps on fake tensors, from the cache or by a child process.

Only the child imports torch.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.memory_model import answer_cache
from harness.process.supervisor import python_module
from harness.records.files import whole_lines

TIMEOUT_S = 600.0
"""Time limit for all requests together, in seconds."""


def answer_requests(requests: Sequence[Mapping[str, Any]]) -> list[Any] | str:
    """Return the answer to each request, or the reason why the child process failed.

    One child answers all requests that are not in the cache (`answer_cache`), and equal requests only once. An answer
    is None if the child's time ran out before it.
    """
    keys = [_key(request) for request in requests]
    distinct = dict(zip(keys, requests, strict=True))
    found = {key: answer_cache.read(request) for key, request in distinct.items()}
    missing = {key: request for key, request in distinct.items() if found[key] is None}
    counts = _merged(request for request in missing.values() if "cell" not in request)
    steps = {key: request for key, request in missing.items() if "cell" in request}
    answers = run_requests([*counts.values(), *steps.values()])
    if isinstance(answers, str):
        return answers
    answered = dict(zip([*counts, *steps], answers, strict=False))
    for key, request in missing.items():
        if "cell" in request:
            found[key] = answered.get(key)
        else:
            model = _key_of_model(request)
            found[key] = _part(request, counts[model], answered[model])
    answer_cache.write((request, found[key]) for key, request in missing.items() if found[key] is not None)
    return [found[key] for key in keys]


def run_requests(requests: Sequence[Mapping[str, Any]]) -> list[Any] | str:
    """Send all requests to one child process. Return the list of its answers, or the reason why the process failed.

    `harness.memory_model.messages` has the types of requests and answers. Answers are in the order of the requests. If
    time runs out, the answers to the last requests are missing.
    """
    if not requests:
        return []
    with tempfile.TemporaryDirectory() as folder:
        # Requests are too long for arguments of a command.
        file, answered = Path(folder) / "requests.json", Path(folder) / "answers"
        file.write_text(json.dumps(requests), encoding="utf-8")
        arguments = [str(file), str(answered)]
        with python_module("harness.memory_model.counting_worker", arguments, {"HF_HUB_OFFLINE": "1"}) as child:
            code = child.wait(TIMEOUT_S)
        answers = [json.loads(line) for line in whole_lines(answered)]
    if code is None and len(answers) < sum("cell" not in one for one in requests):
        return f"counting took more than {TIMEOUT_S:.0f} s"
    if code:
        last = child.output.strip().splitlines()
        return f"the counting process exited with {code}: {last[-1] if last else 'no output'}"
    return answers


def _merged(requests: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Merge requests for the same model. Return one count request per model, for all Methods and configs.

    Each key of the result is the `_key_of_model` of its request.
    """
    merged: dict[str, dict[str, Any]] = {}
    for request in requests:
        methods = merged.setdefault(_key_of_model(request), {**request, "methods": {}})["methods"]
        for method, configs in request["methods"].items():
            methods.setdefault(method, []).extend(configs)
    return merged


def _part(request: Mapping[str, Any], merged: Mapping[str, Any], counted: Any) -> Any:
    """Return the answer to `request`, as a part of `counted`.

    merged: a request that `_merged` has made from `request` and others. counted: the answer to `merged`.
    """
    if "methods" not in counted:
        return counted
    places = {
        method: [merged["methods"][method].index(config) for config in configs]
        for method, configs in request["methods"].items()
    }
    methods = {method: [counted["methods"][method][n] for n in numbers] for method, numbers in places.items()}
    return {**counted, "methods": methods}


def _key(request: Mapping[str, Any]) -> str:
    return json.dumps(request, sort_keys=True)


def _key_of_model(request: Mapping[str, Any]) -> str:
    return _key({name: value for name, value in request.items() if name != "methods"})
