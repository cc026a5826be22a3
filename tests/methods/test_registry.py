"""The door that every implementation comes in by, with good and bad guests. Distributions here are real folders."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

import harness
from harness.errors import HarnessError, ImplementationError
from harness.methods.registry import Implementation, Registry, discover, implements

GOOD = """
from harness import implements

@implements("lora", name="acme-lora", dtypes=["float32"], devices=["cuda"])
def attach(model, config, generator):
    return (model, config, generator)
"""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Return a function that puts a distribution with one entry point on sys.path."""
    monkeypatch.syspath_prepend(tmp_path)

    def distribution(name: str, code: str, point: str | None = None) -> None:
        module = name.replace("-", "_")
        (tmp_path / f"{module}.py").write_text(code, encoding="utf-8")
        info = tmp_path / f"{module}-1.5.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.5\n", encoding="utf-8")
        target = point or f"{module}:attach"
        (info / "entry_points.txt").write_text(f"[harness.implementations]\n{name} = {target}\n", encoding="utf-8")
        monkeypatch.delitem(sys.modules, module, raising=False)
        importlib.invalidate_caches()

    return distribution


def test_a_third_party_plugin_is_discovered(install) -> None:
    install("acme", GOOD)
    registry = discover()
    found = registry.find("method", "lora", "acme-lora")
    assert (found.distribution, found.version, found.dtypes, found.devices) == ("acme", "1.5", ("float32",), ("cuda",))
    assert found.function(1, 2, 3) == (1, 2, 3)
    assert registry.names("method", "lora") == sorted(registry.names("method", "lora"))
    assert registry.broken == {}


@pytest.mark.parametrize(
    "code",
    [
        GOOD + "attach = [attach, implements('nf4', name='acme-nf4', kind='base')(print)]",
        GOOD + "one, attach = attach, lambda: (one,)",
        GOOD + "one = attach\ndef attach():\n    yield one",
    ],
)
def test_entry_points_may_return_several_implementations(install, code: str) -> None:
    install("acme", code)
    assert "acme-lora" in discover().names("method", "lora")


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import nothing_of_that_name", "ModuleNotFoundError: No module named 'nothing_of_that_name' (/"),
        ("attach = 7", "TypeError: expected an Implementation, several"),
        ("attach = [7]", "TypeError: expected an Implementation, got 7"),
        ("attach = ['lora']", "TypeError: expected an Implementation, got 'lora'"),
        ("def attach(): raise RuntimeError('no licence key')", "RuntimeError: no licence key"),
        (
            "def attach(model): return model",
            "attach is no Implementation, because @implements(TARGET, name=NAME) does not",
        ),
        ("import sys; sys.exit('bye')", "SystemExit: bye"),
        ("def (", "SyntaxError"),
        ("", "AttributeError"),
        (GOOD.replace('"float32"', "").replace("[]", "'float32'"), "TypeError: dtypes must be a list of words"),
        (GOOD.replace('name="acme-lora"', 'name="acme-lora", kind="layer"'), "ValueError: kind must be one of method"),
        (GOOD.replace("acme-lora", "acme lora"), "TypeError: name must be a word"),
        (GOOD.replace('"float32"', ""), "ValueError: dtypes is empty"),
        (GOOD.replace('"cuda"', "7"), "TypeError: devices must be words, got 7"),
        (
            GOOD.replace('name="acme-lora"', 'name="acme-lora", offers=["lora_bais"]'),
            "`offers` has 'lora_bais', which is no optional feature of lora; did you mean `lora_bias`?",
        ),
        ("raise RuntimeError('two\\nlines \\x1b[31m')", "RuntimeError: two lines ?[31m"),
        (
            "class Odd(Exception):\n    __str__ = lambda self: 1 / 0\nraise Odd",
            "Odd: <exception str() failed>",
        ),
    ],
)
def test_a_broken_plugin_is_reported_and_the_others_load(install, code: str, reason: str) -> None:
    install("acme", code)
    install("zebra", GOOD.replace("acme", "zebra"))
    registry = discover()
    assert reason in registry.broken["acme"]
    assert {"zebra-lora", "reference"} <= set(registry.names("method", "lora"))
    with pytest.raises(ImplementationError, match="is installed but broken") as caught:
        registry.find("method", "lora", "acme")
    assert reason in caught.value.what
    with pytest.raises(ImplementationError) as caught:
        registry.find("method", "lora", "acme-lora")
    assert "broken plug-ins: acme" in caught.value.hint


def test_plugins_cannot_replace_our_names(install) -> None:
    install("aaa-acme", GOOD.replace("acme-lora", "reference"))
    registry = discover()
    assert registry.find("method", "lora", "reference").distribution == "peft-harness"
    assert registry.broken["aaa-acme"] == "method lora by reference is offered twice, first by peft-harness"


def test_two_implementations_with_one_name(install) -> None:
    install("acme", GOOD)
    install("zebra", GOOD)
    registry = discover()
    assert registry.find("method", "lora", "acme-lora").distribution == "acme"
    assert "offered twice, first by acme" in registry.broken["zebra"]


def test_output_of_a_plugin_goes_to_stderr(install, capsys: pytest.CaptureFixture[str]) -> None:
    install("acme", "print('welcome to acme')\n" + GOOD)
    discover()
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", "| welcome to acme\n")


@pytest.mark.parametrize(
    ("key", "message", "hint"),
    [
        (("method", "lora", "fussed"), "no implementation `fussed` of lora", "did you mean `fused`?"),
        (
            ("method", "lora", "unsloth"),
            "no implementation `unsloth` of lora",
            "implementations of lora: fused, reference",
        ),
        (("method", "full", "fused"), "`fused` does not offer full, only lora", "implementations of full: none"),
        (("base", "nf4", "reference"), "`reference` does not offer nf4, only lora", "implementations of nf4: none"),
    ],
)
def test_unknown_names_get_suggestions(key: tuple[str, str, str], message: str, hint: str) -> None:
    registry = Registry(tuple(implements("lora", name=name)(print) for name in ("reference", "fused")))
    with pytest.raises(HarnessError) as caught:
        registry.find(*key)
    assert (caught.value.what, caught.value.hint) == (message, hint)


def test_implements_registers_nothing() -> None:
    before = discover()
    made = harness.implements("lora", name="mine")(print)
    assert isinstance(made, harness.Implementation)
    assert made.function is print
    assert [str(i) for i in discover().implementations] == [str(i) for i in before.implementations]


def test_implementations_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        Implementation("a", "method", "lora", print).name = "b"  # type: ignore[misc]


def test_harness_has_no_other_attribute() -> None:
    with pytest.raises(AttributeError, match="nothing"):
        _ = harness.nothing


def test_a_function_with_a_wrong_parameter_is_told_the_arguments() -> None:
    def linear(x: object, W: object, scale: float) -> object:
        return x

    mine = Implementation("acme", "operation", "lora_linear", linear)
    with pytest.raises(TypeError, match=r"lora_linear gets the arguments x, W, scaling; linear\(.*cannot take them"):
        mine(x=1, W=2, scaling=3.0)
