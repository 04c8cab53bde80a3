"""Manifests of attackers, hashes included: one line, whatever a number, a path or a template says."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_manifest import make

from mllm_edge.bundle.answers import PicturesAnswer
from mllm_edge.bundle.manifest import StageEntry, TensorSpec
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


def drawing(folder: Path, latent: list[int | str]) -> dict[str, Any]:
    """A manifest that draws from a picture's features."""
    manifest = make(folder)
    seer = manifest.stages[0]

    def stage(name: str, inputs: list[TensorSpec], output: TensorSpec) -> StageEntry:
        return replace(seer, name=name, inputs=inputs, outputs=[output])

    fixed: list[int | str] = [1, *latent[1:]]
    features = TensorSpec("image_features", "float32", [latent[0], 4, 32])
    read = [TensorSpec("latent", "float32", latent), TensorSpec("timestep", "float32", [1]), features]
    stages = [
        *manifest.stages,
        stage("unet", read, TensorSpec("noise", "float32", latent)),
        stage("vae", [TensorSpec("decoded", "float32", fixed)], TensorSpec("pixels", "float32", [1, 3, 64, 64])),
    ]
    entry = PicturesAnswer(
        states="",
        unet="unet",
        vae="vae",
        latent="latent",
        timestep="timestep",
        noise="noise",
        decoded="decoded",
        pixels="pixels",
        latent_scale=0.18215,
        shape=fixed,  # type: ignore[arg-type]
        betas=[0.00085, 0.012],
        train_steps=1000,
        drops=[["image_features", "image_features"]],
        guidance=[7.5],
    )
    write_manifest(replace(manifest, stages=stages, answers=[entry]), folder)
    data: dict[str, Any] = json.loads((folder / "bundle.json").read_text())
    return data


@pytest.mark.parametrize("latent", [[1, 4, 8, 8], ["branches", 4, 8, 8]])
def test_pictures_are_drawn_alone_or_in_a_batch_of_branches(tmp_path: Path, latent: list[int | str]) -> None:
    drawing(tmp_path, latent)
    assert read_manifest(tmp_path).answers[0].kind == "pictures"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (change("answers", 0, "shape", to=[1, 4, 8, 9]), "not a latent of .1, 4, 8, 9."),
        (change("answers", 0, "shape", to=[2, 4, 8, 8]), "not a latent of"),
        (change("answers", 0, "shape", to=[]), "not a latent of"),
        (change("answers", 0, "timestep", to="time"), "nothing before vision.onnx gives its input timestep"),
        (change("answers", 0, "betas", to=[-0.1, 0.012]), "the numbers of answers of kind pictures cannot be"),
        (change("answers", 0, "betas", to=[0.012, 0.00085]), "the numbers of answers of kind pictures cannot be"),
        (change("answers", 0, "betas", to=[0.5, 1.0]), "the numbers of answers of kind pictures cannot be"),
        (change("answers", 0, "guidance", to=[float("inf")]), "the numbers of answers of kind pictures cannot be"),
        (change("answers", 0, "guidance", to=[]), "the numbers of answers of kind pictures cannot be"),
        (change("answers", 0, "latent_scale", to=0.0), "the numbers of answers of kind pictures cannot be"),
        (change("answers", 0, "steps", to=10**9), "the steps of pictures is 1000000000"),
        (change("answers", 0, "drops", to=[["image_features"]]), "are two names"),
        (change("answers", 0, "decision", to="choice"), "no stage and no source gives choice"),
        (change("answers", 0, "decision", to="noise"), "decide by noise, which is not a row of two"),
    ],
)
def test_numbers_of_pictures(tmp_path: Path, damage: Callable[[dict[str, Any]], None], message: str) -> None:
    data = drawing(tmp_path, ["branches", 4, 8, 8])
    damage(data)
    (tmp_path / "bundle.json").write_text(json.dumps(data))
    with pytest.raises(BadInput, match=message):
        read_manifest(tmp_path, verify_hash=False)


def test_a_latent_larger_than_any_memory(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="more than a machine can draw"):
        drawing(tmp_path, ["branches", 1 << 20, 1 << 20, 1 << 20])


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
