"""CUDA's runtime through cuda-python: device memory, page-locked host memory, one stream, graphs of recorded work."""

from __future__ import annotations

import ctypes
import functools
import importlib
import math
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mllm_edge.errors import MllmEdgeError
from mllm_edge.machine.facts import available_memory
from mllm_edge.runtime.engines.interface import Array
from mllm_edge.runtime.engines.tensorrt import packages

NO_GPU = (35, 100)  # cudaErrorInsufficientDriver, also returned without any driver, and cudaErrorNoDevice


class Cuda:
    """The first GPU and one stream on it, on which a whole pipeline is queued.

    Raises:
        MllmEdgeError: there is no usable GPU or driver, or cuda-bindings is not installed.
    """

    def __init__(self) -> None:
        self._api = _api()
        major, minor = (self._attribute(f"cudaDevAttrComputeCapability{part}") for part in ("Major", "Minor"))
        self.capability = f"sm_{major}{minor}"
        self._shared = bool(self._attribute("cudaDevAttrIntegrated"))
        # Non-blocking with respect to the default stream: llama.cpp uses that while stages are recorded here.
        self.stream: Any = self._call("cudaStreamCreateWithFlags", self._api.cudaStreamNonBlocking)
        self._buffers: weakref.WeakSet[Buffer] = weakref.WeakSet()
        self._free_stream = weakref.finalize(self, self._api.cudaStreamDestroy, self.stream)

    def _attribute(self, name: str) -> int:
        return int(self._call("cudaDeviceGetAttribute", getattr(self._api.cudaDeviceAttr, name), 0))

    def _call(self, function: str, *arguments: Any) -> Any:
        """Call a CUDA function; returns its result besides the status, if any."""
        return checked(self._api, function, *arguments)

    def free_memory(self) -> int:
        """Available bytes of device memory. In a board's shared memory CUDA counts the page cache as used, although the
        system frees it on demand."""
        if self._shared and (available := available_memory()) is not None:
            return available
        return int(self._call("cudaMemGetInfo")[0])

    def allocate(self, size: int) -> Buffer:
        """Device memory. Raises MllmEdgeError if there is not enough."""
        return self._buffer(size, "cudaMalloc", "cudaFree")

    def allocate_host(self, size: int) -> Buffer:
        """Page-locked host memory, for copies to and from the device without staging."""
        return self._buffer(size, "cudaMallocHost", "cudaFreeHost")

    def _buffer(self, size: int, allocate: str, free: str) -> Buffer:
        buffer = Buffer(self, int(self._call(allocate, max(size, 1))), getattr(self._api, free))
        self._buffers.add(buffer)
        return buffer

    def copy(self, target: int, source: int, size: int) -> None:
        """Queue a copy between two addresses, on host or device."""
        kind = self._api.cudaMemcpyKind.cudaMemcpyDefault
        self._call("cudaMemcpyAsync", target, source, size, kind, self.stream)

    def copy_rows(self, target: int, target_pitch: int, source: int, source_pitch: int, width: int, rows: int) -> None:
        """Queue copies of `rows` pieces of `width` bytes, which begin so many bytes (pitch) after each other."""
        kind = self._api.cudaMemcpyKind.cudaMemcpyDefault
        self._call("cudaMemcpy2DAsync", target, target_pitch, source, source_pitch, width, rows, kind, self.stream)

    def wait(self) -> None:
        """Wait for all queued work."""
        self._call("cudaStreamSynchronize", self.stream)

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """Record what `work` queues as a CUDA graph; returns a function that launches it.

        Raises:
            MllmEdgeError: it cannot be recorded; nothing of it was run.
        """
        mode = self._api.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call("cudaStreamBeginCapture", self.stream, mode)
        try:
            work()
        except BaseException:
            status, graph = self._api.cudaStreamEndCapture(self.stream)  # the first error is the one to report
            if int(status) == 0:
                self._api.cudaGraphDestroy(graph)
            raise
        graph = self._call("cudaStreamEndCapture", self.stream)
        ready = self._call("cudaGraphInstantiate", graph, 0)
        self._call("cudaGraphDestroy", graph)
        launch = functools.partial(self._call, "cudaGraphLaunch", ready, self.stream)
        weakref.finalize(launch, self._api.cudaGraphExecDestroy, ready)
        return launch

    def close(self) -> None:
        """Free the stream and all memory."""
        for buffer in list(self._buffers):
            buffer.close()
        self._free_stream()


class Buffer:
    """Memory at `address`, freed with the last reference."""

    def __init__(self, cuda: Cuda, address: int, free: Callable[[int], Any]):
        self.address, self.cuda = address, cuda
        self.close = weakref.finalize(self, free, address)

    def view(self, shape: Sequence[int], dtype: np.dtype[Any]) -> Array:
        """Host memory as an array; it lives as long as the buffer."""
        count = math.prod(shape) * dtype.itemsize
        raw = (ctypes.c_byte * count).from_address(self.address)
        return np.frombuffer(memoryview(raw), dtype).reshape(shape)


class DeviceArray:
    """A stage's output on the GPU; numpy reads it like any array (`np.asarray`), with one copy.

    It is the stage's own output buffer, overwritten when the stage runs again; `kept` returns a copy.
    """

    def __init__(self, buffer: Buffer, shape: tuple[int, ...], dtype: np.dtype[Any]):
        self.buffer, self.shape, self.dtype = buffer, shape, dtype

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def wait(self) -> None:
        """Wait until it is computed."""
        self.buffer.cuda.wait()

    def kept(self) -> DeviceArray:
        """A copy that nothing overwrites, still on the GPU."""
        cuda = self.buffer.cuda
        own = cuda.allocate(self.nbytes)
        cuda.copy(own.address, self.buffer.address, self.nbytes)
        return DeviceArray(own, self.shape, self.dtype)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        cuda = self.buffer.cuda
        staging = cuda.allocate_host(self.nbytes)
        cuda.copy(staging.address, self.buffer.address, self.nbytes)
        cuda.wait()
        found = staging.view(self.shape, self.dtype).copy()
        staging.close()
        return found if dtype is None else found.astype(dtype)


def checked(api: Any, function: str, *arguments: Any) -> Any:
    """Call one of CUDA's functions.

    Raises:
        MllmEdgeError: its status is not success; includes CUDA's name for it.
    """
    try:
        status, *found = getattr(api, function)(*arguments)
    except RuntimeError as error:  # the driver's library is missing
        raise MllmEdgeError(f"CUDA cannot start ({error}); install NVIDIA's driver, or use target cpu") from None
    if int(status) != 0:
        _, text = api.cudaGetErrorString(status)
        reason = text.decode() if isinstance(text, bytes) else str(text)
        if int(status) in NO_GPU:
            raise MllmEdgeError(
                f"there is no NVIDIA GPU that CUDA can use here ({reason}); use target cpu, or build ahead "
                "with --device"
            )
        raise MllmEdgeError(f"CUDA: {function} failed ({reason}); see mllm-edge doctor, or use target cpu")
    return found[0] if len(found) == 1 else found


def _api() -> Any:
    try:
        return importlib.import_module("cuda.bindings.runtime")
    except ModuleNotFoundError:
        raise MllmEdgeError(
            f"cuda-bindings, which target trt needs, is not installed; run: pip install '{packages.bindings()}'"
        ) from None
