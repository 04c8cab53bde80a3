from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import FEATURES, PATCH, PATCHES, SIZE
from onnx import numpy_helper

from mllm_edge.bundle.manifest import StageEntry, TensorSpec
from mllm_edge.bundle.read import read_manifest
from mllm_edge.errors import BadInput, MllmEdgeError
from mllm_edge.runtime.engines.interface import Options
from mllm_edge.runtime.engines.ort import OnnxStage

CPU = Options("cpu", False, 1, "f16", 128)
PIXELS = np.random.default_rng(3).standard_normal((1, 3, SIZE, SIZE)).astype(np.float32)


@pytest.fixture(scope="module")
def entry(tiny_bundle: Path) -> StageEntry:
    return read_manifest(tiny_bundle).stage("vision_encoder")


def test_runs_by_name(tiny_bundle: Path, entry: StageEntry) -> None:
    stage = OnnxStage(tiny_bundle / entry.file, entry, CPU)
    out = stage(pixel_values=PIXELS)
    graph = onnx.load(tiny_bundle / entry.file).graph
    kernel = next(numpy_helper.to_array(t) for t in graph.initializer if t.name == "kernel")
    cells = PIXELS.reshape(3, SIZE // PATCH, PATCH, SIZE // PATCH, PATCH)
    expected = np.einsum("chiwj,fcij->hwf", cells, kernel).reshape(1, PATCHES, FEATURES)
    assert list(out) == ["image_features"]
    np.testing.assert_allclose(out["image_features"], expected, atol=1e-5)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({}, "takes pixel_values; it was given nothing"),
        ({"pixels": PIXELS}, "was given pixels"),
        ({"pixel_values": PIXELS.astype(np.float64)}, r"float64 \[1, 3, 16, 16\]; it takes float32"),
        ({"pixel_values": PIXELS[0]}, r"float32 \[3, 16, 16\]"),
    ],
)
def test_arrays_are_checked(tiny_bundle: Path, entry: StageEntry, arrays: dict[str, np.ndarray], message: str) -> None:
    stage = OnnxStage(tiny_bundle / entry.file, entry, CPU)
    with pytest.raises(MllmEdgeError, match=message):
        stage(**arrays)


def test_a_closed_stage_says_so(tiny_bundle: Path, entry: StageEntry) -> None:
    stage = OnnxStage(tiny_bundle / entry.file, entry, CPU)
    stage.close()
    with pytest.raises(MllmEdgeError, match="closed"):
        stage(pixel_values=PIXELS)


def test_a_file_that_is_no_graph(tmp_path: Path, entry: StageEntry) -> None:
    (tmp_path / "bad.onnx").write_bytes(b"\x08\x07 nothing")
    with pytest.raises(BadInput, match=r"bad\.onnx"):
        OnnxStage(tmp_path / "bad.onnx", entry, CPU)


def test_a_graph_that_is_not_the_manifests(tiny_bundle: Path, entry: StageEntry) -> None:
    wrong = replace(entry, outputs=[TensorSpec("image_features", "float32", [1, PATCHES, 99])])
    with pytest.raises(BadInput, match="manifest says float32"):
        OnnxStage(tiny_bundle / entry.file, wrong, CPU)


def test_onnx_runtime_itself_prints_no_names_of_the_file(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    vectors = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.INT64, [1]) for name in ("x", "at", "y")]
    beyond = onnx.helper.make_node("Gather", ["x", "at"], ["y"], name="a\x1b]0;name\x07")
    made = onnx.helper.make_model(onnx.helper.make_graph([beyond], "g", vectors[:2], vectors[2:]), ir_version=8)
    made.opset_import[0].version = 17
    onnx.save(made, tmp_path / "g.onnx")
    specs = [TensorSpec(name, "int64", [1]) for name in ("x", "at", "y")]
    stage = OnnxStage(tmp_path / "g.onnx", StageEntry("g.onnx", 0, "", "g", "onnx", "fp32", specs[:2], specs[2:]), CPU)
    with pytest.raises(MllmEdgeError, match="ONNX Runtime failed"):
        stage(x=np.array([1]), at=np.array([9]))
    assert capfd.readouterr() == ("", "")


def test_cuda_is_announced_or_refused(tiny_bundle: Path, entry: StageEntry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.warns(RuntimeWarning, match="run on the CPU"):
        stage = OnnxStage(tiny_bundle / entry.file, entry, replace(CPU, target="cuda"))
    assert stage.provider == "CPUExecutionProvider"
    with pytest.raises(MllmEdgeError, match="onnxruntime-gpu"):
        OnnxStage(tiny_bundle / entry.file, entry, replace(CPU, target="cuda", strict=True))
