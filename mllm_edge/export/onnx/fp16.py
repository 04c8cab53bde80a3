"""Casts an fp32 ONNX graph to fp16, with the sensitive operations left in fp32.

The result is strongly typed: every precision is written in the graph, as TensorRT 11 requires. There are three kinds of
operations. `COMPUTE` runs in fp16: its weights are stored in fp16 and every backend accumulates in fp32. `FOLLOW` (data
movement and cheap arithmetic) runs in fp16 unless all its inputs were computed in fp32. All others (norms, softmax,
reductions, powers, exponentials and unknown ones) stay in fp32. Each tensor has one precision and at most one cast to
the other, so there are no chains of casts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import onnx_ir as ir

from mllm_edge.errors import MllmEdgeError

COMPUTE = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
FOLLOW = frozenset(
    {"Abs", "Add", "Clip", "Concat", "DepthToSpace", "Div", "Expand", "Flatten", "Gather", "Identity", "LeakyRelu"}
    | {"Max", "Min", "Mul", "Neg", "Pad", "Relu", "Reshape", "Sigmoid", "Slice", "SpaceToDepth", "Split", "Squeeze"}
    | {"Sub", "Tanh", "Tile", "Transpose", "Unsqueeze", "Where"}
)
CONTROL_FLOW = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
# Half of fp16's largest number: only few pictures were measured, and users' pictures differ.
LARGEST = float(np.finfo(np.float16).max) / 2


def to_float16(
    model: ir.Model, peaks: Mapping[str, float], float32: tuple[str, ...] = (), products_only: bool = False
) -> dict[str, float]:
    """Cast `model` to fp16 in place; graph inputs and outputs keep their names and stay float32.

    Args:
        model: an fp32 graph with typed values and without subgraphs.
        peaks: largest absolute value seen in a tensor, by name. Other tensors are assumed to be in range.
        float32: name prefixes of nodes that stay in fp32.
        products_only: no operation follows its inputs; only those of `COMPUTE` run in fp16.

    Returns:
        The nodes kept in fp32 because one of their values or weights exceeds `LARGEST`: node name -> largest absolute
        value.

    Raises:
        MllmEdgeError: the graph has control flow or a value without a type.
    """
    half, kept = _choose(model.graph, peaks, float32, frozenset() if products_only else FOLLOW)
    _Caster(model.graph, half).rewrite()
    return kept


def _choose(
    graph: ir.Graph, peaks: Mapping[str, float], float32: tuple[str, ...], follow: frozenset[str]
) -> tuple[set[ir.Node], dict[str, float]]:
    """The nodes that run in fp16, and those that their values' range keeps in fp32."""
    half: set[ir.Node] = set()
    kept: dict[str, float] = {}
    constants = {name: _peak(value) for name, value in graph.initializers.items() if _is_float(value)}
    for node in graph:
        if any(attribute.type in CONTROL_FLOW for attribute in node.attributes.values()):
            raise MllmEdgeError(f"{node.name} is control flow, which fp16 does not cover; export the stage in fp32")
        if any(value.name and value.dtype is None for value in node.outputs):
            raise MllmEdgeError(f"{node.name} gives a value whose type is not known; infer the graph's shapes first")
        read, written = _floats(node.inputs), _floats(node.outputs)
        makers = [value.producer() for value in read if not value.is_initializer()]
        from_half = not makers or any(maker in half for maker in makers)
        if not written or not (node.op_type in COMPUTE or (node.op_type in follow and from_half)):
            continue
        if (node.name or "").startswith(float32):
            continue
        names = [value.name or "" for value in (*read, *written)]
        peak = max(constants.get(name, peaks.get(name, 0.0)) for name in names)
        if peak > LARGEST:
            kept[node.name or node.op_type] = peak
        else:
            half.add(node)
    return half, kept


class _Caster:
    """Sets each tensor's precision and casts each node's inputs to the node's own."""

    def __init__(self, graph: ir.Graph, half: set[ir.Node]):
        self._graph = graph
        self._half = half
        self._other: dict[ir.Value, ir.Value] = {}  # tensor -> its cast to the other precision

    def rewrite(self) -> None:
        nodes = list(self._graph)
        for node in nodes:
            for index, value in enumerate(node.inputs):
                if value is not None and value.dtype in (ir.DataType.FLOAT, ir.DataType.FLOAT16):
                    node.replace_input_with(index, self._read(value, node in self._half))
            if node in self._half:
                for value in _floats(node.outputs):
                    value.dtype = ir.DataType.FLOAT16
        self._restore_outputs()
        for name in [name for name, value in self._graph.initializers.items() if not value.uses()]:
            del self._graph.initializers[name]

    def _read(self, value: ir.Value, in_half: bool) -> ir.Value:
        if (value.dtype == ir.DataType.FLOAT16) == in_half:
            return value
        if value not in self._other:
            self._other[value] = self._shrink(value) if value.is_initializer() else self._cast(value, in_half)
        return self._other[value]

    def _shrink(self, value: ir.Value) -> ir.Value:
        array = _array(value).astype(np.float16)
        name = f"{value.name}.fp16"
        small = ir.Value(
            name=name,
            type=ir.TensorType(ir.DataType.FLOAT16),
            shape=value.shape,
            const_value=ir.tensor(array, name=name),
        )
        self._graph.register_initializer(small)
        return small

    def _cast(self, value: ir.Value, to_half: bool) -> ir.Value:
        dtype = ir.DataType.FLOAT16 if to_half else ir.DataType.FLOAT
        name = f"{value.name}.{'fp16' if to_half else 'fp32'}"
        node = ir.node("Cast", [value], {"to": dtype.value}, name=f"{name}/Cast")
        cast = node.outputs[0]
        cast.name, cast.type, cast.shape = name, ir.TensorType(dtype), value.shape
        producer = value.producer()
        if producer is None:
            self._graph.insert_before(self._graph[0], node)
        else:
            self._graph.insert_after(producer, node)
        return cast

    def _restore_outputs(self) -> None:
        for index, value in enumerate(self._graph.outputs):
            if value.dtype == ir.DataType.FLOAT16:
                result = self._read(value, in_half=False)
                value.name, result.name = f"{value.name}.fp16", value.name
                self._graph.outputs[index] = result


def _is_float(value: ir.Value) -> bool:
    return value.dtype == ir.DataType.FLOAT


def _floats(values: Iterable[ir.Value | None]) -> list[ir.Value]:
    """The fp32 tensors among a node's inputs (optional ones may be absent) or outputs."""
    return [value for value in values if value is not None and _is_float(value)]


def _array(value: ir.Value) -> np.ndarray:
    assert value.const_value is not None, f"{value.name} is an initializer without a value"
    return value.const_value.numpy()


def _peak(value: ir.Value) -> float:
    """Largest absolute finite value; infinities are representable in fp16 too."""
    array = _array(value)
    finite = np.abs(array[np.isfinite(array)])
    return float(finite.max()) if finite.size else 0.0
