"""The commands from outside: what their process imports, what happens to its streams."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest


def python(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run Python code apart, with what this process has imported out of the way."""
    words = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(words, capture_output=True, encoding="utf-8", check=False)


def test_importing_the_command_line_loads_nothing_heavy() -> None:
    heavy = ["torch", "transformers", "onnx", "onnxruntime", "llama_cpp", "gguf", "numpy", "PIL", "yaml", "rich"]
    code = f"import sys, mllm_edge.commands.run; print([name for name in {heavy} if name in sys.modules])"
    assert python(code).stdout == "[]\n"


BLOCKED = """
import sys
blocked = {"torch", "transformers", "onnx", "gguf", "tokenizers"}  # llama.cpp has a tokenizer of its own
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in blocked:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Finder())
from mllm_edge.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_running_needs_no_pytorch(folder: Path, picture: Path) -> None:
    said = python(BLOCKED, "run", folder, "the", "--image", picture, "--max-tokens", 2)
    assert said.returncode == 0, said.stderr
    assert said.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["export", "lava"], "did you mean 'llava'"),
        (["export", "llava", "--target", "gpu"], "unknown target 'gpu'"),
        (["export", "llava", "--quant", "q3"], "unknown quantization 'q3'"),
        (["export", "llava", "--precision", "bf16"], "unknown precision 'bf16'"),
        (["export", "llava", "--config", "70b"], "unknown config of llava '70b'"),
        (["verify", "nowhere.bundle"], "nowhere.bundle is not a bundle"),
        (["plan", "llava", "--config", "70b"], "unknown config of llava '70b'"),
    ],
)
def test_words_are_checked_before_packages(words: list[str], message: str) -> None:
    said = python(BLOCKED, *words)
    assert (said.returncode, message in said.stderr) == (2, True), said.stderr


@pytest.mark.parametrize("words", [["verify"], ["export", "llava"]])
def test_a_missing_package_comes_with_the_line_that_installs_it(words: list[str], folder: Path) -> None:
    said = python(BLOCKED, *words, *[folder][: words == ["verify"]])
    assert said.returncode == 1
    assert re.fullmatch(r"error: (torch|onnx) is not installed; run: pip install 'mllm-edge\[export\]'\n", said.stderr)


def test_a_reader_that_leaves_is_no_error() -> None:
    words = [sys.executable, "-m", "mllm_edge", "systems"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8")
    assert process.stdout and process.stderr
    process.stdout.close()
    assert process.wait(timeout=60) == 1
    assert process.stderr.read() == ""
    process.stderr.close()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("words", [["systems"], ["systems", "--json"], ["--help"]])
def test_stdout_on_a_full_disk_is_one_line(words: list[str]) -> None:
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "mllm_edge", *words]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "(No space left on device); " in done.stderr and "--debug" not in done.stderr


EDGE = f"{sys.executable} -m mllm_edge"


def shell(command: str, **variables: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(["bash", "-c", command], capture_output=True, env={**os.environ, **variables}, check=False)


@pytest.mark.parametrize(
    ("command", "code", "line"),
    [
        ("systems >&-", 2, b"error: stdout is closed"),
        ("run nowhere <&-", 2, b"error: there is no prompt"),
        ("run nowhere < /dev/zero", 2, b"error: stdin has over"),
        ("run nowhere 0> /dev/null", 2, b"error: stdin cannot be read"),
        ("systems --json 2>&- | head -c 1", 0, b""),
        ("run nowhere x 2> /dev/full", 2, b""),
    ],
)
def test_closed_and_broken_streams_are_one_line(command: str, code: int, line: bytes) -> None:
    done = shell(f"{EDGE} {command}")
    assert done.returncode == code
    assert done.stderr.startswith(line) and done.stderr.count(b"\n") == bool(line)


def test_an_error_with_json_and_closed_stderr_is_a_document_alone() -> None:
    assert json.loads(shell(f"{EDGE} run nowhere x --json 2>&-").stdout)["exit_code"] == 2


def test_bytes_that_are_no_text_are_replaced(folder: Path) -> None:
    text = shell(f"printf 'caf\\xe9\\n' | {EDGE} run {folder} --max-tokens 2", PYTHONIOENCODING="utf-8:strict")
    assert text.returncode == 0, text.stderr
    words = f"printf 'the\\ncaf\\xe9\\n' | {EDGE} chat {folder} --max-tokens 2 --json"
    assert [turn["prompt"] for turn in json.loads(shell(words, PYTHONIOENCODING="ascii:strict").stdout)["turns"]] == [
        "the",
        "caf\ufffd",
    ]


def test_ctrl_c_while_the_command_line_is_imported() -> None:
    code = """
import sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "typer":
            raise KeyboardInterrupt
sys.meta_path.insert(0, Finder())
from mllm_edge.cli import main
sys.exit(main(["systems"]))
"""
    said = python(code)
    assert (said.returncode, said.stderr) == (130, "interrupted; nothing was changed\n")
