"""A GPU that is none: CUDA's runtime and TensorRT as far as we call them, on host memory and ONNX Runtime.

Work is queued and done only when the stream is waited for, as on a device, so that memory which is reused too early
gives wrong numbers. It stands in where the calls are tested; it says nothing about real engines.
"""

from __future__ import annotations

import ctypes
import enum
import importlib.machinery
import json
import sys
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest


class Device:
    """What the two modules share."""

    def __init__(self, capability: str = "sm_87", memory: int = 8 * 10**9):
        self.capability, self.memory = capability, memory
        self.held: dict[int, Any] = {}
        self.queue: list[Callable[[], None]] = []
        self.recorded: list[Callable[[], None]] | None = None
        self.launches = 0
        self.integrated = False
        self.records = True  # whether work can be recorded
        self.caches = "known"  # or "foreign": of another GPU; "unreadable": of another version
        self.fault = 0.0  # of what engines give, in its own spread
        self.builds: list[str] = []

    def do(self, work: Callable[[], None]) -> None:
        (self.queue if self.recorded is None else self.recorded).append(work)

    def wait(self) -> None:
        while self.queue:
            self.queue.pop(0)()

    def used(self) -> int:
        return sum(ctypes.sizeof(block) for block in self.held.values())


def install(
    monkeypatch: pytest.MonkeyPatch, device: Device, version: str = "10.3.0", typed_flag: bool = True
) -> types.ModuleType:
    """Put the modules where imports find them; returns TensorRT's."""
    trt = tensorrt(device, version, typed_flag)
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", cuda(device))
    return trt


def cuda(device: Device) -> types.ModuleType:
    api: Any = types.ModuleType("cuda.bindings.runtime")
    ok, out_of_memory = 0, 2

    def allocate(size: int) -> tuple[int, int]:
        if device.used() + size > device.memory:
            return out_of_memory, 0
        block = (ctypes.c_byte * size)()
        device.held[ctypes.addressof(block)] = block
        return ok, ctypes.addressof(block)

    def free(address: int) -> tuple[int]:
        device.wait()
        del device.held[address]
        return (ok,)

    def copy(target: int, source: int, size: int, kind: int, stream: int) -> tuple[int]:
        assert stream == 7
        device.do(lambda: ctypes.memmove(target, source, size) and None)
        return (ok,)

    def copy_rows(
        target: int, target_pitch: int, source: int, source_pitch: int, width: int, rows: int, kind: int, stream: int
    ) -> tuple[int]:
        assert stream == 7 and width <= min(target_pitch, source_pitch)

        def work() -> None:
            for row in range(rows):
                ctypes.memmove(target + row * target_pitch, source + row * source_pitch, width)

        device.do(work)
        return (ok,)

    def end_capture(stream: int) -> tuple[int, Any]:
        graph, device.recorded = device.recorded, None
        return ok, graph

    def begin_capture(stream: int, mode: int) -> tuple[int]:
        if not device.records:
            return (901,)
        device.recorded = []
        return (ok,)

    def launch(graph: list[Callable[[], None]], stream: int) -> tuple[int]:
        device.launches += 1
        for work in graph:
            device.do(work)
        return (ok,)

    def attribute(which: str, index: int) -> tuple[int, int]:
        if which == "integrated":
            return ok, int(device.integrated)
        major, minor = device.capability.removeprefix("sm_")[:-1], device.capability[-1]
        return ok, int(major if which == "major" else minor)

    api.cudaDeviceAttr = types.SimpleNamespace(
        cudaDevAttrComputeCapabilityMajor="major",
        cudaDevAttrComputeCapabilityMinor="minor",
        cudaDevAttrIntegrated="integrated",
    )
    api.cudaStreamNonBlocking = 1
    api.cudaMemcpyKind = types.SimpleNamespace(cudaMemcpyDefault=4)
    api.cudaStreamCaptureMode = types.SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)
    api.cudaDeviceGetAttribute = attribute
    api.cudaStreamCreateWithFlags = lambda flags: (ok, 7) if flags == 1 else (1, 0)
    api.cudaStreamDestroy = lambda stream: (ok,)
    api.cudaStreamSynchronize = lambda stream: (device.wait(), (ok,))[1]
    api.cudaMemGetInfo = lambda: (ok, device.memory - device.used(), device.memory)
    api.cudaMalloc = api.cudaMallocHost = allocate
    api.cudaFree = api.cudaFreeHost = free
    api.cudaMemcpyAsync = copy
    api.cudaMemcpy2DAsync = copy_rows
    api.cudaStreamBeginCapture, api.cudaStreamEndCapture = begin_capture, end_capture
    api.cudaGraphInstantiate = lambda graph, flags: (ok, graph)
    api.cudaGraphDestroy = api.cudaGraphExecDestroy = lambda graph: (ok,)
    api.cudaGraphLaunch = launch
    api.cudaGetErrorString = lambda status: (ok, b"out of memory")
    return api


class _Tensor:
    def __init__(self, value: Any):
        kind = value.type.tensor_type
        self.name, self.dtype = value.name, onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)
        self.shape = tuple(-1 if size.dim_param else size.dim_value for size in kind.shape.dim)


class _Network:
    path = ""
    inputs: list[_Tensor]
    outputs: list[_Tensor]

    def __init__(self, flags: int):
        self.flags = flags

    num_inputs = property(lambda self: len(self.inputs))
    num_outputs = property(lambda self: len(self.outputs))

    def get_input(self, index: int) -> _Tensor:
        return self.inputs[index]

    def get_output(self, index: int) -> _Tensor:
        return self.outputs[index]


class _Parser:
    def __init__(self, network: _Network, logger: Any):
        self.network = network

    def parse_from_file(self, path: str) -> bool:
        graph = onnx.load(path, load_external_data=False).graph
        self.network.path = path
        self.network.inputs, self.network.outputs = list(map(_Tensor, graph.input)), list(map(_Tensor, graph.output))
        return True


class _Config:
    def __init__(self, device: Device) -> None:
        self.device = device
        self.profiles: list[Any] = []
        self.limits: dict[Any, int] = {}
        self.cache: _Cache | None = None
        self.progress_monitor: Any = None

    def set_memory_pool_limit(self, pool: Any, size: int) -> None:
        self.limits[pool] = size

    def add_optimization_profile(self, profile: Any) -> int:
        self.profiles.append(profile)
        return len(self.profiles) - 1

    def set_compute_capability(self, capability: Any, index: int) -> bool:
        return False

    def create_timing_cache(self, known: bytes) -> _Cache | None:
        return None if known and self.device.caches == "unreadable" else _Cache(known)

    def set_timing_cache(self, cache: _Cache, ignore_mismatch: bool) -> bool:
        if not isinstance(cache, _Cache):
            raise TypeError("incompatible function arguments")
        if cache.known and self.device.caches == "foreign":
            return ignore_mismatch
        self.cache = cache
        return True

    def get_timing_cache(self) -> _Cache | None:
        return self.cache


class _Cache:
    def __init__(self, known: bytes):
        self.known = known

    def serialize(self) -> bytes:
        return self.known + b"timed;"


class _Context:
    def __init__(self, engine: _Engine):
        self.engine, self.addresses, self.shapes = engine, {}, {}  # type: ignore[var-annotated]

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        if 0 in shape:
            return False
        self.shapes[name] = shape
        return True

    def execute_async_v3(self, stream: int) -> bool:
        assert stream == 7
        shapes = dict(self.shapes)
        self.engine.device.do(lambda: self._run(shapes))
        return True

    def _run(self, shapes: dict[str, tuple[int, ...]]) -> None:
        feeds = {}
        for tensor in self.engine.inputs:
            shape = shapes.get(tensor.name, tensor.shape)
            feeds[tensor.name] = _at(self.addresses[tensor.name], shape, tensor.dtype).copy()
        for tensor, array in zip(self.engine.outputs, self.engine.session.run(None, feeds), strict=True):
            noise = np.random.default_rng(0).normal(size=array.shape) * self.engine.device.fault * array.std()
            _at(self.addresses[tensor.name], array.shape, array.dtype)[...] = array + noise


def _at(address: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
    size = int(np.prod(shape)) * dtype.itemsize
    return np.frombuffer((ctypes.c_byte * size).from_address(address), dtype).reshape(shape)


class _Engine:
    device_memory_size_v2 = 1_000_000

    def __init__(self, device: Device, path: str):
        graph = onnx.load(path, load_external_data=False).graph
        self.device, self.session = device, onnxruntime.InferenceSession(path)
        self.inputs, self.outputs = list(map(_Tensor, graph.input)), list(map(_Tensor, graph.output))
        self._all = {tensor.name: tensor for tensor in [*self.inputs, *self.outputs]}
        self.num_io_tensors = len(self._all)

    def get_tensor_name(self, index: int) -> str:
        return list(self._all)[index]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self._all[name].shape

    def get_tensor_dtype(self, name: str) -> np.dtype[Any]:
        return self._all[name].dtype

    def create_execution_context(self) -> _Context:
        return _Context(self)


def tensorrt(device: Device, version: str, typed_flag: bool) -> types.ModuleType:
    """`typed_flag`: TensorRT 10 has one, TensorRT 11 none."""

    class Logger:
        ERROR, INTERNAL_ERROR = 1, 0

    class Monitor:
        pass

    class Flag(enum.IntEnum):
        EXPLICIT_BATCH = 0
        if typed_flag:
            STRONGLY_TYPED = 1

    class Profile(dict):  # type: ignore[type-arg]
        def set_shape(self, name: str, *shapes: Any) -> None:
            self[name] = shapes

    class Builder:
        def __init__(self, logger: Any):
            self.logger = logger

        def create_network(self, flags: int) -> _Network:
            assert flags == (2 if typed_flag else 0)
            return _Network(flags)

        def create_builder_config(self) -> _Config:
            return _Config(device)

        create_optimization_profile = staticmethod(Profile)

        def build_serialized_network(self, network: _Network, config: _Config) -> bytes | None:
            varying = any(-1 in tensor.shape for tensor in network.inputs)
            if varying != bool(config.profiles):
                self.logger.log(Logger.ERROR, "Error Code 4: a dynamic input is missing dimensions in profile 0.")
                return None
            config.progress_monitor.phase_start("Building Engine", None, 2)
            if not all(config.progress_monitor.step_complete("Building Engine", step) for step in range(2)):
                return None
            config.progress_monitor.phase_finish("Building Engine")
            device.builds.append(network.path)
            return json.dumps({"onnx": network.path, "for": device.capability, "by": version}).encode()

    class Runtime:
        def __init__(self, logger: Any):
            self.logger = logger

        def deserialize_cuda_engine(self, plan: bytes) -> _Engine | None:
            try:
                return _Engine(device, json.loads(plan)["onnx"])
            except ValueError:
                self.logger.log(Logger.ERROR, "Error Code 1: Serialization (magic tag does not match)")
                return None

    trt: Any = types.ModuleType("tensorrt")
    trt.__spec__ = importlib.machinery.ModuleSpec("tensorrt", None)
    trt.__version__ = version
    trt.ILogger, trt.IProgressMonitor, trt.NetworkDefinitionCreationFlag = Logger, Monitor, Flag
    trt.Builder, trt.OnnxParser, trt.Runtime = Builder, _Parser, Runtime
    trt.MemoryPoolType = types.SimpleNamespace(WORKSPACE="workspace")
    trt.nptype = lambda dtype: dtype
    return trt
