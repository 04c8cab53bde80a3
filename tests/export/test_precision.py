import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from mllm_edge.errors import MllmEdgeError
from mllm_edge.export.onnx.fp16 import LARGEST, to_float16

FLOAT, HALF = TensorProto.FLOAT, TensorProto.FLOAT16


def graph(nodes, inputs, outputs, **weights):
    """An ir.Model from onnx.helper pieces; every tensor is float32 [2,2]."""
    made = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(name, FLOAT, [2, 2]) for name in inputs],
        [helper.make_tensor_value_info(name, FLOAT, [2, 2]) for name in outputs],
        [numpy_helper.from_array(np.asarray(value, np.float32), name) for name, value in weights.items()],
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    return ir.from_proto(onnx.shape_inference.infer_shapes(model))


def cast(model, peaks=None):
    """The model in fp16 as a checked proto, the element type of every tensor, and the nodes that were kept."""
    kept = to_float16(model, peaks or {})
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    typed = onnx.shape_inference.infer_shapes(proto, strict_mode=True).graph
    types = {value.name: value.type.tensor_type.elem_type for value in (*typed.value_info, *typed.input, *typed.output)}
    types.update({tensor.name: tensor.data_type for tensor in typed.initializer})
    return proto, types, kept


def ops(proto):
    return [node.op_type for node in proto.graph.node]


def run(proto, **feed):
    return onnxruntime.InferenceSession(proto.SerializeToString()).run(None, feed)[0]


EYE = np.eye(2, dtype=np.float32)


def test_norms_and_softmax_read_and_write_fp32_and_matmul_fp16():
    nodes = [
        helper.make_node("LayerNormalization", ["x", "scale"], ["normed"], name="norm"),
        helper.make_node("MatMul", ["normed", "w"], ["scores"], name="mm"),
        helper.make_node("Softmax", ["scores"], ["weights"], name="softmax"),
        helper.make_node("MatMul", ["weights", "w"], ["y"], name="mm2"),
    ]
    proto, types, kept = cast(graph(nodes, ["x"], ["y"], scale=[1, 1], w=EYE))
    assert kept == {}
    for node in proto.graph.node:
        kinds = {types[name] for name in (*node.input, *node.output)}
        if node.op_type == "MatMul":
            assert kinds == {HALF}
        elif node.op_type in ("LayerNormalization", "Softmax"):
            assert kinds == {FLOAT}
    # x and the norm are fp32; one cast goes into each product and one out of it
    assert ops(proto) == ["LayerNormalization", "Cast", "MatMul", "Cast", "Softmax", "Cast", "MatMul", "Cast"]
    assert types["w.fp16"] == HALF and "w" not in types
    x = np.array([[1, 2], [3, 5]], np.float32)
    # a norm over two values is -1, 1; softmax of that is 1/(1+e^2), e^2/(1+e^2)
    np.testing.assert_allclose(run(proto, x=x), [[0.1192, 0.8808]] * 2, atol=1e-3)


def test_one_cast_serves_all_readers_and_no_cast_reads_a_cast():
    nodes = [
        helper.make_node("Erf", ["x"], ["e"], name="erf"),
        helper.make_node("MatMul", ["e", "w"], ["a"], name="a"),
        helper.make_node("MatMul", ["e", "w"], ["b"], name="b"),
        helper.make_node("Add", ["a", "b"], ["sum"], name="sum"),
        helper.make_node("Exp", ["sum"], ["p"], name="p"),
        helper.make_node("Exp", ["sum"], ["q"], name="q"),
        helper.make_node("Sub", ["p", "q"], ["y"], name="y"),
    ]
    proto, types, _ = cast(graph(nodes, ["x"], ["y"], w=EYE))
    assert ops(proto).count("Cast") == 2
    made_by_cast = {node.output[0] for node in proto.graph.node if node.op_type == "Cast"}
    assert not any(node.op_type == "Cast" and node.input[0] in made_by_cast for node in proto.graph.node)
    assert types["y"] == FLOAT  # Sub reads fp32 only, so it stays there


def test_arithmetic_between_fp32_operations_stays_fp32():
    """RMS norm as exporters spell it: eps must not be rounded to fp16."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], name="h"),
        helper.make_node("Pow", ["h", "two"], ["square"], name="square"),
        helper.make_node("ReduceMean", ["square"], ["mean"], name="mean", noop_with_empty_axes=1),
        helper.make_node("Add", ["mean", "eps"], ["shifted"], name="shifted"),
        helper.make_node("Sqrt", ["shifted"], ["root"], name="root"),
        helper.make_node("Div", ["h", "root"], ["y"], name="y"),
    ]
    proto, types, _ = cast(graph(nodes, ["x"], ["y"], w=EYE, two=2.0, eps=1e-9))
    assert {types[name] for name in ("square", "mean", "shifted", "root", "eps")} == {FLOAT}
    assert types["h"] == HALF
    np.testing.assert_allclose(run(proto, x=3 * EYE + 1), np.ones((2, 2)), atol=2e-3)


def test_output_that_is_also_read_inside_keeps_its_name_and_type():
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], name="h"),
        helper.make_node("Softmax", ["h"], ["y"], name="y"),
    ]
    proto, types, _ = cast(graph(nodes, ["x"], ["h", "y"], w=EYE))
    assert [value.name for value in proto.graph.output] == ["h", "y"]
    assert types["h"] == types["y"] == FLOAT and types["h.fp16"] == HALF
    assert ops(proto) == ["Cast", "MatMul", "Cast", "Softmax"]


def test_integers_are_left_alone():
    nodes = [
        helper.make_node("Shape", ["x"], ["shape"], name="shape"),
        helper.make_node("Relu", ["x"], ["r"], name="r"),
        helper.make_node("MatMul", ["r", "w"], ["h"], name="h"),
        helper.make_node("Reshape", ["h", "shape"], ["y"], name="y"),
    ]
    proto, types, _ = cast(graph(nodes, ["x"], ["y"], w=EYE))
    assert types["shape"] == TensorProto.INT64
    assert types["r"] == FLOAT  # it reads fp32 only
    np.testing.assert_array_equal(run(proto, x=EYE - 2), 0 * EYE)


def test_weight_that_overflows_is_named_and_stays():
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], name="big"),
        helper.make_node("MatMul", ["h", "v"], ["y"], name="small"),
    ]
    _, types, kept = cast(graph(nodes, ["x"], ["y"], w=1e6 * EYE, v=1e-6 * EYE), {"h": 10.0})
    assert kept == {"big": 1e6}
    assert types["w"] == FLOAT and types["v.fp16"] == HALF


def test_activation_that_overflows_keeps_both_of_its_ends_in_fp32():
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"], name="before"),
        helper.make_node("MatMul", ["a", "w"], ["b"], name="makes"),
        helper.make_node("MatMul", ["b", "w"], ["c"], name="reads"),
        helper.make_node("MatMul", ["c", "w"], ["y"], name="after"),
    ]
    _, types, kept = cast(graph(nodes, ["x"], ["y"], w=EYE), {"a": LARGEST, "b": 1e5, "c": 3.0})
    assert kept == {"makes": 1e5, "reads": 1e5}
    assert types["a"] == HALF and types["b"] == types["c"] == FLOAT


def test_named_modules_stay_in_fp32():
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], name="stem.conv/MatMul"),
        helper.make_node("MatMul", ["h", "w"], ["y"], name="head/MatMul"),
    ]
    model = graph(nodes, ["x"], ["y"], w=EYE)
    kept = to_float16(model, {}, float32=("stem.",))
    types = {node.name: node.inputs[1].dtype for node in model.graph if node.op_type == "MatMul"}
    assert types == {"stem.conv/MatMul": ir.DataType.FLOAT, "head/MatMul": ir.DataType.FLOAT16}
    assert kept == {}  # nothing overflows, so nothing is announced


def test_infinite_constants_are_no_overflow():
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], name="h"),
        helper.make_node("Add", ["h", "mask"], ["y"], name="mask"),
    ]
    proto, _, kept = cast(graph(nodes, ["x"], ["y"], w=EYE, mask=[[0, -np.inf], [0, 0]]))
    assert kept == {}
    np.testing.assert_array_equal(run(proto, x=EYE), [[1, -np.inf], [0, 1]])


def test_control_flow_is_refused():
    body = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["z"])], "then", [], [helper.make_tensor_value_info("z", FLOAT, [2, 2])]
    )
    nodes = [
        helper.make_node("ReduceMax", ["x"], ["top"], keepdims=0),
        helper.make_node("Cast", ["top"], ["yes"], to=TensorProto.BOOL),
        helper.make_node("If", ["yes"], ["y"], name="branch", then_branch=body, else_branch=body),
    ]
    with pytest.raises(MllmEdgeError, match="branch is control flow"):
        to_float16(graph(nodes, ["x"], ["y"]), {})


def test_value_without_a_type_is_refused():
    nodes = [helper.make_node("Relu", ["x"], ["h"], name="relu"), helper.make_node("Relu", ["h"], ["y"], name="last")]
    model = graph(nodes, ["x"], ["y"])
    model.graph[0].outputs[0].type = None
    with pytest.raises(MllmEdgeError, match="relu gives a value whose type is not known"):
        to_float16(model, {})
