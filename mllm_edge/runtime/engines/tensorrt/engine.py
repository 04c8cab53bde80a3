"""An engine on a GPU: read, checked against the manifest, and run on addresses."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mllm_edge.bundle.manifest import BuiltEngine, StageEntry
from mllm_edge.errors import MllmEdgeError
from mllm_edge.runtime.engines.tensorrt import packages
from mllm_edge.runtime.engines.tensorrt.cuda import Cuda


class Engine:
    """One engine and its context.

    Args:
        path: its file.
        spec: the stage that it was built from.
        built: what the manifest says of it.
        cuda: the GPU.
        beside: bytes of device memory that its tensors will take.

    Raises:
        MllmEdgeError: the engine cannot be read or does not match the manifest, or the GPU has too little memory.
    """

    def __init__(self, path: Path, spec: StageEntry, built: BuiltEngine, cuda: Cuda, beside: int):
        self._name, self._cuda = spec.name, cuda
        trt = packages.package_named(built.package).load()
        self._reasons: list[str] = []
        self._require(built.bytes, "its weights")
        self._runtime = trt.Runtime(logger(trt, self._reasons))
        self._engine: Any = self._runtime.deserialize_cuda_engine(path.read_bytes())
        if self._engine is None:
            raise MllmEdgeError(f"{path}: TensorRT cannot read it ({self._why()}); run: mllm-edge build {path.parent}")
        self._check(trt, path, spec)
        self._require(int(self._engine.device_memory_size_v2) + beside, "its work")
        self._context: Any = self._engine.create_execution_context()
        if self._context is None:
            raise MllmEdgeError(f"{path}: TensorRT cannot start it ({self._why()}); free GPU memory or use target cuda")

    @property
    def closed(self) -> bool:
        """Whether it was."""
        return self._engine is None

    def at(self, name: str, address: int) -> None:
        """Where a tensor is."""
        self._accepted(self._context.set_tensor_address(name, address), name)

    def sized(self, name: str, shape: Sequence[int]) -> None:
        """The shape of an input with named axes."""
        self._accepted(self._context.set_input_shape(name, tuple(shape)), f"{name} {list(shape)}")

    def enqueue(self) -> None:
        """Queue a run. Raises MllmEdgeError when TensorRT fails, or after `close`."""
        if self.closed:
            raise MllmEdgeError(f"stage {self._name} is closed; load the bundle again")
        if not self._context.execute_async_v3(int(self._cuda.stream)):
            raise MllmEdgeError(f"stage {self._name}: TensorRT failed ({self._why()}); see mllm-edge doctor")

    def close(self) -> None:
        """Free it."""
        self._context = self._engine = None

    def _accepted(self, done: bool, what: str) -> None:
        if not done:
            raise MllmEdgeError(f"stage {self._name}: TensorRT refuses {what} ({self._why()}); build it again")

    def _require(self, size: int, what: str) -> None:
        free = self._cuda.free_memory()
        if size > free:
            raise MllmEdgeError(
                f"stage {self._name} needs {size / 1e6:.0f} MB of GPU memory for {what}, {free / 1e6:.0f} MB are "
                "free; close other programs, lower --gpu-layers, or export it smaller"
            )

    def _check(self, trt: Any, path: Path, spec: StageEntry) -> None:
        engine = self._engine
        found = {}
        for index in range(engine.num_io_tensors):
            name = engine.get_tensor_name(index)
            sizes = [None if size < 0 else size for size in engine.get_tensor_shape(name)]
            found[name] = (np.dtype(trt.nptype(engine.get_tensor_dtype(name))).name, sizes)
        tensors = [*spec.inputs, *spec.outputs]
        wanted = {s.name: (s.dtype, [None if isinstance(size, str) else size for size in s.shape]) for s in tensors}
        if found != wanted:
            raise MllmEdgeError(f"{path} is not the stage that the manifest says ({found}); build it again")

    def _why(self) -> str:
        return self._reasons[-1] if self._reasons else "it gives no reason"


def logger(trt: Any, reasons: list[str]) -> Any:
    """A logger for TensorRT that collects the errors."""

    class Reasons(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                reasons.append(" ".join(message.split()))

    return Reasons()
