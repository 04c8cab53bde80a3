"""int8 for ONNX stages: static, calibrated on real inputs, with ONNX Runtime's quantizer.

Linear layers and convolutions get int8 weights, one scale per output channel, and uint8 inputs, one scale per tensor.
Their outputs stay float, so norms, softmax, residual additions and the products inside attention (two activations, no
weight) are computed in float. The convolutions that read a graph input stay float too: a patch embedding is cheap and
everything after it inherits its error.

Chosen on a DINOv2-S with photos and drawings (relative error of the features, time on one core with VNNI; fp32 128 ms):
uint8 min/max 0.056, 51 ms; one weight scale per tensor 0.085; symmetric int8 0.090, 168 ms; 99.99th percentile 0.18,
because the few large values of a ViT carry meaning; 7-bit weights 0.066. The last is used: x86 processors without VNNI
add pairs of uint8 x int8 products in 16 bits, which 8-bit weights overflow, so the same file would give different
answers there.

TensorRT supports neither uint8 inputs nor int32 biases: for it inputs are symmetric int8, biases stay float, and
weights have all 8 bits.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import onnx
from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.calibrate import create_calibrator
from onnxruntime.quantization.shape_inference import quant_pre_process

from mllm_edge.errors import BadInput

QUANTIZED = ("Conv", "Gemm", "MatMul")


class _Reader:
    """A calibration data reader for ONNX Runtime."""

    def __init__(self, feeds: Iterable[dict[str, np.ndarray]]):
        self._feeds = iter(feeds)

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._feeds, None)


def quantize(
    source: Path,
    path: Path,
    calibration: Iterable[dict[str, np.ndarray]],
    external_data: bool,
    for_tensorrt: bool = False,
) -> list[Path]:
    """Write `source`, an fp32 ONNX file, to `path` in int8.

    Args:
        source: the fp32 graph; its nodes have unique names.
        path: the file to write.
        calibration: inputs by name; the scales of the activations cover what these produce.
        external_data: put the weights into `<path>.data`.
        for_tensorrt: use the form that TensorRT supports.

    Returns:
        The external data files that belong to `path`: none, or one.

    Raises:
        BadInput: no calibration inputs.
    """
    feeds = list(calibration)
    if not feeds:
        raise BadInput("int8 needs pictures to calibrate on and got none; use fp32 or fp16")
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        fused = Path(scratch) / "fused.onnx"
        _fuse_biases(source, fused, external_data)
        quantize_static(
            fused,
            path,
            _Reader(feeds),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=list(QUANTIZED),
            nodes_to_exclude=_float_nodes(onnx.load(str(fused), load_external_data=False).graph),
            per_channel=True,
            reduce_range=not for_tensorrt,
            activation_type=QuantType.QInt8 if for_tensorrt else QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod.MinMax,
            use_external_data_format=external_data,
            extra_options={
                "OpTypesToExcludeOutputQuantization": list(QUANTIZED),
                "ActivationSymmetric": for_tensorrt,
                "QuantizeBias": not for_tensorrt,
            },
        )
    _restore_metadata(path, onnx.load(str(source), load_external_data=False))
    return [path.with_name(path.name + ".data")] if external_data else []


def activation_peaks(path: Path, calibration: Iterable[dict[str, np.ndarray]]) -> dict[str, float]:
    """Largest absolute value of every float tensor of an fp32 ONNX file over the given inputs, by tensor name."""
    feeds = list(calibration)
    if not feeds:
        return {}
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        calibrator = create_calibrator(path, None, augmented_model_path=str(Path(scratch) / "augmented.onnx"))
        calibrator.collect_data(_Reader(feeds))
        ranges = calibrator.compute_data().data
        del calibrator  # its session memory-maps the file
    return {name: float(np.abs(tensor.range_value).max()) for name, tensor in ranges.items()}


def _float_nodes(graph: onnx.GraphProto) -> list[str]:
    """Names of products of two activations or with stacked matrices (SAM's relative positions), which have no integer
    kernel, and of convolutions that read a graph input."""
    inputs = {value.name for value in graph.input}
    ranks = {tensor.name: len(tensor.dims) for tensor in graph.initializer}

    def stays_float(node: onnx.NodeProto) -> bool:
        if node.input[1] not in ranks:
            return True
        return node.input[0] in inputs if node.op_type == "Conv" else ranks[node.input[1]] != 2

    return [node.name for node in graph.node if node.op_type in QUANTIZED and stays_float(node)]


def _fuse_biases(source: Path, path: Path, external_data: bool) -> None:
    """Fuse MatMul + Add into Gemm: ONNX Runtime has an integer kernel for a Gemm with quantized bias, but would run the
    pair in float."""
    quant_pre_process(
        source,
        path,
        skip_symbolic_shape=True,  # the shapes are static
        save_as_external_data=external_data,
        all_tensors_to_one_file=external_data,
    )


def _restore_metadata(path: Path, source: onnx.ModelProto) -> None:
    """Undo the quantizer's changes: it overwrites the source's producer and notes, and imports unused opsets."""
    model = onnx.load(str(path), load_external_data=False)
    model.producer_name, model.producer_version = source.producer_name, source.producer_version
    del model.metadata_props[:], model.opset_import[:]
    model.metadata_props.extend(source.metadata_props)
    model.opset_import.extend(source.opset_import)
    onnx.save(model, str(path))
