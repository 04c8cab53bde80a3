"""What the command line shows around a result: interruptions, unexpected errors, warnings, bars, dialogues."""

from __future__ import annotations

import io
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from calls_for_tests import Call

from mllm_edge import cli
from mllm_edge.commands.screen import Screen


def test_ctrl_c_says_what_is_kept(call: Call, stub_export: Callable[[Callable[..., Path]], None]) -> None:
    def interrupted(*_: Any, **__: Any) -> Path:
        raise KeyboardInterrupt

    stub_export(interrupted)
    said = call("export", "llava")
    assert (said.code, said.out) == (130, "")
    assert said.err == "interrupted; finished steps are kept, the same command continues where it stopped\n"


def test_prints_of_libraries_cannot_steer_the_terminal(
    call: Call, stub_export: Callable[[Callable[..., Path]], None]
) -> None:
    def chatty(*_: Any, **__: Any) -> Path:
        print("tensor \x1b]0;owned\x07 of\ta file")
        raise KeyboardInterrupt

    stub_export(chatty)
    assert call("export", "llava").err.startswith("tensor \\x1b]0;owned\\x07 of\ta file\n")


def test_unexpected_errors_are_one_line_unless_debugging(
    call: Call, stub_export: Callable[[Callable[..., Path]], None]
) -> None:
    def broken(*_: Any, **__: Any) -> Path:
        raise ZeroDivisionError("two\nlines")

    stub_export(broken)
    said = call("export", "llava")
    assert said.code == 1
    assert said.error == "ZeroDivisionError: two lines; run it again with --debug for the traceback"
    debugged = call("export", "llava", "--debug")
    assert debugged.code == 1
    assert "Traceback (most recent call last)" in debugged.err


def test_progress_that_comes_late_leaves_the_text_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    screen = Screen()
    with screen.late_steps() as report:
        screen.text("a dog")
        report("drawing picture 1", 1, 1, None)
        report("drawing picture 1", 1, 1, 2.0)
    screen.end_text()
    said = capsys.readouterr()
    assert said.out == "a dog\n"
    assert said.err == "[1/1] drawing picture 1 ...\n[1/1] drawing picture 1 2.0 s\n"
    with Screen().late_steps():
        pass
    assert capsys.readouterr().err == ""


def test_only_our_warnings_are_shown(
    folder: Path, call: Call, stub_export: Callable[[Callable[..., Path]], None]
) -> None:
    said = call("run", folder, "the", "--max-tokens", 1000, "--context", 48)
    assert said.code == 0
    assert "warning: the prompt leaves " in said.err

    def noisy(*_: Any, **__: Any) -> Path:
        warnings.warn("for developers", UserWarning, stacklevel=1)
        return folder

    stub_export(noisy)
    assert "for developers" not in call("export", "llava").err
    assert "for developers" in call("export", "llava", "--debug").err


def test_train_passes_settings_and_prints_the_report(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    given = []

    def train(recipe: str, overrides: list[str], resume: bool, report: Any) -> dict[str, Any]:
        given.append((recipe, overrides, resume))
        report(1, 2, {"loss": 0.5})
        return {"steps": 2, "out": "runs/x"}

    monkeypatch.setattr("mllm_edge.recipes.train", train)
    said = call("train", "lm-pretrain", "steps=2", "lora.r=4", "--resume", "--json")
    assert given == [("lm-pretrain", ["steps=2", "lora.r=4"], True)]
    assert said.document == {"steps": 2, "out": "runs/x"}
    assert said.err == "step 1/2: loss 0.5\n"
    monkeypatch.setenv("RANK", "1")
    other = call("train", "lm-pretrain")
    assert (other.code, other.out, other.err) == (0, "", "")


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_bar(
    folder: Path, call: Call, stub_export: Callable[[Callable[..., Path]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def export(*_: Any, report: Any, **__: Any) -> Path:
        report("connector", 1, 2, None)
        warnings.warn_explicit("all is well", UserWarning, cli.__file__, 1)
        report("connector", 1, 2, 0.25)
        report("verify", 2, 2, 0.25)
        return folder

    stub_export(export)
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    said = call("export", "llava")
    assert said.out == f"{folder}\n"
    shown = terminal.getvalue()
    assert "warning: all is well\n" in shown
    assert "2/2" in shown
    assert "[1/2]" not in shown


def test_a_dialogue_on_a_terminal_survives_a_mistake(folder: Path, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(sys, "stdin", Terminal("/image nowhere.png\nthe\n"))
    assert cli.main(["chat", str(folder), "--max-tokens", "2", "--threads", "1", "--quiet"]) == 0
    said = capsys.readouterr()
    assert said.err == "\nerror: nowhere.png does not exist; check the path\n"
    assert said.out.count("> ") == 3
