"""Server of vLLM with the OpenAI API. It loads all adapters at its start. Imports no torch."""

from __future__ import annotations

from harness.methods.servers.kind import Launch, ServerKind

_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Values of vLLM's option `--max-lora-rank`. An adapter of a higher rank stops the server at its start."""


def _arguments(launch: Launch) -> list[str]:
    rank = next((size for size in _RANKS if size >= launch.rank), _RANKS[-1])
    # Fill every slot. On a CPU, vLLM adds the update of the last slot to base rows; an empty slot would hide this defect.
    slots = len(launch.adapters)
    return [
        "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1", "--port", str(launch.port),
        "--model", str(launch.base), "--served-model-name", launch.name, "--dtype", launch.dtype,
        "--max-model-len", str(launch.tokens), "--max-num-seqs", str(launch.requests), "--enable-lora",
        "--max-loras", str(slots), "--max-cpu-loras", str(slots + 1), "--max-lora-rank", str(rank),
        "--lora-modules", *(f"{name}={folder}" for name, folder in launch.adapters.items()),
        *(["--enforce-eager"] if launch.device == "cpu" else []),
    ]  # fmt: skip


SERVER = ServerKind(
    name="vllm",
    module="vllm",
    arguments=_arguments,
    environment="vllm",
    variables={
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
    },
    distributions=("vllm", "vllm-cpu", "torch", "transformers"),
)
