"""The commands from outside: what their process imports, what happens to its streams."""

from __future__ import annotations

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
    code = f"import sys, mllm_edge, mllm_edge.cli; print([name for name in {heavy} if name in sys.modules])"
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


@pytest.mark.parametrize("words", [["verify", "some.bundle"], ["export", "llava"]])
def test_a_missing_package_comes_with_the_line_that_installs_it(words: list[str]) -> None:
    said = python(BLOCKED, *words)
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
    assert "No space left" in done.stderr
