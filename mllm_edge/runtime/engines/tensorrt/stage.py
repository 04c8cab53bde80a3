"""TensorRT engines as stages, on one CUDA stream; tensors passed between stages stay on the GPU."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import cast

import numpy as np

from mllm_edge.bundle.check import locate
from mllm_edge.bundle.manifest import BuiltEngine, Manifest, StageEntry, TensorSpec
from mllm_edge.errors import MllmEdgeError
from mllm_edge.runtime.engines.interface import Array, check_arrays
from mllm_edge.runtime.engines.tensorrt import packages
from mllm_edge.runtime.engines.tensorrt.cuda import Cuda, DeviceArray
from mllm_edge.runtime.engines.tensorrt.decoder import TensorRtDecoder
from mllm_edge.runtime.engines.tensorrt.engine import Engine

log = logging.getLogger(__name__)


Axes = Mapping[str, Sequence[int]]  # name -> least, usual, most


class TensorRtStage:
    """A stage run by an engine.

    Inputs are arrays, which are copied through page-locked memory, or another stage's outputs, which stay on the GPU,
    as do the outputs until numpy reads them. A stage with static shapes is recorded as a CUDA graph.

    Raises:
        MllmEdgeError: the engine cannot be read or does not match the manifest, or the GPU has too little memory.
    """

    def __init__(self, path: Path, spec: StageEntry, built: BuiltEngine, axes: Axes, cuda: Cuda):
        self.spec, self._cuda = spec, cuda
        self._most = {axis: lengths[-1] for axis, lengths in axes.items()}
        self._lock = threading.Lock()
        sizes = {tensor.name: nbytes(tensor, self._most) for tensor in (*spec.inputs, *spec.outputs)}
        self._engine = Engine(path, spec, built, cuda, sum(sizes.values()))
        self._buffers = {name: cuda.allocate(size) for name, size in sizes.items()}
        self._staging = {tensor.name: cuda.allocate_host(sizes[tensor.name]) for tensor in spec.inputs}
        for name, buffer in self._buffers.items():
            self._engine.at(name, buffer.address)
        free = packages.free_axes(spec)
        self._varies = bool(free)
        self._static = all(axes[axis][0] == axes[axis][-1] for axis in free)  # and so worth recording
        self._launch: Callable[[], None] | None = None

    def __call__(self, **arrays: Array) -> dict[str, Array]:
        """Queue the engine. The results are read by `np.asarray` and valid until the next call.

        Raises:
            MllmEdgeError: an array does not fit the spec, or the engine fails or is closed.
        """
        if self._engine.closed:
            raise MllmEdgeError(f"stage {self.spec.name} is closed; load the bundle again")
        check_arrays(self.spec.name, self.spec.inputs, arrays)
        lengths = self._lengths(arrays)
        for axis, length in lengths.items():
            if length > self._most[axis]:
                return self._in_parts(arrays, axis, length)
        with self._lock:
            self._read(arrays)
            self._run()
        # Device arrays are accepted wherever stage outputs are: see DeviceArray.
        outputs = {
            spec.name: DeviceArray(self._buffers[spec.name], shape(spec, lengths), np.dtype(spec.dtype))
            for spec in self.spec.outputs
        }
        return cast("dict[str, Array]", outputs)

    def _lengths(self, arrays: Mapping[str, Array]) -> dict[str, int]:
        """Of the axes that vary."""
        return {
            axis: int(length)
            for spec in self.spec.inputs
            for axis, length in zip(spec.shape, arrays[spec.name].shape, strict=True)
            if isinstance(axis, str)
        }

    def _in_parts(self, arrays: Mapping[str, Array], axis: str, length: int) -> dict[str, Array]:
        """More than the engine reads at once along an axis: one part after the other."""
        if any(axis in spec.shape[1:] for spec in (*self.spec.inputs, *self.spec.outputs)):
            raise MllmEdgeError(
                f"stage {self.spec.name} was built for up to {self._most[axis]} {axis}, not {length}; ask for fewer"
            )
        most, varying = self._most[axis], [spec.name for spec in self.spec.inputs if spec.shape[0] == axis]
        found: list[dict[str, Array]] = []
        for start in range(0, length, most):
            part = {name: np.asarray(arrays[name])[start : start + most] for name in varying}
            found.append({name: np.asarray(array) for name, array in self(**{**arrays, **part}).items()})
        return {name: np.concatenate([part[name] for part in found]) for name in found[0]}

    def _read(self, arrays: Mapping[str, Array]) -> None:
        if any(isinstance(array, np.ndarray) for array in arrays.values()):
            self._cuda.wait()  # the last copy out of the staging memory
        for name, array in arrays.items():
            if isinstance(array, DeviceArray):
                source = array.buffer.address
            else:
                self._staging[name].view(array.shape, array.dtype)[...] = array
                source = self._staging[name].address
            self._cuda.copy(self._buffers[name].address, source, array.nbytes)
            if self._varies:
                self._engine.sized(name, array.shape)

    def _run(self) -> None:
        if self._launch:
            self._launch()
            return
        self._engine.enqueue()
        if self._static:  # after the first run, nothing is allocated or compiled during recording
            self._cuda.wait()
            try:
                self._launch = self._cuda.record(self._engine.enqueue)
            except MllmEdgeError as error:
                self._static = False
                log.info("stage %s is not recorded as a CUDA graph: %s", self.spec.name, error)

    def close(self) -> None:
        """Free the engine and its memory."""
        if not self._engine.closed:
            self._cuda.wait()
            self._launch = None
            self._engine.close()
            self._buffers.clear()
            self._staging.clear()


class Device:
    """The GPU that a bundle's engines share, with their stream.

    Raises:
        MllmEdgeError: there is no usable GPU, or cuda-bindings is not installed.
    """

    def __init__(self, manifest: Manifest):
        self._axes = manifest.build.axes
        self._cuda = Cuda()
        self.close = self._cuda.close

    @property
    def capability(self) -> str:
        """Its compute capability, "sm_87"."""
        return self._cuda.capability

    def check(self, manifest: Manifest, folder: Path) -> None:
        """Check that all that engines run has one for this GPU, before any is loaded.

        Raises:
            MllmEdgeError: names the stages that have none, and why.
        """
        found = {stage.name: packages.find(stage, self.capability, self._axes) for stage in manifest.engine_stages()}
        lacking = {name: why for name, why in found.items() if isinstance(why, str)}
        if lacking:
            raise MllmEdgeError(
                f"{', '.join(lacking)} cannot run here: {next(iter(lacking.values()))}; run: mllm-edge build {folder}, "
                "or load it with target cuda or cpu"
            )

    def open(self, folder: Path, stage: StageEntry, engine: BuiltEngine | None = None) -> TensorRtStage:
        """An engine of the stage, by default the one that fits. Raises MllmEdgeError where none does, or it fails."""
        built = engine or self._fitting(folder, stage)
        return TensorRtStage(locate(folder, built.file), stage, built, self._axes, self._cuda)

    def decoder(self, folder: Path, stage: StageEntry) -> TensorRtDecoder:
        """A language model's decoder, as `open`."""
        built = self._fitting(folder, stage)
        sequences = next(spec for spec in stage.inputs if spec.name == "embeds").shape[0]
        most = self._axes[sequences][-1] if isinstance(sequences, str) else sequences
        return TensorRtDecoder(locate(folder, built.file), stage, built, most, self._cuda)

    def _fitting(self, folder: Path, stage: StageEntry) -> BuiltEngine:
        built = packages.find(stage, self.capability, self._axes)
        if isinstance(built, str):
            raise MllmEdgeError(f"{stage.name} cannot run here: {built}; run: mllm-edge build {folder}")
        return built


def shape(spec: TensorSpec, lengths: Mapping[str, int]) -> tuple[int, ...]:
    """A tensor's shape where named axes have these lengths; "rows - 1" is one less than "rows"."""

    def length(size: int | str) -> int:
        axis, _, less = str(size).partition(" - ")
        return lengths[axis] - int(less or 0) if isinstance(size, str) else size

    return tuple(map(length, spec.shape))


def nbytes(spec: TensorSpec, lengths: Mapping[str, int]) -> int:
    """A tensor's bytes at these lengths."""
    return math.prod(shape(spec, lengths)) * np.dtype(spec.dtype).itemsize
