"""What is imported by what reads, plans and judges: nothing heavy, so that a command answers at once."""

from __future__ import annotations

import subprocess
import sys

import pytest

NUMBERS = {"numpy", "scipy", "pandas", "ruptures"}

LIGHT = {
    "harness.implements and a suite": (
        "import harness; harness.implements; harness.__version__\n"
        "from harness.methods.registry import discover; discover()\n"
        "from harness.suites import loader; loader.load('quick').plan",
        {"torch"},
    ),
    "a task of lm-eval": (
        "from pathlib import Path\nfrom harness.suites import tasks\n"
        f"assert tasks.load('lm-eval:arc_easy@{40 * '0'}', Path(), {{}}).upstream.splits == "
        "{'test': 'test', 'train': 'train'}",
        {"torch", "lm_eval"},
    ),
    "assets": ("from harness.assets import fetch, rows, table", {"torch", "transformers"}),
    "list and explain of claims": (
        "from harness.cli import main\nassert not main(['list', 'claims', 'measures']) + main(['explain', 'ratio'])",
        {"torch", "transformers"},
    ),
    "a Cell: its worker and the parity checks": (
        "import harness.runner.worker, harness.cell.lifecycle, harness.memory_model.cell_prediction\n"
        "from harness.conformance import checks; assert 'walk' in checks.every()",
        {"hypothesis"},
    ),
    "a count of a model's bytes": (
        "import json, sys; from pathlib import Path; from tempfile import mkdtemp\n"
        "from harness.memory_model import counting_worker as worker\n"
        "worker.die_with_parent = lambda _: None\n"
        "request = {'config': {'model_type': 'llama'}, 'kind': 'causal', 'dtype': 'bfloat16'}\n"
        "request |= {'methods': {}, 'targets': []}\n"
        "file, answers = (Path(mkdtemp()) / name for name in ('requests', 'answers'))\n"
        "file.write_text(json.dumps([request])); worker.main(['', '0', str(file), str(answers)])\n"
        "assert json.loads(answers.read_text())['parameters'] > 1e9\n"
        "[sys.modules.pop(name) for name, module in list(sys.modules.items()) if module is None]",
        {"torchao", "scipy", "accelerate"},
    ),
    "an answer that was cached": (
        "import os; from tempfile import mkdtemp; os.environ['PEFT_HARNESS_CACHE'] = mkdtemp()\n"
        "from harness.memory_model import answer_cache, counting_client, plan_prediction\n"
        "request = {'cell': {'method': 'lora', 'implementation': 'hf-peft'}}\n"
        "answer_cache.write([(request, {'peak_B': 1})])\n"
        "assert counting_client.answer_requests([request]) == [{'peak_B': 1}]",
        {"torch", "transformers"},
    ),
    "a bench's results": ("import harness.bench.run, harness.bench.table", {"torch"}),
    "verdicts of pairs": (
        "from harness.analysis.statistics import canaries, pair_design, paired",
        {"torch", "numpy", "scipy"},
    ),
    "pairs that are judged": (
        "from harness.analysis.statistics import canaries, pair_design, paired\npairs = [0.01 * k for k in range(6)]\n"
        "paired.family({'a': paired.judge(pairs, pair_design.Design(), 'first')}); canaries.canaries([pairs], 0.25)",
        {"torch"},
    ),
    "a history before it is judged": (
        "from harness.analysis.statistics import anchor, change_points\n"
        "from harness.regression.history import changes, detect, show",
        {"torch", *NUMBERS},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize(("code", "heavy"), LIGHT.values(), ids=LIGHT)
def test_nothing_heavy_is_imported_for(code: str, heavy: set[str]) -> None:
    code += f"\nimport sys; sys.exit(str({heavy} & set(sys.modules) or '') or 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
