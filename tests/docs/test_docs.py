"""What README and docs tell a reader to type or open exists."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from pydantic_settings import BaseSettings
from typer.main import get_command
from typer.testing import CliRunner

from feedback.log.address import KafkaSettings
from feedback.log.spool import SpoolSettings
from instructloop.cli import app
from instructloop.config import RoundConfig
from tests.docs.pages import pages

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
FOLDERS = (
    *("benchmarks", "contracts", "demo", "docs", "feedback", "helm", "instructloop", "proto"),
    *("serving", "tests", "training"),
)

FENCE = re.compile(r"^```\n(.*?)^```", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
LINK = re.compile(r"\]\((?!https?:)([^)#]+)\)")
PATH = re.compile(rf"^(?:{'|'.join(FOLDERS)})/[\w./-]*$|^\.ci/run$|^[\w.-]+\.(?:md|toml|lock)$")
MAKE = re.compile(r"(?:^|\s)make ([a-z0-9]+)")
COMMAND = re.compile(r"(?:^|\s|/)instructloop ([a-z].*)")
SELECTED = re.compile(r"""ARGS="?-k (\w+)""")


def said(page: Path) -> list[str]:
    """Everything set as code: lines of fenced blocks, and spans."""
    text = page.read_text(encoding="utf-8")
    blocks = [line for block in FENCE.findall(text) for line in block.splitlines()]
    return blocks + SPAN.findall(FENCE.sub("", text))


def makes(lines: list[str]) -> set[str]:
    return {name for line in lines for name in MAKE.findall(line)}


def commands(lines: list[str]) -> set[str]:
    return {found[1] for line in lines if (found := COMMAND.search(line))}


def paths(page: Path) -> set[Path]:
    spans = {ROOT / span for span in said(page) if PATH.match(span)}
    links = {page.parent / link for link in LINK.findall(page.read_text(encoding="utf-8"))}
    return spans | links


def complaint(line: str) -> str | None:
    """Why the command line does not take this; values are not looked at."""
    words = line.split()
    command: object = get_command(app)
    while words and isinstance(command, typer.core.TyperGroup):
        name = words.pop(0)
        if name not in command.commands:
            return f"no command {name!r} in: instructloop {line}"
        command = command.commands[name]
    assert isinstance(command, typer.core.TyperCommand)
    known = {option for parameter in command.params for option in parameter.opts}
    wrong = [word for word in words if word.startswith("--") and word not in known]
    return f"no option {wrong} in: instructloop {line}" if wrong else None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_target_is_in_the_makefile(page: Path) -> None:
    for target in makes(said(page)):
        command = ["make", "--dry-run", "--directory", str(ROOT), target, "DATA=folder"]
        made = subprocess.run(command, capture_output=True, text=True, check=False)
        assert made.returncode == 0, made.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_is_taken_by_the_command_line(page: Path) -> None:
    assert [wrong for line in commands(said(page)) if (wrong := complaint(line))] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_path_is_there(page: Path) -> None:
    assert [str(path.relative_to(ROOT)) for path in paths(page) if not path.exists()] == []


def test_every_selected_test_is_there() -> None:
    names = "\n".join(
        path.read_text(encoding="utf-8")
        for path in (ROOT / "tests").rglob("test_*.py")
        if path != Path(__file__)
    )
    wanted = [name for line in said(ROOT / "README.md") for name in SELECTED.findall(line)]
    assert len(wanted) >= 5
    assert [name for name in wanted if not re.search(rf"def test_\w*{name}", names)] == []


def test_the_tree_in_the_architecture_is_the_tree() -> None:
    """Each file that the tree names is in the folder above it, and each module is named."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    tree = next(block for block in FENCE.findall(page) if block.startswith("contracts/"))
    named: set[Path] = set()
    folder = ROOT
    for line in tree.splitlines():
        words = re.split(r" {2,}", line.strip())[0].split()
        folder = folder if line.startswith(" ") else ROOT / words[0]
        named |= {folder / word for word in words if line.startswith(" ")} | {folder}
    assert [str(path) for path in named if not path.exists()] == []
    for name in ("contracts", "feedback", "instructloop", "serving", "training"):
        modules = {path for path in (ROOT / name).glob("*.py") if path.name != "__init__.py"}
        assert sorted(path.name for path in modules - named) == [], name


def test_every_key_of_a_round_is_listed() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    listed = dict(
        re.findall(r"^\| `INSTRUCTLOOP_((?:KAFKA|SPOOL)_\w+)` \| ([\w./-]+) \|", page, re.MULTILINE)
    )
    settings: dict[str, type[BaseSettings]] = {"KAFKA_": KafkaSettings, "SPOOL_": SpoolSettings}
    assert listed == {
        prefix + name.upper(): str(field.default)
        for prefix, of in settings.items()
        for name, field in of.model_fields.items()
    }
    keys = {
        key
        for cells in re.findall(r"^\| (`[a-z_`, ]+) \|", page, re.MULTILINE)
        for key in SPAN.findall(cells)
    }
    assert keys == set(RoundConfig.model_fields)


def test_generated_pages_are_fresh() -> None:
    stale = [path.name for path, text in pages().items() if path.read_text("utf-8") != text]
    assert stale == [], "run make docs"


def test_help_of_serve_fits_one_screen() -> None:
    command = [sys.executable, "-m", "instructloop.cli", "serve", "--help"]
    screen = {**os.environ, "COLUMNS": "80"}
    shown = subprocess.run(command, capture_output=True, text=True, check=True, env=screen)
    assert len(shown.stdout.splitlines()) <= 40


def test_no_help_is_cut_short_at_80_columns() -> None:
    cut = [
        " ".join([*path, line.strip()])
        for path in (["--help"], *([*words, "--help"] for words in subcommands(get_command(app))))
        for line in CliRunner().invoke(app, path, terminal_width=80).output.splitlines()
        if len(line) > 80 or re.search(r"\w\.\.\.|…", line)
    ]
    assert cut == []
    assert "[rules]" in CliRunner().invoke(app, ["dataset", "build", "--help"]).output


def subcommands(command: object) -> Iterator[list[str]]:
    for name, below in getattr(command, "commands", {}).items():
        yield [name]
        yield from ([name, *words] for words in subcommands(below))


def test_what_is_wrong_is_seen(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("`serving/nothing.py` [x](gone.md)\n```\nmake nothing\n```\n", encoding="utf-8")
    assert makes(said(page)) == {"nothing"}
    assert [path.exists() for path in paths(page)] == [False, False]
    assert (
        complaint("serve --nothing 1")
        == "no option ['--nothing'] in: instructloop serve --nothing 1"
    )
    assert complaint("nothing") == "no command 'nothing' in: instructloop nothing"
    assert complaint("serve --model folder") is None
