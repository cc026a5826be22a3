"""A task of lm-eval's is found among its fourteen thousand files, mostly without reading all; a misspelt one is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.assets import lm_eval_files
from harness.errors import UsageError

FILES = {
    "arc/arc_easy.yaml": "task: arc_easy\ntest_split: test\n",
    "arc/hard.yaml": "'task': \"arc_challenge\" # the harder half\ntest_split: test\n",
    "arc/group.yaml": "group: arc\ntask:\n  - arc_easy\n",
    "siqa/siqa.yaml": "task: social_iqa\n",
    "other/much.yml": "task: much\n",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        (path := tmp_path / name).parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return tmp_path


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """List the files whose content is looked at for a name."""
    seen, real = [], Path.read_bytes

    def watched(path: Path) -> bytes:
        seen.append(path.name)
        return real(path)

    monkeypatch.setattr(Path, "read_bytes", watched)
    return seen


ARC = {"arc_easy.yaml", "hard.yaml", "group.yaml"}
ALL = {*ARC, "siqa.yaml", "much.yml"}


@pytest.mark.parametrize(
    ("name", "file", "looked_at"),
    [
        ("arc_easy", "arc/arc_easy.yaml", {"arc_easy.yaml"}),
        ("arc_challenge", "arc/hard.yaml", ARC),
        ("social_iqa", "siqa/siqa.yaml", ALL),  # nothing but its content leads to it
    ],
)
def test_a_task_is_found_wherever_it_is(
    name: str, file: str, looked_at: set[str], folder: Path, read: list[str]
) -> None:
    assert lm_eval_files.find(f"lm-eval:{name}", folder).path == folder / file
    assert set(read) >= looked_at
    assert set(read) - looked_at <= {Path(file).name}  # which is then read as YAML


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("arc_esay", "did you mean `arc_easy`?"),
        ("acr_easy", "did you mean `arc_easy`?"),
        ("arc_chalenge", "did you mean `arc_challenge`?"),  # of which no file has the name
        ("social_iq", "did you mean `social_iqa`?"),
        ("zzz", "`lm-eval ls tasks` lists them"),
    ],
)
def test_a_misspelt_task_is_refused_after_all_were_looked_at(
    name: str, hint: str, folder: Path, read: list[str]
) -> None:
    with pytest.raises(UsageError, match=f"lm-eval has no task `{name}`") as caught:
        lm_eval_files.find(f"lm-eval:{name}", folder)
    assert caught.value.hint == hint
    assert set(read) == ALL
