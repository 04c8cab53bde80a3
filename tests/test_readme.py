"""The commands of README.md are run as a reader would; those of the other pages are checked against `--help`."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from mllm_edge.commands.app import NESTED
from mllm_edge.recipes import recipe

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
COMMAND = Path(sys.executable).with_name("mllm-edge")


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def lines(page: Path) -> list[str]:
    """The command lines of a page, without the variables that they set."""
    written = (line for block in blocks(page, "sh") for line in block.splitlines())
    return [re.sub(r"^([A-Z_]+=(\"[^\"]*\"|\S+) )+", "", line) for line in written]


ALL_LINES = [line for page in PAGES for line in lines(page)]


def of_program(name: str) -> list[str]:
    """The lines of all pages that call `name`."""
    return sorted({line for line in ALL_LINES if line.split()[0] == name})


README = ROOT / "README.md"
COMMANDS = [line for line in lines(README) if line.startswith("mllm-edge ")]
MAKERS = [line for line in COMMANDS if line.startswith("mllm-edge export ")]
USERS = [line for line in COMMANDS if line not in MAKERS]
DRAW, *SCRIPTS = blocks(README, "python")


def run(arguments: list[str], folder: Path, text: str = "") -> str:
    environment = {**os.environ, "COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}
    result = subprocess.run(
        arguments, cwd=folder, env=environment, input=text, capture_output=True, encoding="utf-8", check=False
    )
    assert result.returncode == 0, f"{shlex.join(arguments)}\n{result.stdout}\n{result.stderr}"
    return result.stdout + result.stderr


def call(line: str, folder: Path, text: str = "") -> str:
    return run([str(COMMAND), *shlex.split(line)[1:]], folder, text)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the README's picture was drawn and its bundle exported."""
    place = tmp_path_factory.mktemp("readme")
    run([sys.executable, "-c", DRAW], place)
    for line in MAKERS:
        call(line, place)
    return place


@pytest.mark.parametrize("line", USERS)
def test_readme_command_runs(line: str, folder: Path) -> None:
    question = "What is in the picture?\n" if line.startswith("mllm-edge chat ") else ""
    assert call(line, folder, question).strip()


def test_the_demo_runs(folder: Path) -> None:
    """`make demo`, with bundles that are there."""
    demo = folder / "build" / "demo"
    demo.mkdir(parents=True)
    for system in ("llava", "glamm"):
        (demo / f"{system}.bundle").symlink_to(folder / f"{system}.bundle")
    said = run([sys.executable, str(ROOT / "examples" / "demo.py")], folder)
    assert "GLaMM, asked for a description with masks (4 of them)" in said
    assert (demo / "answer" / "overlay.png").is_file()


@pytest.mark.parametrize("script", SCRIPTS)
def test_readme_script_runs(script: str, folder: Path) -> None:
    assert run([sys.executable, "-c", script], folder).strip()


def test_pages_call_only_programs_that_are_checked_here() -> None:
    checked = {"mllm-edge", "make", "pip", "python", "accelerate", ".venv/bin/pre-commit"}
    a_boards_own = {"sudo", "python3"}  # settings of a Jetson's system, which is not here
    programs = {line.split()[0] for line in ALL_LINES}
    assert programs <= checked | a_boards_own
    assert {"mllm-edge", "make", "pip"} <= programs


@pytest.mark.parametrize("line", of_program("python"))
def test_module_or_script_that_pages_run_exists_and_explains_itself(line: str) -> None:
    first, second, *_ = shlex.split(line)[1:]
    words = ["-m", second] if first == "-m" else [first]
    assert "usage:" in run([sys.executable, *words, "--help"], ROOT)


@functools.cache
def help_of(verb: str) -> str:
    return run([str(COMMAND), *verb.split(), "--help"], ROOT)


@pytest.mark.parametrize("line", of_program("mllm-edge"))
def test_command_has_the_options_that_pages_name(line: str) -> None:
    _, verb, *arguments = shlex.split(line)
    if verb in NESTED:
        verb = f"{verb} {arguments.pop(0)}"
    options = {argument.split("=")[0] for argument in arguments if argument.startswith("-")}
    known = set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", help_of(verb)))
    assert options <= known


@pytest.mark.parametrize("line", [line for line in of_program("mllm-edge") if line.startswith("mllm-edge train ")])
def test_recipe_and_settings_that_pages_name_exist(line: str) -> None:
    name, *settings = [argument for argument in shlex.split(line)[2:] if not argument.startswith("-")]
    assert recipe.load(name, settings).steps > 0


@pytest.mark.parametrize("line", of_program("make"))
def test_make_target_exists(line: str) -> None:
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert line.split()[1] in targets


@pytest.mark.parametrize("line", [line for line in of_program("pip") if ".[" in line])
def test_extra_exists(line: str) -> None:
    extras = importlib.metadata.metadata("mllm-edge").get_all("Provides-Extra") or []
    asked = re.findall(r"\.\[([\w,]+)\]", line)
    assert asked
    assert set(asked[0].split(",")) <= set(extras)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []
