"""A causal decoder as an engine: the (played) GPU gives what ONNX Runtime gives, over several turns."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
from fake_gpu import Device, install

import mllm_edge
from mllm_edge.errors import BadInput
from mllm_edge.export.tensorrt.build import build_bundle
from mllm_edge.scenes import render, sample_scene

pytest.importorskip("torch", reason="PyTorch is not installed: pip install 'mllm-edge[export]'")


def test_llavas_decoder_on_a_board(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Device()
    install(monkeypatch, gpu)
    folder = tmp_path / "llava.bundle"
    with pytest.warns(RuntimeWarning, match="language_model.embed is read by ONNX Runtime"):
        mllm_edge.export(
            "llava", target="trt", llm="onnx", precision="fp32", quant="fp32", devices=["orin-nano"], out=folder
        )
    assert [one.stage for one in build_bundle(folder)] == ["vision_encoder", "connector", "language_model.decoder"]
    picture = render(sample_scene("test", 9), 160)
    said = []
    for target in ("cpu", None):
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # nothing falls back
            with mllm_edge.load(folder, target, threads=1) as model:
                first = model.generate("What is in the picture?", picture, max_tokens=40)
                again = model.generate("What is in the picture?", picture, max_tokens=40)  # from the kept prefix
                other = model.generate("How many objects are there?", picture, max_tokens=10)
                said.append([first.tokens.ids, again.tokens.ids, other.tokens.ids])
    assert said[0] == said[1] and len(said[0][0]) > 5
    assert not gpu.held
    manifest = json.loads((folder / "bundle.json").read_text())
    decoder = manifest["language_model"]["parts"][1]
    cache = next(spec for spec in decoder["inputs"] if spec["name"].startswith("past_"))
    for place, key, value, said in (
        (decoder, "engine", "magic", "asks for engine 'magic'; known: onnx, tensorrt"),
        (manifest["build"], "axes", {}, "build.axes lacks capacity, sequences, tokens"),
        (cache, "shape", ["sequences", "tokens", "capacity", 8], r"it can be \[B,heads,C,d\]"),
    ):
        kept, place[key] = place[key], value
        (folder / "bundle.json").write_text(json.dumps(manifest))
        with pytest.raises(BadInput, match=said):
            mllm_edge.load(folder, "cpu", threads=1)
        place[key] = kept
