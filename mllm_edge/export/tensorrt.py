"""TensorRT engines out of a stage's ONNX file, strongly typed: precision is the graph's, not a flag of the builder.

TensorRT-RTX builds ahead of time, on any x86 machine and without a GPU, for the compute capabilities that are named.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mllm_edge.bundle import TensorSpec
from mllm_edge.errors import BadInput, MissingPackage, MllmEdgeError

MODULE, PACKAGE, EXTRA = "tensorrt_rtx", "tensorrt-rtx", "rtx"
BOARDS = ("orin", "orin-nano", "thor")  # their engines are built on the board
FREE_AXIS = (1, 4, 16)  # least, usual and greatest length of an axis that may vary


def capabilities(devices: Sequence[str]) -> list[str]:
    """The compute capabilities among `--device`, for which engines are built here.

    Raises:
        BadInput: a name that is neither a board nor a capability that TensorRT-RTX builds for.
        MissingPackage: an engine is asked for and TensorRT-RTX is not installed.
    """
    wanted = [name for name in devices if name not in BOARDS]
    if wanted:
        known = {f"sm_{name[2:]}" for name in dir(load().ComputeCapability) if name.startswith("SM")}
        for name in wanted:
            if name not in known:
                raise BadInput(
                    f"{name!r} is no device that engines can be made for; use {', '.join(sorted(known))} (comma "
                    f"separated), or a board that builds its own: {', '.join(BOARDS)}"
                )
    return wanted


def load() -> Any:
    """The package's module. Raises MissingPackage with the line that installs it."""
    try:
        return importlib.import_module(MODULE)
    except ModuleNotFoundError:
        raise MissingPackage(PACKAGE, EXTRA) from None


def version() -> str:
    """The package's version."""
    return str(load().__version__)


def build(
    onnx: Path,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    gpus: Sequence[str],
    progress: Callable[[float], None] = lambda _: None,
) -> bytes:
    """A serialized engine of an ONNX file.

    Args:
        onnx: the file; weights beside it are found.
        inputs: what the graph must take. Axes that may vary get a profile (`FREE_AXIS`).
        outputs: what it must give.
        gpus: their compute capabilities, such as "sm_89".
        progress: told the share that is done.

    Raises:
        MllmEdgeError: the parser refuses a node (it is named), the network is not what the specs say, or the build
            fails (with TensorRT's own reason).
        MissingPackage: the package is not installed.
    """
    trt = load()
    reasons: list[str] = []
    logger = _logger(trt, reasons)
    builder = trt.Builder(logger)
    network = builder.create_network(_typed(trt))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(onnx)):
        raise MllmEdgeError(f"{onnx.stem}: TensorRT cannot read {_refused(parser)}; export it with --target cuda")
    _check("takes", onnx.stem, trt, [network.get_input(i) for i in range(network.num_inputs)], inputs)
    _check("gives", onnx.stem, trt, [network.get_output(i) for i in range(network.num_outputs)], outputs)
    config = builder.create_builder_config()
    config.num_compute_capabilities = len(gpus)
    for index, name in enumerate(gpus):
        config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{name.removeprefix('sm_')}"), index)
    _add_profile(builder, config, inputs)
    config.progress_monitor = _monitor(trt, progress)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        reason = reasons[-1] if reasons else "no reason given"
        raise MllmEdgeError(f"{onnx.stem}: TensorRT could not build it ({reason}); see --debug")
    return bytes(engine)


def _typed(trt: Any) -> int:
    """The flag for a strongly typed network, where there are others (TensorRT 10)."""
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def _logger(trt: Any, reasons: list[str]) -> Any:
    class Reasons(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                reasons.append(" ".join(message.split()))

    return Reasons()


def _monitor(trt: Any, progress: Callable[[float], None]) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        """Tells of the outermost phase; TensorRT nests others in it."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}
            self.outer = ""

        def phase_start(self, name: str, parent: str | None, count: int) -> None:
            self.steps[name] = count
            if parent is None:
                self.outer = name

        def step_complete(self, name: str, step: int) -> bool:
            if name == self.outer and self.steps.get(name):
                progress(min(1.0, (step + 1) / self.steps[name]))
            return True

        def phase_finish(self, name: str) -> None:
            self.steps.pop(name, None)

    return Monitor()


def _refused(parser: Any) -> str:
    """The first node that the parser refuses, and why."""
    error = parser.get_error(0)
    where = error.node_name() or f"node {error.node()}"
    return f"{where} ({error.node_operator() or 'operator'}: {' '.join(error.desc().split())})"


def _check(verb: str, stage: str, trt: Any, tensors: Sequence[Any], specs: Sequence[TensorSpec]) -> None:
    found = [(t.name, np.dtype(trt.nptype(t.dtype)).name, [None if d < 0 else d for d in t.shape]) for t in tensors]
    wanted = [(s.name, s.dtype, [None if isinstance(d, str) else d for d in s.shape]) for s in specs]
    if found != wanted:
        raise MllmEdgeError(f"{stage}: TensorRT's network {verb} {found}, the manifest says {wanted}; report this")


def _add_profile(builder: Any, config: Any, inputs: Sequence[TensorSpec]) -> None:
    if not any(isinstance(size, str) for spec in inputs for size in spec.shape):
        return
    profile = builder.create_optimization_profile()
    for spec in inputs:
        if any(isinstance(size, str) for size in spec.shape):
            shapes = [tuple(length if isinstance(size, str) else size for size in spec.shape) for length in FREE_AXIS]
            profile.set_shape(spec.name, *shapes)
    config.add_optimization_profile(profile)
