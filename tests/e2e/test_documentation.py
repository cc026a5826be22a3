"""The manuals: commands that parse, Python that compiles, links that lead somewhere, and lengths that can be read."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from harness.assets import generated
from harness.cli import main
from harness.cli.app import commands as verbs
from harness.errors import Exit
from harness.suites.schema import Keys

TOP = Path(__file__).resolve().parents[2]
MANUALS = sorted(
    path
    for path in [TOP / "README.md", *TOP.glob("*/README.md"), *TOP.glob("*/*/README.md"), *TOP.glob(".github/*.md")]
    if path.name != "CHANGELOG.md" and not path.is_relative_to(TOP / ".venv")
)
MOST_LINES = 200


def name(path: Path) -> str:
    return path.relative_to(TOP).as_posix()


def commands(text: str) -> Iterator[str]:
    """Yield every command line of a manual: in fenced or indented blocks, and in code spans."""
    fenced = False
    for line in text.splitlines():
        fenced ^= line.startswith("```")
        found = re.match(r"\s*(?:\w+=\S+ )*(peft-harness .*)", line) if fenced or line.startswith("    ") else None
        yield from [found.group(1)] if found else re.findall(r"`(peft-harness [^`]*)`", line)


def arguments(command: str) -> list[str]:
    """Split a command line; a comment, and what the manual writes for optional parts, are left out."""
    words = shlex.split(command.replace("[", " ").replace("]", " ").replace("...", ""), comments=True)
    return [word for word in words[1:] if word not in ("&&", "|")]


def parsed(words: list[str]) -> None:
    """Parse a command as click does, and run nothing. Raises click.ClickException for an option that is not there."""
    command: click.Command = verbs
    while isinstance(command, click.Group) and words and not words[0].startswith("-"):
        found = command.get_command(click.Context(command), words[0])
        if found is None:
            raise click.UsageError(f"no command {words[0]}")
        command, words = found, words[1:]
    known = {
        option
        for parameter in command.get_params(click.Context(command))
        for option in (*parameter.opts, *parameter.secondary_opts)
    }
    for word in words:
        option = word.partition("=")[0]
        if option.startswith("--") and option not in {*known, "--help"}:
            raise click.UsageError(f"{command.name} has no option {option}")


def test_there_are_manuals() -> None:
    assert {"README.md", "harness/README.md", "suites/README.md", ".github/CONTRIBUTING.md"} <= set(map(name, MANUALS))


@pytest.mark.parametrize("path", MANUALS, ids=name)
def test_commands_exist(path: Path) -> None:
    for command in commands(path.read_text(encoding="utf-8")):
        parsed(arguments(command))


def test_a_wrong_command_is_noticed() -> None:
    (line,) = commands("    peft-harness check --no-such-option      # a comment")
    with pytest.raises(click.UsageError, match="--no-such-option"):
        parsed(arguments(line))


@pytest.mark.parametrize("path", MANUALS, ids=name)
def test_python_compiles(path: Path) -> None:
    for block in re.findall(r"```python\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL):
        ast.parse(block)


@pytest.mark.parametrize("path", MANUALS, ids=name)
def test_links_and_paths_lead_somewhere(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    missing = [link for link in links if not (path.parent / link).exists()]
    named = re.findall(r"`((?:harness|reference|suites|tests|results/published|\.github)/[\w./*-]+)`", text)
    missing += [one for one in named if not list(TOP.glob(one.rstrip("/")))]
    assert missing == []


@pytest.mark.parametrize("path", MANUALS, ids=name)
def test_a_manual_is_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MOST_LINES


def test_the_readme_is_short_and_begins_with_a_command() -> None:
    text = (TOP / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    assert len(text.split()) <= 1300
    assert "peft-harness run quick" in "\n".join(text.splitlines()[:15])


def test_the_manual_of_suites_names_every_key() -> None:
    text = (TOP / "suites" / "README.md").read_text(encoding="utf-8")
    marked = "\n".join(re.findall(r"```.*?```|`[^`]+`|\*\*[^*]+\*\*|^    [^\n]*$", text, re.DOTALL | re.MULTILINE))
    suite_keys = [keys for keys in Keys.__subclasses__() if keys.__module__ == Keys.__module__]
    fields = [field for keys in suite_keys for field in keys.model_fields.items()]
    names = {field.alias or name for name, field in fields}
    assert {"head_lr", "same-losses", "passes"} <= names
    assert sorted(name for name in names if not re.search(rf"(?<![\w-]){name}(?![\w-])", marked)) == []


@pytest.mark.slow
@pytest.mark.usefixtures("forks")
@pytest.mark.parametrize("command", ["plan ./mine.yaml", "claims lora --id", "fit llama-7b"])
def test_the_readme_prints_real_output(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (TOP / "README.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    generated.tiny_llama(tmp_path / "my-model")
    (suite,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    Path("mine.yaml").write_text(suite, encoding="utf-8")
    (line,) = [line for line in commands(text) if line.startswith(f"peft-harness {command}") and "MODEL" not in line]
    block = text[text.index(line) :].split("```\n")[1].rstrip().splitlines()
    assert main(arguments(line)) == Exit.PASS
    printed = capsys.readouterr().out.splitlines()
    assert [one for one in block if one not in printed] == []


def test_the_manuals_and_the_changelog_name_one_goal_of_the_default_tier() -> None:
    files = [TOP / "README.md", TOP / "tests" / "README.md", TOP / ".github" / "CHANGELOG.md"]
    goals = [re.findall(r"(\w+) minutes on two quiet cores", " ".join(file.read_text().split())) for file in files]
    assert all(goals)
    assert len({goal for found in goals for goal in found}) == 1
