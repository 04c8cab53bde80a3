import warnings

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from tiny_vit import FEATURES, PIXELS, SIZE, stage, tiny_vit
from torch import nn

from mllm_edge.bundle.manifest import TensorSpec
from mllm_edge.errors import BadInput, MllmEdgeError
from mllm_edge.export.onnx import lower as onnx_export
from mllm_edge.export.onnx.lower import export_stage


def feeds(count, scale=1.0, seed=0):
    rng = np.random.default_rng(seed)
    return [
        {"pixel_values": (scale * rng.standard_normal((1, 3, SIZE, SIZE))).astype(np.float32)} for _ in range(count)
    ]


def run(path, feed):
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, feed)[0]


def reference(module, feed):
    with torch.no_grad():
        return module(torch.from_numpy(feed["pixel_values"])).numpy()


def linear():
    """A stage that is quick to lower: [1,3,32,32] -> [1,3,4]."""
    return stage(nn.Sequential(nn.Flatten(2), nn.Linear(SIZE**2, 4)), outputs=[TensorSpec("y", "float32", [1, 3, 4])])


@pytest.fixture(scope="module")
def lowered(tmp_path_factory):
    """The tiny vision transformer in all three precisions: precision -> file, alone in its folder."""
    files = {}
    for precision in ("fp32", "fp16", "int8"):
        files[precision] = tmp_path_factory.mktemp(precision) / "vision_encoder.onnx"
        assert export_stage(stage(tiny_vit()), files[precision], precision, feeds(8)) == []
    return files


@pytest.mark.parametrize(("precision", "bound"), [("fp32", 1e-5), ("fp16", 5e-3), ("int8", 5e-2)])
def test_lowered_stage_agrees_with_torch(lowered, precision, bound):
    assert [file.name for file in lowered[precision].parent.iterdir()] == ["vision_encoder.onnx"]  # no scratch files
    for feed in feeds(2, seed=1):
        expected = reference(tiny_vit(), feed)
        assert np.abs(run(lowered[precision], feed) - expected).max() <= bound * np.abs(expected).max()


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_graph_says_what_it_is(lowered, precision):
    model = onnx.load(lowered[precision])
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert (metadata["stage"], metadata["precision"]) == ("vision_encoder", precision)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 18)]
    assert model.producer_name == "mllm-edge"
    ends = [*model.graph.input, *model.graph.output]
    assert {value.type.tensor_type.elem_type for value in ends} == {onnx.TensorProto.FLOAT}
    assert not any(node.metadata_props for node in model.graph.node)  # these would show the exporting machine's paths
    assert any(node.name.startswith("blocks.1.fc2/") for node in model.graph.node)


def test_smaller_precision_makes_smaller_files(lowered):
    size = {precision: file.stat().st_size for precision, file in lowered.items()}
    assert size["fp16"] < 0.6 * size["fp32"] and size["int8"] < 0.5 * size["fp32"]


def test_export_says_nothing(tmp_path, capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        export_stage(linear(), tmp_path / "a.onnx", "int8", feeds(2))
    assert capfd.readouterr() == ("", "")


def test_weights_over_the_limit_lie_beside_the_graph(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_export, "INLINE_LIMIT", 1000)
    module, feed = tiny_vit(), feeds(1)[0]
    for precision, bound in (("fp32", 1e-5), ("fp16", 5e-3), ("int8", 5e-2)):
        folder = tmp_path / precision
        folder.mkdir()
        data_files = export_stage(stage(module), folder / "a.onnx", precision, feeds(4))
        assert data_files == [folder / "a.onnx.data"]
        assert sorted(file.name for file in folder.iterdir()) == ["a.onnx", "a.onnx.data"]
        assert data_files[0].stat().st_size > (folder / "a.onnx").stat().st_size
        expected = reference(module, feed)
        assert np.abs(run(folder / "a.onnx", feed) - expected).max() <= bound * np.abs(expected).max()


def test_int8_scales_come_from_the_calibration_inputs(tmp_path):
    scales = []
    for number, spread in enumerate((1.0, 10.0)):
        path = tmp_path / f"{number}.onnx"
        export_stage(linear(), path, "int8", feeds(4, spread))
        weights = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}
        quantizer = next(node for node in onnx.load(path).graph.node if node.op_type == "QuantizeLinear")
        scales.append(float(weights[quantizer.input[1]]))
    assert scales[1] == pytest.approx(10 * scales[0], rel=1e-3)


def test_int8_leaves_attention_and_patch_embedding_in_float(lowered):
    graph = onnx.load(lowered["int8"]).graph
    makers = {output: node.op_type for node in graph.node for output in node.output}
    read = {
        kind: [makers.get(node.input[0]) for node in graph.node if node.op_type == kind]
        for kind in ("Conv", "Gemm", "MatMul")
    }
    assert read["Gemm"] == ["DequantizeLinear"] * 8  # four linear layers in each of two blocks
    assert len(read["MatMul"]) == 4 and "DequantizeLinear" not in read["MatMul"]
    assert read["Conv"] == [None]


def test_int8_without_calibration_is_refused(tmp_path):
    with pytest.raises(BadInput, match="calibrate"):
        export_stage(stage(tiny_vit()), tmp_path / "a.onnx", "int8", [])


def test_unknown_precision_is_refused(tmp_path):
    with pytest.raises(BadInput, match="fp32, fp16, int8"):
        export_stage(stage(tiny_vit()), tmp_path / "a.onnx", "bf16")


@pytest.mark.parametrize("length", [1, 2, 7])
def test_an_axis_that_may_vary(tmp_path, length):
    module = nn.Sequential(nn.Linear(8, 4), nn.GELU())
    rows, out = TensorSpec("rows", "float32", ["rows", 8]), TensorSpec("out", "float32", ["rows", 4])
    export_stage(stage(module, inputs=[rows], outputs=[out]), tmp_path / "a.onnx", "fp32")
    feed = {"rows": np.random.default_rng(0).standard_normal((length, 8)).astype(np.float32)}
    with torch.no_grad():
        expected = module(torch.from_numpy(feed["rows"])).numpy()
    np.testing.assert_allclose(run(tmp_path / "a.onnx", feed), expected, atol=1e-6)


def test_int8_leaves_stacked_matrices_in_float(tmp_path):
    """SAM's relative positions: a product with a table of matrices has no integer kernel."""

    class Stacked(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(8, 8)
            self.table = nn.Parameter(torch.randn(4, 8, 4))

        def forward(self, x):
            return self.linear(x).unsqueeze(2) @ self.table

    module = Stacked().eval()
    shapes = TensorSpec("x", "float32", [1, 4, 8]), TensorSpec("y", "float32", [1, 4, 1, 4])
    feed = {"x": np.random.default_rng(0).standard_normal((1, 4, 8)).astype(np.float32)}
    export_stage(stage(module, inputs=[shapes[0]], outputs=[shapes[1]]), tmp_path / "a.onnx", "int8", [feed])
    with torch.no_grad():
        expected = module(torch.from_numpy(feed["x"])).numpy()
    np.testing.assert_allclose(run(tmp_path / "a.onnx", feed), expected, atol=0.2)


def test_specs_that_do_not_fit_the_module_are_named(tmp_path):
    wrong = TensorSpec("image_features", "float32", [1, 17, 64])
    with pytest.raises(MllmEdgeError, match=r"\[1, 16, 64\] but the stage says image_features float32 \[1, 17, 64\]"):
        export_stage(stage(tiny_vit(), outputs=[wrong]), tmp_path / "a.onnx", "fp32")


def test_module_that_cannot_be_traced_gives_one_line(tmp_path):
    class Branching(nn.Module):
        def forward(self, pixel_values):
            return pixel_values if pixel_values.sum() > 0 else -pixel_values

    with pytest.raises(MllmEdgeError, match="vision_encoder cannot be lowered to ONNX") as caught:
        export_stage(stage(Branching(), outputs=[PIXELS]), tmp_path / "a.onnx", "fp32")
    assert "\n" not in str(caught.value)


def test_values_that_leave_fp16_keep_their_node_in_fp32(tmp_path):
    module = tiny_vit()
    with torch.no_grad():
        module.blocks[1].fc1.weight.mul_(1e5)  # activations of 1e5 and more; the product with fc2 is brought back
        module.blocks[1].fc2.weight.mul_(1e-5)
    path = tmp_path / "a.onnx"
    with pytest.warns(UserWarning, match=r"vision_encoder: kept in fp32, .* blocks\.1\.fc1/MatMul \(\d"):
        export_stage(stage(module), path, "fp16", feeds(2))
    expected = reference(module, feeds(1)[0])
    assert np.abs(run(path, feeds(1)[0]) - expected).max() <= 5e-3 * np.abs(expected).max()


def test_multiple_outputs_keep_their_order(tmp_path):
    class Two(nn.Module):
        def forward(self, pixel_values):
            return pixel_values + 1, pixel_values * 2

    outputs = [TensorSpec("plus", "float32", PIXELS.shape), TensorSpec("double", "float32", PIXELS.shape)]
    export_stage(stage(Two(), outputs=outputs), tmp_path / "a.onnx", "fp16", [])
    session = onnxruntime.InferenceSession(tmp_path / "a.onnx")
    feed = {"pixel_values": np.full(PIXELS.shape, 3, np.float32)}
    assert [float(value.flat[0]) for value in session.run(["plus", "double"], feed)] == [4, 6]
    assert FEATURES.name not in [value.name for value in session.get_outputs()]
