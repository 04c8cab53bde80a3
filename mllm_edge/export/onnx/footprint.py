"""Activation memory of a stage's graph: what it needs in addition to its weights."""

from __future__ import annotations

import math
from pathlib import Path

import onnx

FREE_AXIS = 8  # assumed length of a variable axis


def activation_bytes(path: Path) -> int:
    """Peak bytes of intermediate results alive at once when the graph's nodes run in order.

    A result lives from the node that produces it to the last one that reads it. Engines need less by fusing nodes and
    reusing memory in place, and more by rounding up.
    """
    model = onnx.shape_inference.infer_shapes(onnx.load(str(path), load_external_data=False))
    graph = model.graph
    values = {value.name: value for value in (*graph.input, *graph.value_info, *graph.output)}
    weights = {tensor.name for tensor in graph.initializer}
    last = {name: number for number, node in enumerate(graph.node) for name in node.input}
    last |= {value.name: len(graph.node) for value in graph.output}
    alive = {value.name: _bytes(value) for value in graph.input if value.name not in weights}
    most = sum(alive.values())
    for number, node in enumerate(graph.node):
        alive |= {name: _bytes(values[name]) for name in node.output if name in values}
        most = max(most, sum(alive.values()))
        for name in [name for name in alive if last.get(name, -1) <= number]:
            del alive[name]
    return most


def _bytes(value: onnx.ValueInfoProto) -> int:
    tensor = value.type.tensor_type
    if not tensor.elem_type:
        return 0
    sizes = [dim.dim_value if dim.HasField("dim_value") else FREE_AXIS for dim in tensor.shape.dim]
    return math.prod(sizes) * onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).itemsize
