"""Manifests of attackers, hashes included: one line, whatever a number, a path or a template says."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_manifest import make

from mllm_edge.bundle.read import read_manifest, read_text, sha256, write_manifest
from mllm_edge.errors import BadInput


def change(*path: str | int, to: Any) -> Callable[[dict[str, Any]], None]:
    def apply(data: Any) -> None:
        for key in path[:-1]:
            data = data[key]
        data[path[-1]] = to

    return apply


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (change("language_model", "gguf", "layers", to=10**399), "too large a number"),
        (change("stages", 0, "activation_bytes", to=10**399), "too large a number"),
        (change("stages", 0, "activation_bytes", to=-1), "must be 0 or more"),
        (change("stages", 1, "outputs", 0, "shape", to=[]), "of width 0"),
        (change("sources", 0, "pad_color", to=[1]), "pad_color"),
        (change("sources", 0, "pad_color", to=[2**40] * 3), "pad_color"),
        (change("sources", 0, "std", to=[1.0, 1.0]), "mean .* and std"),
        (change("sources", 0, "std", to=[0.0] * 3), "mean .* and std"),
        (change("sources", 0, "mean", to=[float("nan")] * 3), "mean .* and std"),
        (change("prompt", "first", to="{"), "template '{' cannot be read"),
        (change("build", "timing_cache", to="\0.cache"), "names a file that no system can have"),
        (change("language_model", "gguf", "file", to="x" * 5000), "names a file that no system can have"),
        (change("language_model", "vocabulary", to=-5), "vocabulary is -5"),
    ],
)
def test_numbers_paths_and_templates(tmp_path: Path, damage: Callable[[dict[str, Any]], None], message: str) -> None:
    write_manifest(make(tmp_path), tmp_path)
    data = json.loads((tmp_path / "bundle.json").read_text())
    damage(data)
    (tmp_path / "bundle.json").write_text(json.dumps(data))
    with pytest.raises(BadInput, match=message):
        read_manifest(tmp_path, verify_hash=False)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"schema": ' + "9" * 5000 + "}", '{"schema": 1e999}'])
def test_json_that_does_not_end(tmp_path: Path, text: str) -> None:
    (tmp_path / "bundle.json").write_text(text)
    with pytest.raises(BadInput):
        read_manifest(tmp_path)


def test_a_manifest_of_40_gb(tmp_path: Path) -> None:
    with (tmp_path / "bundle.json").open("wb") as file:
        file.truncate(40 << 30)
    with pytest.raises(BadInput, match="larger than 16 MB"):
        read_manifest(tmp_path)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.bin")
    for read in (read_text, sha256):
        with pytest.raises(BadInput, match="no ordinary file"):
            read(tmp_path / "pipe.bin")
