"""Weights of 8 or 4 bits multiplied as fp16 or fp32: `DequantizeLinear` before a product, as TensorRT wants it.

8 bits have a scale for each output, 4 bits one for each output and block of inputs; both are symmetric, because
TensorRT takes no zero points (TensorRT's guide, "Working with quantized types").
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

BLOCK = 64  # inputs that share a scale in 4 bits
OPSET = 21  # the first with blocks and 4 bits


def quantize_weights(model: onnx.ModelProto, bits: int) -> None:
    """Store the constant right sides of all products of matrices so; those whose inputs no block divides are left."""
    graph = model.graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    before: list[onnx.NodeProto] = []
    for name, tensor in weights.items():
        used = readers.get(name, [])
        is_right_side = used and all(node.op_type == "MatMul" and node.input[1] == name for node in used)
        if not is_right_side or len(tensor.dims) != 2 or (bits == 4 and tensor.dims[0] % BLOCK):
            continue
        values = numpy_helper.to_array(tensor)  # [K,N]
        codes, scales = coded(values, bits)
        how: dict[str, Any] = {"axis": 1} if bits == 8 else {"axis": 0, "block_size": BLOCK}
        graph.initializer.remove(tensor)
        graph.initializer.append(_stored(f"{name}_codes", codes, bits))
        graph.initializer.append(numpy_helper.from_array(scales, f"{name}_scales"))
        inputs = [f"{name}_codes", f"{name}_scales"]
        before.append(helper.make_node("DequantizeLinear", inputs, [name], name=f"{name}_dequantized", **how))
    nodes = [*before, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    for opset in model.opset_import:
        if opset.domain in ("", "ai.onnx"):
            opset.version = max(opset.version, OPSET)
    model.ir_version = max(model.ir_version, 10)


def coded(values: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes int8 [K,N] of weights [K,N] and their scales: [N], or of 4 bits [K / BLOCK,N]; none is 0 in their dtype,
    which TensorRT would refuse."""
    most = 2 ** (bits - 1) - 1
    blocks = values[None] if bits == 8 else values.reshape(-1, BLOCK, values.shape[1])  # [G,K/G,N]
    wide = blocks.astype(np.float32)
    scales = np.maximum(np.abs(wide).max(axis=1) / most, np.finfo(values.dtype).tiny).astype(values.dtype)  # [G,N]
    codes = np.clip(np.rint(wide / scales[:, None].astype(np.float32)), -most, most).astype(np.int8)
    codes = codes.reshape(values.shape)
    return codes, scales[0] if bits == 8 else scales


def _stored(name: str, codes: np.ndarray, bits: int) -> onnx.TensorProto:
    if bits == 8:
        return numpy_helper.from_array(codes, name)
    low, high = codes.reshape(-1)[::2] & 0xF, codes.reshape(-1)[1::2] & 0xF
    packed = (low | (high << 4)).astype(np.uint8).tobytes()
    return helper.make_tensor(name, TensorProto.INT4, codes.shape, packed, raw=True)
