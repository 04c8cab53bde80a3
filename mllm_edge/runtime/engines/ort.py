"""ONNX Runtime as a stage engine: on the CPU, with CUDA, or through its TensorRT-RTX provider."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mllm_edge.bundle.manifest import StageEntry, TensorSpec
from mllm_edge.errors import BadInput, MissingPackage, MllmEdgeError, first_line
from mllm_edge.runtime.engines.interface import Array, Options, check_arrays
from mllm_edge.runtime.engines.onnx_graph import check_graph_file
from mllm_edge.targets import TARGETS

if TYPE_CHECKING:
    import onnxruntime  # type: ignore[import-untyped]

_DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
    "tensor(uint8)": "uint8",
    "tensor(bool)": "bool",
}


class OnnxStage:
    """A stage run by ONNX Runtime.

    Raises:
        BadInput: ONNX Runtime cannot read the file, it reads files that are not its own, or it is not the graph that
            the manifest describes.
        MllmEdgeError: the CUDA provider was requested and is not available.
        MissingPackage: onnxruntime is not installed.
    """

    def __init__(self, path: Path, spec: StageEntry, options: Options):
        self.spec = spec
        self.failures = _failures()
        check_graph_file(path, spec)
        self._session: onnxruntime.InferenceSession | None = _open(path, options, self.failures)
        _check_graph(path, "takes", self._session.get_inputs(), spec.inputs)
        _check_graph(path, "gives", self._session.get_outputs(), spec.outputs)

    def __call__(self, **arrays: Array) -> dict[str, Array]:
        """Run the graph. Raises MllmEdgeError when an array does not fit the spec, or after `close`."""
        session = self.session
        check_arrays(self.spec.name, self.spec.inputs, arrays)
        names = [output.name for output in self.spec.outputs]
        inputs = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        try:
            return dict(zip(names, session.run(names, inputs)))
        except self.failures as error:
            raise MllmEdgeError(f"stage {self.spec.name}: ONNX Runtime failed ({first_line(error)})") from error

    @property
    def session(self) -> onnxruntime.InferenceSession:
        """ONNX Runtime's own. Raises MllmEdgeError after `close`."""
        if self._session is None:
            raise MllmEdgeError(f"stage {self.spec.name} is closed; load the bundle again")
        return self._session

    @property
    def provider(self) -> str:
        """The execution provider in use."""
        return str(self._session.get_providers()[0]) if self._session else ""

    def close(self) -> None:
        """Free the session."""
        self._session = None


class Binding:
    """A stage whose inputs and outputs are bound to arrays: a run reads and fills them where they are."""

    def __init__(self, stage: OnnxStage):
        self._stage = stage
        self._arrays: list[Array] = []  # kept alive
        self._io: onnxruntime.IOBinding | None = None

    def bind(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> None:
        """Take these arrays from now on. Raises MllmEdgeError when they do not fit the spec, or the stage is closed."""
        spec, session = self._stage.spec, self._stage.session
        check_arrays(spec.name, spec.inputs, inputs)
        check_arrays(spec.name, spec.outputs, outputs)
        self._arrays = [*inputs.values(), *outputs.values()]
        if not all(array.flags.c_contiguous for array in self._arrays):
            raise MllmEdgeError(f"stage {spec.name} can only be bound to contiguous arrays")
        self._io = session.io_binding()
        for given, bind in ((inputs, self._io.bind_input), (outputs, self._io.bind_output)):
            for name, array in given.items():
                bind(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)

    def run(self) -> None:
        """Compute the outputs. Raises MllmEdgeError when ONNX Runtime fails, or the stage is closed."""
        try:
            self._stage.session.run_with_iobinding(self._io)
        except self._stage.failures as error:
            raise MllmEdgeError(f"stage {self._stage.spec.name}: ONNX Runtime failed ({first_line(error)})") from error

    def close(self) -> None:
        """Let go of the arrays."""
        self._io, self._arrays = None, []


def _failures() -> tuple[type[Exception], ...]:
    """The exceptions of ONNX Runtime, which have no common base class."""
    try:
        from onnxruntime.capi import onnxruntime_pybind11_state as state  # type: ignore[import-untyped]
    except ModuleNotFoundError:
        raise MissingPackage("onnxruntime", "runtime") from None
    names = ["EPFail", "Fail", "InvalidArgument", "InvalidGraph", "InvalidProtobuf", "NoSuchFile", "NotImplemented"]
    # UnicodeDecodeError: a message that quotes a graph's name which is no text.
    return (*(getattr(state, name) for name in [*names, "RuntimeException"]), RuntimeError, UnicodeDecodeError)


def _open(path: Path, options: Options, failures: tuple[type[Exception], ...]) -> onnxruntime.InferenceSession:
    import onnxruntime as ort

    settings = ort.SessionOptions()
    settings.intra_op_num_threads = options.threads
    settings.inter_op_num_threads = 1
    settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    # Nothing: its own lines on stderr hold names of the file as they are, and errors come as exceptions anyway.
    settings.log_severity_level = 4
    # Whatever the file is called: of its own format, which a name ending in .ort chooses, nothing was checked.
    settings.add_session_config_entry("session.load_model_format", "ONNX")
    # Spinning idle threads would take the cores from the language model, which runs next.
    settings.add_session_config_entry("session.force_spinning_stop", "1")
    if options.lean:
        settings.enable_cpu_mem_arena = False
        settings.add_session_config_entry("session.disable_prepacking", "1")
    providers = _providers(options, ort.get_available_providers())
    try:
        # With the CPU alone there is nothing to fall back to, and ONNX Runtime would print that it tries again.
        session = ort.InferenceSession(str(path), settings, providers=providers, enable_fallback=len(providers) > 1)
    except failures as error:
        raise BadInput(f"{path}: ONNX Runtime cannot load it ({first_line(error)}); export it again") from None
    if providers[0] != session.get_providers()[0]:
        needs = TARGETS[options.target].needs
        _on_the_cpu(options, f"ONNX Runtime could not start its {providers[0]} ({needs})")
    return session


def _providers(options: Options, available: list[str]) -> list[str]:
    target, cpu = TARGETS[options.target], TARGETS["cpu"].provider
    if not target.gpu:
        return [cpu]
    if target.provider in available:
        return [target.provider, cpu]
    _on_the_cpu(options, f"this onnxruntime has no {target.provider} (pip install {target.package})")
    return [cpu]


def _on_the_cpu(options: Options, why: str) -> None:
    if options.strict:
        raise MllmEdgeError(f"{why}; install it, or use target cpu")
    warnings.warn(f"{why}; the bundle's stages run on the CPU", RuntimeWarning, stacklevel=2)


def _check_graph(path: Path, verb: str, nodes: list[Any], specs: list[TensorSpec]) -> None:
    try:
        graph = {node.name: (_DTYPES.get(node.type, node.type), node.shape) for node in nodes}
    except UnicodeDecodeError:
        raise BadInput(f"{path} has a name that is no text; export it again") from None
    for spec in specs:
        dtype, shape = graph.get(spec.name, ("nothing", []))
        fixed = [(a, b) for a, b in zip(shape, spec.shape) if isinstance(a, int) and isinstance(b, int)]
        if dtype != spec.dtype or len(shape) != len(spec.shape) or any(a != b for a, b in fixed):
            raise BadInput(
                f"{path} {verb} {spec.name} as {dtype} {shape}, but the manifest says {spec.dtype} {spec.shape}; "
                "export the bundle again"
            )
    if len(graph) != len(specs):
        raise BadInput(f"{path} {verb} {', '.join(graph)}, which is not what the manifest says; export it again")
