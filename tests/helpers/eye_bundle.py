"""A bundle that makes vectors of pictures by one small graph; its language model is never loaded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from onnx import TensorProto, helper, numpy_helper, save
from PIL import Image

from mllm_edge.bundle.answers import RetrievedAnswer
from mllm_edge.bundle.manifest import (
    BuildSettings,
    Generation,
    LanguageModelEntry,
    Manifest,
    Prompt,
    StageEntry,
    TensorSpec,
    Tokenizer,
)
from mllm_edge.bundle.read import file_entry, write_manifest
from mllm_edge.bundle.sources import Pixels, States
from mllm_edge.runtime.preprocess import preprocess

SIZE, WIDTH, LLM = 4, 6, 8
PIXELS = Pixels("pixels", SIZE, "squash", "bilinear", [0, 0, 0], [0.5] * 3, [0.5] * 3)


def eye(seed: int = 0, width: int = WIDTH) -> np.ndarray:
    """What pixels are multiplied with, float32 [3*S*S,d]."""
    return np.random.default_rng(seed).standard_normal((3 * SIZE * SIZE, width)).astype(np.float32)


def write_bundle(folder: Path, pictures: int | str = "pictures", seed: int = 0, width: int = WIDTH) -> Path:
    """`pictures`: how many the graph takes at once; of another `seed` its weights are others."""
    folder.mkdir(parents=True)
    one: list[int | str] = [pictures, 3, SIZE, SIZE]
    graph = helper.make_graph(
        [
            helper.make_node("Flatten", ["pixels"], ["flat"], axis=1),
            helper.make_node("MatMul", ["flat", "eye"], ["seen"]),
        ],
        "eye",
        [helper.make_tensor_value_info("pixels", TensorProto.FLOAT, one)],
        [helper.make_tensor_value_info("seen", TensorProto.FLOAT, [pictures, width])],
        [numpy_helper.from_array(eye(seed, width), "eye")],
    )
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), folder / "eye.onnx")
    for name in ("decoder.onnx", "tokenizer.json"):
        (folder / name).write_text("never opened")

    def stage(name: str, inputs: list[TensorSpec], outputs: list[TensorSpec]) -> StageEntry:
        entry = vars(file_entry(folder, f"{name}.onnx"))
        return StageEntry(**entry, name=name, engine="onnx", precision="fp32", inputs=inputs, outputs=outputs)

    states = TensorSpec("query", "float32", [1, width])
    lm = LanguageModelEntry(
        "language_model", "onnx", "causal", "fp32", "language_model", 16, LLM, 16, 4, parts=[stage("decoder", [], [])]
    )
    manifest = Manifest(
        system="toy",
        config="eye",
        target="cpu",
        created="2026-11-01T00:00:00Z",
        tool_version="0.1.0",
        licences={},
        source={"kind": "random"},
        tasks=["draw"],
        sources=[PIXELS, States("marks", ["[M]"], at="token")],
        stages=[
            stage("eye", [TensorSpec("pixels", "float32", one)], [TensorSpec("seen", "float32", [pictures, width])]),
            # Of the same file, and never run: nobody asks in words here.
            StageEntry(
                **vars(file_entry(folder, "eye.onnx")),
                name="head",
                engine="onnx",
                precision="fp32",
                inputs=[TensorSpec("marks", "float32", [1, LLM])],
                outputs=[states],
            ),
        ],
        tokenizers=[Tokenizer("language_model", "json", "tokenizer.json")],
        language_model=lm,
        prompt=Prompt("toy", "", "{text}", "{text}", "{text}", []),
        generation=Generation(),
        answers=[RetrievedAnswer("marks", "query", picture="seen")],
        extra_files=[file_entry(folder, "tokenizer.json")],
        build=BuildSettings(axes={"pictures": [1, 2, 4]} if isinstance(pictures, str) else {}),
    )
    write_manifest(manifest, folder)
    return folder


def seen(files: list[Path], seed: int = 0) -> np.ndarray:
    """By hand: the vectors of pictures, float32 [n,d] of length 1."""
    pixels = np.concatenate([preprocess(Image.open(file).convert("RGB"), PIXELS) for file in files])
    found = pixels.reshape(len(files), -1) @ eye(seed)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def photographs(folder: Path, numbers: range) -> Path:
    """Small pictures of noise, every third of them in a folder below."""
    for number in numbers:
        place = folder / "below" if number % 3 == 0 else folder
        place.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (6, 5, 3), np.uint8)
        Image.fromarray(pixels).save(place / f"{number}.png")
    return folder
