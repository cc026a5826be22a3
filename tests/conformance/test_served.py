"""`check --served`: a right server passes, every planted fault is found, bad input ends with one message."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import signal
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from harness.assets import generated
from harness.cli import main
from harness.conformance.served import answers, causes, comparison
from harness.conformance.served.client import TOKEN_VARIABLE, Client
from harness.conformance.served.session import FailedRequest, Request, RequestPhase, ServedAnswer
from harness.errors import Exit, HarnessError, ServerError
from support import adapter_folders
from support.model_server import ModelServer, serving

TOKEN = "sk-never-written-down"
PHASES = ["alone", "mixed", "loaded", "hot-swapped", "reloaded"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a base with too few positions for long prompts, which would make each test slower; `roomy` has enough."""
    return adapter_folders.base(tmp_path_factory.mktemp("served") / "tiny", max_position_embeddings=48)


@pytest.fixture(scope="module")
def adapters(base: Path) -> dict[str, Path]:
    folders = adapter_folders.four(base, base.parent / "adapters")
    return {name: folders[name] for name in ("rslora", "linear")}


@pytest.fixture
def check(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[Exit, str, str]]:
    """Return a function that checks a server, and returns the exit code, stdout and stderr."""

    def run(models: ModelServer, base: Path, adapters: dict[str, Path], *options: str) -> tuple[Exit, str, str]:
        with serving(models) as url:
            named = [word for folder in adapters.values() for word in ("--adapter", str(folder))]
            code = main(["check", "--served", url, "--base-model", str(base), *named, *options])
        return code, *capsys.readouterr()

    return run


def subjects(out: str) -> dict[str, dict[str, Any]]:
    return {one["name"] or "base": one for one in json.loads(out)["served"]["subjects"]}


def verdicts(out: str) -> dict[str, str]:
    return {name: one["verdict"] for name, one in subjects(out).items()}


# ---- a right server


@pytest.mark.nightly
@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_a_right_server_passes_in_every_phase(check, base, adapters, dtype) -> None:
    models = ModelServer(base, adapters, dtype=getattr(torch, dtype), loading=True)
    code, out, _ = check(models, base, adapters, "--json", "--echo", "--concurrency", "4")
    assert code == Exit.PASS, out
    assert json.loads(out)["served"]["dtype"] == dtype
    assert verdicts(out) == {"base": "conforms", "rslora": "conforms", "linear": "conforms"}
    for one in subjects(out).values():
        assert [phase["phase"] for phase in one["phases"]] == [*PHASES, "echo"]
        assert all(phase["wrong"] == phase["differ"] == 0 for phase in one["phases"])
    assert 1 < models.busiest <= 4
    assert set(models.models) == {"tiny", *adapters}  # what the check loaded is unloaded again


@pytest.mark.nightly
def test_adapters_that_the_server_does_not_list_are_loaded_and_unloaded(check, base, adapters) -> None:
    models = ModelServer(base, {}, loading=True)
    code, out, _ = check(models, base, adapters, "--json")
    assert (code, list(models.models)) == (Exit.PASS, ["tiny"]), out


@pytest.mark.slow
def test_a_server_without_loading_is_compared_without_it(check, base, adapters) -> None:
    code, out, _ = check(ModelServer(base, adapters), base, adapters, "--json")
    assert code == Exit.PASS, out
    assert "404" in str(json.loads(out)["served"]["not_offered"])
    assert json.loads(out)["served"]["notes"] == [
        "long prompts not compared: prompt and answer may have at most 48 tokens"
    ]
    assert {phase["phase"] for one in subjects(out).values() for phase in one["phases"]} == {"alone", "mixed"}
    code, out, err = check(ModelServer(base, {}), base, adapters)
    assert (code, out) == (Exit.USAGE, "")
    assert "rslora" in err


@pytest.mark.nightly
def test_the_smallest_wrong_scaling_that_it_names_is_the_one_that_it_notices(check, base, adapters) -> None:
    _, out, _ = check(ModelServer(base, adapters), base, adapters, "--json")
    smallest = subjects(out)["linear"]["notices"]
    for factor, verdict in ((4, "nonconforming"), (1 / 4, "conforms")):
        models = ModelServer(base, adapters, scale=1 + factor * smallest)
        assert verdicts(check(models, base, adapters, "--json")[1])["linear"] == verdict


@pytest.mark.slow
def test_an_adapter_that_is_too_weak_is_neither_passed_nor_failed(check, base, tmp_path) -> None:
    config = adapter_folders.FOUR["mlp"]
    weak = {"weak": adapter_folders.adapter(base, tmp_path / "weak", 1e-8, **config)}
    code, out, _ = check(ModelServer(base, weak), base, weak, "--json")
    assert (code, verdicts(out)["weak"]) == (Exit.INCONCLUSIVE, "cannot tell")


# ---- planted faults

FAULTS = {
    "rsLoRA ignored": ({"rslora"}, PHASES, "use_rslora"),
    "multiplied by alpha": ({"rslora", "linear"}, PHASES, "times its scaling"),
    "transposed": ({"rslora", "linear"}, PHASES, "transposed"),
    "up_proj never loaded": ({"linear"}, PHASES, "up_proj"),
    "wrong slot": ({"rslora", "linear"}, PHASES, "adapter"),
    "stale adapter": ({"linear"}, ["hot-swapped"], "rslora"),
    "base rows changed": ({"base"}, PHASES, "rslora"),
    "base rows keep the last adapter": ({"base"}, PHASES[1:], "adapter"),
    "prefix cache without adapter": ({"rslora", "linear"}, PHASES, "base"),
    "not greedy": ({"base", "rslora", "linear"}, PHASES, "not greedy"),
    "one adapter for all requests at a time": ({"base", "rslora", "linear"}, PHASES[1:], "adapter"),
    "drops a token under load": ({"base", "rslora", "linear"}, PHASES[1:], ""),
    "row-parallel shard not added": ({"rslora", "linear"}, PHASES, "without the second of two shards of its row"),
    "row-parallel shard added twice": ({"rslora", "linear"}, PHASES, "with twice the second of two shards of its row"),
    "column-parallel shard not added": ({"rslora", "linear"}, PHASES, "without the second of two shards of its column"),
}
"""Fault -> what does not conform, the phases in which it may show, and a word of the cause."""
RACES = ("one adapter for all requests at a time", "drops a token under load")
"""Faults that show only if requests meet, so perhaps not in every phase."""
QUICK = ("rsLoRA ignored", "base rows keep the last adapter")
SLOW = ("stale adapter", "prefix cache without adapter")
"""Faults of the second tier; the others are planted at night."""


def _tier(fault: str) -> list[pytest.MarkDecorator]:
    return [] if fault in QUICK else [pytest.mark.slow if fault in SLOW else pytest.mark.nightly]


@pytest.mark.slow
@pytest.mark.parametrize("fault", [pytest.param(fault, marks=_tier(fault)) for fault in FAULTS])
def test_a_planted_fault_is_found_where_it_is(check, base, adapters, fault) -> None:
    wrong, phases, word = FAULTS[fault]
    code, out, _ = check(ModelServer(base, adapters, fault, loading=True), base, adapters, "--json")
    found = subjects(out)
    assert code == Exit.FAIL
    assert {name for name, one in found.items() if one["verdict"] == "nonconforming"} == wrong
    for name in wrong:
        shown = [one["phase"] for one in found[name]["phases"] if one["wrong"]]
        assert shown == phases or (fault in RACES and shown and set(shown) <= set(phases))
        assert word in found[name]["finding"]["cause"]
        # What is wrong only in company is sent again in company.
        assert found[name]["finding"]["request"].count("curl ") == (1 if phases == PHASES else 2)


@pytest.fixture(scope="module")
def roomy(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    """Return a base with positions for long prompts, and two adapters that target its head."""
    folder = adapter_folders.base(tmp_path_factory.mktemp("roomy") / "tiny", max_position_embeddings=1024)
    config = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "lm_head"]}
    return folder, {name: adapter_folders.adapter(folder, folder.parent / name, **config) for name in ("one", "two")}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "word"),
    [
        ("NaN in long prompts", "at 32 of 32 wrong positions, a log-probability is NaN or null"),
        pytest.param("null in long prompts", "NaN or null", marks=pytest.mark.slow),
        pytest.param("fails on long prompts", "4 requests failed: HTTP 500", marks=pytest.mark.slow),
        pytest.param("last 400 tokens only", "", marks=pytest.mark.nightly),
    ],
)
def test_a_fault_of_long_prompts_is_found_alone_and_in_mixed_batches(check, roomy, fault, word) -> None:
    code, out, _ = check(ModelServer(*roomy, fault), *roomy, "--json")
    assert (code, json.loads(out)["served"]["notes"]) == (Exit.FAIL, [])
    assert json.loads(out, parse_constant=pytest.fail)  # NaN and Infinity are not JSON
    for name, one in subjects(out).items():
        assert one["verdict"] == "nonconforming", name
        assert [(phase["phase"], phase["requests"], phase["wrong"]) for phase in one["phases"]] == [
            ("alone", 7, 1), ("mixed", 21, 3),
        ]  # fmt: skip
        assert word in one["finding"]["cause"]
        assert "prompts of at most 40 tokens have right answers, those of 600" in one["finding"]["cause"]
        words = shlex.split(one["finding"]["request"])
        assert len(json.loads(words[words.index("-d") + 1])["prompt"]) == 600


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "longest"), [({"longest": 500, "says_longest": True}, 492), ({"longest": 500}, 40), ({}, 600)]
)
def test_long_prompts_are_as_long_as_the_server_takes_them(check, roomy, options, longest) -> None:
    base, adapters = roomy
    seen: set[int] = set()

    class Noting(ModelServer):
        def complete(self, body: dict[str, Any]) -> dict[str, Any]:
            seen.add(len(body["prompt"]))
            return super().complete(body)

    code, out, _ = check(Noting(base, {"one": adapters["one"]}, **options), base, {"one": adapters["one"]}, "--json")
    assert (code, max(seen)) == (Exit.PASS, longest), out
    noted = "".join(json.loads(out)["served"]["notes"])
    if longest > 40:
        assert noted == ""
    else:
        assert "long prompts not compared: the server refuses 600 tokens (HTTP 400 " in noted
        assert "608 tokens are more than 500" in noted


def test_the_length_of_a_prompt_decides_only_if_no_right_answer_is_as_long() -> None:
    def answer(length: int, phase: RequestPhase = RequestPhase.ALONE) -> ServedAnswer:
        return ServedAnswer(Request(phase, "", "base", 0), (5,) * length, (), greedy=True)

    def failure(length: int, phase: RequestPhase = RequestPhase.ALONE) -> FailedRequest:
        return FailedRequest(Request(phase, "", "base", 0), (5,) * length, "status 500")

    short, wrong, right = answer(20), answer(40, RequestPhase.MIXED), answer(40)
    assert comparison._lengths([short, wrong], [wrong], []) == [
        "prompts of at most 20 tokens have right answers, those of 40 tokens or more have not"
    ]
    assert comparison._lengths([short, wrong, right], [wrong], []) == []  # wrong only beside others
    assert comparison._lengths([short], [], [failure(40)]) != []
    assert comparison._lengths([answer(1, RequestPhase.ECHO), short], [], [failure(3, RequestPhase.ECHO)]) == []


def test_a_shard_of_one_row_is_no_crash() -> None:
    tensors = {"layer.shared_expert_gate.lora_B.weight": torch.ones(1, 3)}
    causes._shard("column", 1, 0.0, tensors)
    assert torch.equal(tensors["layer.shared_expert_gate.lora_B.weight"], torch.ones(1, 3))


@pytest.mark.nightly
def test_rows_of_a_head_that_get_adapters_of_other_requests_are_found(check, roomy) -> None:
    base, adapters = roomy
    models = ModelServer(base, adapters, "head with the segments of all rows", longest=128)
    code, out, _ = check(models, base, adapters, "--json")
    assert code == Exit.FAIL
    assert "nonconforming" in verdicts(out).values()
    for name, one in subjects(out).items():
        wrong = {phase["phase"]: phase["wrong"] for phase in one["phases"]}
        assert wrong["alone"] == 0, name
        assert bool(wrong["mixed"]) == (one["verdict"] == "nonconforming")
        assert not wrong["mixed"] or "head" in one["finding"]["cause"]


@pytest.mark.slow
def test_a_server_that_answers_for_an_unloaded_adapter_fails(check, base, adapters) -> None:
    code, out, _ = check(ModelServer(base, adapters, "unload ignored", loading=True), base, adapters)
    assert code == Exit.FAIL
    assert "peft-harness-swap" in out


@pytest.mark.slow
def test_the_text_shows_metrics_verdicts_and_a_reproduction(check, base, adapters) -> None:
    code, out, _ = check(ModelServer(base, adapters, "rsLoRA ignored"), base, adapters)
    assert code == Exit.FAIL
    for part in ("mean exp|Δ|", "✓ base", "✗ rslora", "✓ linear", "curl ", f"Bearer ${TOKEN_VARIABLE}"):
        assert part in out


# ---- servers that stop, and bad input


@pytest.mark.slow
def test_results_so_far_are_printed_if_the_server_stops(check, base, adapters) -> None:
    # The list of models, a trial, 6 requests each to the base and the first adapter, then some to the second.
    code, out, _ = check(ModelServer(base, adapters, stops_after=17), base, adapters, "--json")
    assert code == Exit.INFRASTRUCTURE
    assert json.loads(out)["served"]["stopped"]
    assert {name: [p["requests"] for p in one["phases"]] for name, one in subjects(out).items()} == {
        "base": [6],
        "rslora": [6],
        "linear": [3],
    }


@pytest.mark.slow
def test_results_so_far_are_printed_if_the_user_interrupts(check, base, adapters) -> None:
    def interrupt(number: int) -> None:
        if number == 24:
            os.kill(os.getpid(), signal.SIGTERM)

    code, out, _ = check(ModelServer(base, adapters, on_request=interrupt), base, adapters, "--json")
    assert (code, json.loads(out)["served"]["stopped"]) == (Exit.INFRASTRUCTURE, "interrupted")
    assert all(one["phases"] for one in subjects(out).values())


@pytest.mark.parametrize(
    ("fault", "code", "word"),
    [
        ("web page", Exit.USAGE, "JSON"),
        ("no log-probabilities", Exit.USAGE, "log-probabilities"),
        ("half an answer", Exit.INFRASTRUCTURE, "incomplete answer"),
        ("few tokens", Exit.INFRASTRUCTURE, "incomplete answer"),
        ("few tokens, aborted", Exit.INFRASTRUCTURE, "finish_reason is 'abort'"),
        ("few tokens, no reason", Exit.INFRASTRUCTURE, "finish_reason is None"),
        ("deep JSON", Exit.INFRASTRUCTURE, "too many nested brackets"),
        ("connection lost", Exit.INFRASTRUCTURE, "ended the connection"),
        ("hangs", Exit.INFRASTRUCTURE, "--patience"),
    ],
)
def test_a_server_that_cannot_be_compared_gets_one_message(check, base, adapters, fault, code, word) -> None:
    found, out, err = check(ModelServer(base, adapters, fault), base, adapters, "--patience", "2")
    assert (found, out) == (code, "")
    assert word in err
    assert err.count("peft-harness: ") == 1


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_abort_ends_requests_that_are_still_connecting(scheme) -> None:
    """The first client fills the queue of a server that accepts nobody, so the second one stays in connect()."""
    with socket.socket() as server, contextlib.ExitStack() as stack:
        server.bind(("127.0.0.1", 0))
        server.listen(0)
        address = server.getsockname()
        for _ in range(4):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(address)
        client = Client(f"{scheme}://127.0.0.1:{address[1]}", patience=3600.0)
        with ThreadPoolExecutor(1) as pool:
            request = pool.submit(client.models)
            while not client._open:
                time.sleep(0.01)
            client.abort()
            with pytest.raises(ServerError):
                request.result()
            with pytest.raises(ServerError, match="the requests were ended"):
                client.models()


def test_abort_ends_a_handshake_and_a_wait_for_an_answer() -> None:
    for scheme in ("http", "https"):
        with socket.socket() as server:
            server.bind(("127.0.0.1", 0))
            server.listen(1)
            client = Client(f"{scheme}://127.0.0.1:{server.getsockname()[1]}", patience=3600.0)
            with ThreadPoolExecutor(1) as pool:
                request = pool.submit(client.models)
                accepted, _ = server.accept()
                accepted.recv(1)  # the request, or the start of a handshake, that gets no answer
                client.abort()
                with pytest.raises(ServerError):
                    request.result()
                accepted.close()


@pytest.mark.parametrize(
    "url", ["http://a..b", f"http://{'a' * 70}.example", "http://127.0.0.1:1/ä b", "http://127.0.0.1:99999"]
)
def test_an_odd_address_is_one_message(url, base, adapters, capsys) -> None:
    options = ["--base-model", str(base), "--adapter", str(adapters["linear"])]
    assert main(["check", "--served", url, *options]) == Exit.USAGE
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("peft-harness: ") == err.count("hint: ") == 1


@pytest.mark.parametrize(
    ("logprobs", "says"),
    [
        ({"tokens": ["token_id:5"], "token_logprobs": [10**400]}, "nan"),
        ({"tokens": ["token_id:5"], "token_logprobs": [None], "top_logprobs": [{"token_id:6": None}]}, "nan"),
        ({"tokens": ["token_id:5"], "token_logprobs": ["-1"]}, "a log-probability is '-1'"),
        ({"tokens": [f"token_id:{'9' * 5000}"], "token_logprobs": [-1.0]}, "is unknown"),
    ],
)
def test_numbers_that_are_none_are_no_crash(logprobs, says) -> None:
    document = {"choices": [{"logprobs": logprobs, "finish_reason": "length", "token_ids": ["5"]}]}
    try:
        found = str(answers.read(document, 1, False, answers.token_id, "here").positions[0].logprob)
    except HarnessError as error:
        found = str(error)
    assert says in found


@pytest.mark.slow
def test_another_base_or_no_such_model_is_wrong_use(check, base, adapters, tmp_path) -> None:
    other = adapter_folders.base(tmp_path / "other", seed=1)
    code, out, err = check(ModelServer(base, adapters), other, adapters)
    assert (code, out) == (Exit.USAGE, "")
    assert str(other) in err
    code, out, err = check(ModelServer(base, adapters), Path(f"tinny={base}"), adapters)
    assert (code, out) == (Exit.USAGE, "")
    assert "did you mean `tiny`" in err


@pytest.mark.slow
def test_an_adapter_that_does_not_fit_the_base_leaves_the_others_their_results(check, base, adapters, tmp_path) -> None:
    wider = adapter_folders.base(tmp_path / "wider", hidden_size=128)
    misfit = adapter_folders.adapter(wider, tmp_path / "misfit", **adapter_folders.FOUR["narrow"])
    models = ModelServer(base, adapters)
    models.models["misfit"] = models.models["tiny"]
    code, out, _ = check(models, base, adapters | {"misfit": misfit}, "--json")
    assert code == Exit.NOTHING_COMPARED
    assert verdicts(out) == {
        "base": "conforms", "rslora": "conforms", "linear": "conforms", "misfit": "not compared",
    }  # fmt: skip


def test_no_server_is_one_message(base, adapters, capsys) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))  # bound, and nobody listens
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
        options = ["--base-model", str(base), "--adapter", str(adapters["linear"])]
        assert main(["check", "--served", url, *options]) == Exit.INFRASTRUCTURE
    assert url in capsys.readouterr().err


@pytest.mark.parametrize(
    "wrong",
    [
        ["--served", "localhost:8000"],
        ["--served", "http://user:secret@localhost"],
        ["--served", "http://localhost", "hf-peft"],
        ["--served", "http://localhost", "--html", "page.html"],
        ["--served", "http://localhost", "--dtype", "float8"],
        ["--served", "http://localhost", "--adapter", "ADAPTER"],
        ["--served", "http://localhost", "--power"],
        ["--served", "http://localhost", "--mutants", "3"],
        ["--echo"],
    ],
)
def test_wrong_options_are_refused(wrong, base, adapters, capsys) -> None:
    words = [word.replace("ADAPTER", str(adapters["linear"])) for word in wrong]
    named = ["--adapter", str(adapters["linear"]), "--base-model", str(base)] if "--served" in wrong else []
    assert main(["check", *words, *named]) == Exit.USAGE
    out, err = capsys.readouterr()
    assert out == ""
    assert "secret" not in err


@pytest.mark.slow
def test_the_token_is_sent_and_never_written(check, base, adapters, monkeypatch) -> None:
    monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)
    models = ModelServer(base, adapters, "rsLoRA ignored", token=TOKEN)
    code, *written = check(models, base, adapters, "--json")
    assert (code, models.authorizations) == (Exit.FAIL, {f"Bearer {TOKEN}"})
    assert TOKEN not in "".join(written)
    # This server repeats the token that it refuses.
    code, out, err = check(ModelServer(base, adapters, token="another"), base, adapters)
    assert (code, out) == (Exit.USAGE, "")
    assert TOKEN not in err
    assert TOKEN_VARIABLE in err
    monkeypatch.setenv(TOKEN_VARIABLE, f"{TOKEN}\n")
    code, out, err = check(models, base, adapters)
    assert (code, out) == (Exit.USAGE, "")
    assert TOKEN not in err


def test_a_token_that_a_long_message_cuts_is_not_printed() -> None:
    content = json.dumps({"error": {"message": f"{'x' * 160} Bearer {TOKEN * 3}"}}).encode()
    answer = SimpleNamespace(status=400, reason=f"no {TOKEN * 3}")
    error = Client("http://127.0.0.1:1", TOKEN * 3)._refusal(answer, content, "here")  # type: ignore[arg-type]
    assert TOKEN not in str(error)


# ---- tokenizers


@pytest.fixture(scope="module")
def worded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    """Return a base with a tokenizer, and an adapter of it."""
    generated.tiny_llama(folder := tmp_path_factory.mktemp("worded"))
    return folder, {"linear": adapter_folders.adapter(folder, folder / "linear", **adapter_folders.FOUR["linear"])}


def test_another_tokenizer_is_wrong_use(check, worded) -> None:
    code, out, err = check(ModelServer(*worded, "another tokenizer", tokenizer=worded[0]), *worded)
    assert (code, out) == (Exit.USAGE, "")
    assert "tokenizer" in err


@pytest.mark.slow
def test_the_evidence_is_a_request_that_the_server_accepts(check, worded) -> None:
    models = ModelServer(*worded, "multiplied by alpha", tokenizer=worded[0], texts_only=True)
    code, out, _ = check(models, *worded, "--json")
    assert code == Exit.FAIL
    words = shlex.split(subjects(out)["linear"]["finding"]["request"])
    body = json.loads(words[words.index("-d") + 1])
    assert json.loads(out)["served"]["notes"] == []
    assert isinstance(body["prompt"], str)
    assert "ignore_eos" not in body
    assert models.complete(body)["choices"]


@pytest.mark.slow
def test_an_alpha_of_zero_and_a_classifier_are_no_crash(check, base, adapters, tmp_path) -> None:
    models = ModelServer(base, adapters)
    for name, change in (("still", {"lora_alpha": 0}), ("classifier", {"task_type": "SEQ_CLS"})):
        folder = Path(shutil.copytree(adapters["linear"], tmp_path / name))
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        (folder / "adapter_config.json").write_text(json.dumps(config | change), encoding="utf-8")
        models.models[name] = models.models["linear"]
        code, out, err = check(models, base, {name: folder}, "--json")
        if name == "still":
            assert (code, verdicts(out)) == (Exit.FAIL, {"base": "conforms", "still": "nonconforming"})
        else:
            assert (code, out) == (Exit.USAGE, "")
            assert "task_type is SEQ_CLS" in err


@pytest.mark.slow
def test_a_server_that_takes_and_returns_texts_only_is_compared(check, worded) -> None:
    models = ModelServer(*worded, tokenizer=worded[0], texts_only=True)
    code, out, _ = check(models, *worded, "--json")
    assert (code, verdicts(out)) == (Exit.PASS, {"base": "conforms", "linear": "conforms"}), out
