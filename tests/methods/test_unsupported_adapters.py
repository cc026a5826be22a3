"""Configs of adapters whose meaning the reference does not implement."""

from __future__ import annotations

from harness.methods.unsupported_adapters import reason, unsupported


def test_keys_with_another_meaning_are_named() -> None:
    assert unsupported({"r": 4, "use_qalora": False, "init_lora_weights": True}) == {}
    found = unsupported({"use_qalora": True, "init_lora_weights": "pissa_niter_4"})
    assert list(found) == ["use_qalora", "init_lora_weights=pissa_niter_4"]
    assert reason(found).startswith("use_qalora: inputs are pooled; init_lora_weights=")
