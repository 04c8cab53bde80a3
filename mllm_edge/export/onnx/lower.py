"""Lowers a stage to ONNX: opset 18, static shapes, precision in the graph."""

from __future__ import annotations

import ast
import contextlib
import inspect
import logging
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnx_ir.passes.common import ClearMetadataAndDocStringPass

from mllm_edge.bundle.manifest import TensorSpec
from mllm_edge.errors import MllmEdgeError, first_line, look_up
from mllm_edge.export.onnx.fp16 import to_float16
from mllm_edge.export.onnx.int8 import activation_peaks, quantize
from mllm_edge.quants import PRECISIONS
from mllm_edge.version import __version__

if TYPE_CHECKING:
    from mllm_edge.models.plan import StageExport

OPSET = 18
INLINE_LIMIT = 200_000_000  # bytes of weights; more go beside the graph, written one by one and mapped when read

Feed = dict[str, np.ndarray]


def export_stage(
    stage: StageExport, path: Path, precision: str, calibration: Iterable[Feed] = (), for_tensorrt: bool = False
) -> list[Path]:
    """Write a stage as a checked ONNX file with exactly the stage's inputs and outputs.

    Inputs and outputs stay float32 at every precision. Weights above 200 MB go into `<path>.data` beside the file.

    Args:
        stage: what to lower; its module is built, traced and released here.
        path: the file to write; an existing one is replaced.
        precision: "fp32", "fp16" (norms, softmax and reductions in fp32) or "int8" (weights and inputs of the linear
            layers and convolutions).
        calibration: typical inputs by name. int8 derives its scales from them; fp16 keeps nodes whose values exceed its
            range in fp32, with a warning.
        for_tensorrt: int8 in TensorRT's form, which is slow in ONNX Runtime on a CPU.

    Returns:
        The external data files that belong to `path`: none, or one.

    Raises:
        BadInput: unknown precision, or int8 without calibration inputs.
        MllmEdgeError: the exporter refuses the module, or the graph does not match the stage's specs.
    """
    look_up("precision", precision, PRECISIONS)
    model = lower(stage)
    model.metadata_props.update(stage=stage.name, precision=precision, mllm_edge=__version__)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as scratch:
        plain = path if precision == "fp32" else Path(scratch) / "fp32.onnx"
        data_files = save_graph(model, plain)
        if precision == "fp16":
            _announce(stage.name, to_float16(model, activation_peaks(plain, calibration), stage.float32))
            data_files = save_graph(model, path)
        elif precision == "int8":
            del model
            data_files = quantize(plain, path, calibration, bool(data_files), for_tensorrt)
    check_graph(path, stage)
    return data_files


def lower(stage: StageExport) -> ir.Model:
    """Trace a stage into an fp32 graph whose nodes are named after their modules.

    Raises:
        MllmEdgeError: the exporter refuses the module.
    """
    module = stage.module().eval()
    inputs = tuple(_example(spec) for spec in stage.inputs)
    free = tuple({at: axis for at, axis in enumerate(spec.shape) if isinstance(axis, str)} for spec in stage.inputs)
    with _quiet(), torch.no_grad():
        try:
            program = torch.onnx.export(
                module,
                inputs,
                dynamo=True,
                opset_version=OPSET,
                input_names=[spec.name for spec in stage.inputs],
                output_names=[spec.name for spec in stage.outputs],
                dynamic_shapes=_nested(module, free) if any(free) else None,
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            reason = next(
                (line.strip() for line in reversed(str(error).splitlines()) if line.strip()), "no reason given"
            )
            raise MllmEdgeError(f"{stage.name} cannot be lowered to ONNX ({reason}); see --debug") from error
    if program is None:
        raise MllmEdgeError(f"{stage.name}: torch.onnx.export gave no graph; check the version of torch")
    model = program.model
    _name_nodes(model.graph)
    ClearMetadataAndDocStringPass()(model)  # stack traces would carry the paths of this machine
    model.producer_name, model.producer_version = "mllm-edge", __version__
    return model


def _nested(module: torch.nn.Module, free: tuple[dict[int, str], ...]) -> tuple[Any, ...]:
    """The free axes of each input in the structure of the module's parameters: those of `*others` are one tuple."""
    kinds = [parameter.kind for parameter in inspect.signature(module.forward).parameters.values()]
    if inspect.Parameter.VAR_POSITIONAL not in kinds:
        return free
    first = kinds.index(inspect.Parameter.VAR_POSITIONAL)
    return (*free[:first], free[first:])


def check_graph(path: Path, stage: StageExport) -> None:
    """Check that an ONNX file is valid and that its names, dtypes and shapes are those of the stage.

    Raises:
        MllmEdgeError: names the first thing that differs.
    """
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise MllmEdgeError(f"{path.name} is not valid ONNX ({first_line(error)}); report this") from error
    graph = onnx.load(str(path), load_external_data=False).graph
    for kind, values, specs in (("input", graph.input, stage.inputs), ("output", graph.output, stage.outputs)):
        found = [_spec(value) for value in values]
        if found != list(specs):
            raise MllmEdgeError(
                f"{stage.name}: the graph's {kind}s are {_describe(found)} but the stage says {_describe(specs)}; "
                "correct the stage's specs or its module"
            )


def _example(spec: TensorSpec) -> torch.Tensor:
    shape = [size if isinstance(size, int) else 3 for size in spec.shape]  # torch.export would treat 0 and 1 as fixed
    return torch.zeros(shape, dtype=getattr(torch, spec.dtype))


def _name_nodes(graph: ir.Graph) -> None:
    """`blocks.0.mlp.fc1/MatMul` instead of `node_MatMul_81`: errors, profiles and calibration then name modules."""
    taken: set[str] = set()
    for node in graph:
        scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))
        module = next((scope for scope in reversed(scopes[:-1]) if scope), "")
        base = f"{module}/{node.op_type}" if module else node.op_type
        name, number = base, 1
        while name in taken:
            number += 1
            name = f"{base}_{number}"
        taken.add(name)
        node.name = name


def save_graph(model: ir.Model, path: Path) -> list[Path]:
    """Write a graph; weights above 200 MB go beside it, into a file that is returned."""
    weights = sum(
        value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None
    )
    if weights <= INLINE_LIMIT:
        ir.save(model, path)
        return []
    data = path.with_name(path.name + ".data")
    ir.save(model, path, external_data=data.name)
    return [data]


def _announce(stage: str, kept: dict[str, float]) -> None:
    if kept:
        named = ", ".join(f"{node} ({peak:.3g})" for node, peak in kept.items())
        warnings.warn(f"{stage}: kept in fp32, their values leave the range of fp16: {named}", stacklevel=3)


def _spec(value: onnx.ValueInfoProto) -> TensorSpec:
    tensor = value.type.tensor_type
    shape = [dim.dim_value if dim.HasField("dim_value") else dim.dim_param for dim in tensor.shape.dim]
    return TensorSpec(value.name, str(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)), shape)


def _describe(specs: Iterable[TensorSpec]) -> str:
    return ", ".join(f"{spec.name} {spec.dtype} {spec.shape}" for spec in specs)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide the exporter's warnings about missing torchvision and its own deprecations."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
