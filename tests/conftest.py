"""One thread for each worker, and fixtures of the command line's tests."""

import io
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from bundle_for_tests import write_bundle
from calls_for_tests import Call, Said
from PIL import Image

# Before PyTorch, ONNX Runtime or llama.cpp are imported: workers share the cores.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from mllm_edge import cli


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("cli") / "tiny.bundle")


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "noise.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)).save(path)
    return path


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Call:
    def run(*words: object, text: str = "") -> Said:
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        if words[:1] in (("run",), ("chat",)) and len(words) > 2 and "--threads" not in words:
            words += ("--threads", 1)  # tests share the machine
        code = cli.main([str(word) for word in words])
        return Said(code, *capsys.readouterr())

    return run


@pytest.fixture
def stub_export(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., Path]], None]:
    def replace(function: Callable[..., Path]) -> None:
        import mllm_edge.export.export as module

        monkeypatch.setattr(module, "export", function)

    return replace
