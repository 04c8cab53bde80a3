"""A language model's decoder as an engine, with its caches on the GPU.

What a step gives for the caches is copied into them on the device; only embeddings go there and logits and hidden
states come back.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from mllm_edge.bundle.manifest import BuiltEngine, StageEntry, TensorSpec
from mllm_edge.errors import MllmEdgeError
from mllm_edge.runtime.engines.interface import Array, Floats
from mllm_edge.runtime.engines.parts_language_model import CROSS, NEW, PAST, grown, sized
from mllm_edge.runtime.engines.tensorrt.cuda import Buffer, Cuda, DeviceArray
from mllm_edge.runtime.engines.tensorrt.engine import Engine

HOST = ("logits", "hidden")  # what is read there


class TensorRtDecoder:
    """See `parts_language_model.Decoder`.

    Args:
        path: the engine's file.
        spec: the decoder.
        built: what the manifest says of the engine.
        most: sequences that it was built for.
        cuda: the GPU.

    Raises:
        MllmEdgeError: see `Engine`.
    """

    def __init__(self, path: Path, spec: StageEntry, built: BuiltEngine, most: int, cuda: Cuda):
        self._spec, self._most, self._cuda = spec, most, cuda
        self._package = f"{built.package} {built.version}, {cuda.capability}"
        self._engine = Engine(path, spec, built, cuda, 0)
        self._past = {tensor.name: tensor for tensor in spec.inputs if tensor.name.startswith(PAST)}
        self._crossed = {tensor.name: tensor for tensor in spec.inputs if tensor.name.startswith(CROSS)}
        self.sequences = 0
        self._capacity = 0
        self._cross: list[Buffer] = []  # kept alive
        self._cache: dict[str, Buffer] = {}
        self._spare: dict[str, Buffer] = {}  # as large, for the next order of beams
        self._fed: dict[str, Buffer] = {}
        self._given: dict[str, Buffer] = {}
        self._host: dict[str, Buffer] = {}
        self._room = (0, 0)  # sequences and tokens that there are buffers for

    def begin(self, cross: Mapping[str, Array]) -> None:
        """Take another prompt's keys and values, where they are."""
        self._cross = []
        for name, spec in self._crossed.items():
            array = cross[name]
            buffer = array.buffer if isinstance(array, DeviceArray) else self._sent(array)
            self._cross.append(buffer)
            self._engine.at(name, buffer.address)
            if any(isinstance(size, str) for size in spec.shape):
                self._engine.sized(name, array.shape)
        if self.sequences > 1:  # beams of the answer before
            self._cache, self._spare, self.sequences, self._capacity = {}, {}, 0, 0

    def step(self, embeds: Floats, length: int, most: int) -> tuple[Floats, Floats]:
        """Read embeddings [B,T,D]. Raises MllmEdgeError for more sequences than it was built for, or when it fails."""
        sequences, tokens, _ = embeds.shape
        if sequences > self._most:
            raise MllmEdgeError(
                f"the decoder was built for {self._most} sequences, not {sequences}; ask with --beams {self._most}"
            )
        self._grow(sequences, grown(self._capacity, length + tokens, most))
        self._ready(sequences, tokens)
        self._cuda.wait()  # the last copy out of the staging memory
        for name, array in (("embeds", embeds), ("length", np.array([length], np.int64))):
            staging, target = self._host[name], self._fed[name]
            staging.view(array.shape, array.dtype)[...] = array
            self._cuda.copy(target.address, staging.address, array.nbytes)
        self._engine.sized("embeds", embeds.shape)
        # Of an empty cache one position is shown, so that nothing is multiplied with what does not count.
        shown = self._capacity if length else 1
        for name, spec in self._past.items():
            self._engine.sized(name, sized(spec, sequences, shown))
            self._engine.at(name, self._cache[name].address)
        self._engine.enqueue()
        for name, spec in self._past.items():
            heads, width = _rows(spec)
            new, cache = self._given[name.replace(PAST, NEW, 1)], self._cache[name]
            row, whole = tokens * width, self._capacity * width
            self._cuda.copy_rows(cache.address + length * width, whole, new.address, row, row, sequences * heads)
        found = {}
        for spec in self._spec.outputs:
            if spec.name in HOST:
                shape, dtype = sized(spec, sequences, tokens), np.dtype(spec.dtype)
                size = math.prod(shape) * dtype.itemsize
                self._cuda.copy(self._host[spec.name].address, self._given[spec.name].address, size)
                found[spec.name] = self._host[spec.name].view(shape, dtype)
        self._cuda.wait()
        return found["logits"], found["hidden"]

    def branch(self, parents: Sequence[int], length: int) -> None:
        """Reorder the sequences, into other memory: a sequence may have several children."""
        if list(parents) == list(range(self.sequences)):
            return
        before, after = self._cache, self._spare
        if len(parents) != self.sequences or not after:
            after = self._memory(len(parents), self._capacity)
        for name, spec in self._past.items():
            heads, width = _rows(spec)
            whole = self._capacity * width
            for number, parent in enumerate(parents):
                source = before[name].address + parent * heads * whole
                target = after[name].address + number * heads * whole
                self._cuda.copy_rows(target, whole, source, whole, length * width, heads)
        self._cuda.wait()  # before memory is freed
        self._cache, self._spare = after, before if len(parents) == self.sequences else {}
        self.sequences = len(parents)

    def about(self) -> str:
        """TensorRT's version and the GPU."""
        return self._package

    def close(self) -> None:
        """Free the engine and the caches."""
        if not self._engine.closed:
            self._cuda.wait()
            self._engine.close()
            self._cross, self._cache, self._spare, self._fed, self._given, self._host = [], {}, {}, {}, {}, {}

    def _grow(self, sequences: int, capacity: int) -> None:
        """Caches for so many positions of each sequence."""
        if capacity == self._capacity:
            return
        after = self._memory(sequences, capacity)
        for name, before in self._cache.items():
            heads, width = _rows(self._past[name])
            row = self._capacity * width
            target = after[name].address
            self._cuda.copy_rows(target, capacity * width, before.address, row, row, sequences * heads)
        self._cuda.wait()  # before the old memory is freed
        self._cache, self._spare, self.sequences, self._capacity = after, {}, sequences, capacity

    def _memory(self, sequences: int, capacity: int) -> dict[str, Buffer]:
        """Room for the caches."""
        return {
            name: self._cuda.allocate(sequences * math.prod(_rows(spec)) * capacity)
            for name, spec in self._past.items()
        }

    def _ready(self, sequences: int, tokens: int) -> None:
        """Memory for what a step reads and gives, as much as the largest so far."""
        room = max(sequences, self._room[0]), max(tokens, self._room[1])
        if room == self._room:
            return
        self._cuda.wait()
        self._room = room

        def size(spec: TensorSpec) -> int:
            return math.prod(sized(spec, *room)) * np.dtype(spec.dtype).itemsize

        fed = [spec for spec in self._spec.inputs if spec.name in ("embeds", "length")]
        self._fed = {spec.name: self._cuda.allocate(max(8, size(spec))) for spec in fed}
        self._given = {spec.name: self._cuda.allocate(size(spec)) for spec in self._spec.outputs}
        host = [*fed, *(spec for spec in self._spec.outputs if spec.name in HOST)]
        self._host = {spec.name: self._cuda.allocate_host(max(8, size(spec))) for spec in host}
        for name, buffer in (self._fed | self._given).items():
            self._engine.at(name, buffer.address)

    def _sent(self, array: Array) -> Buffer:
        """A copy on the GPU."""
        staging, buffer = self._cuda.allocate_host(array.nbytes), self._cuda.allocate(array.nbytes)
        staging.view(array.shape, array.dtype)[...] = array
        self._cuda.copy(buffer.address, staging.address, array.nbytes)
        self._cuda.wait()
        return buffer


def _rows(spec: TensorSpec) -> tuple[int, int]:
    """Of a cache [B,heads,C,d]: its heads, and the bytes of one position of one of them."""
    heads, width = spec.shape[1], spec.shape[3]
    assert isinstance(heads, int) and isinstance(width, int)
    return heads, width * np.dtype(spec.dtype).itemsize
