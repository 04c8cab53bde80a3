"""A decoder that ONNX Runtime runs, with its caches in the host's memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from mllm_edge.machine.facts import version
from mllm_edge.runtime.engines.interface import Array, Floats
from mllm_edge.runtime.engines.ort import Binding, OnnxStage
from mllm_edge.runtime.engines.parts_language_model import CROSS, NEW, PAST, grown, sized


class OrtDecoder:
    """See `parts_language_model.Decoder`. What it reads and gives is bound once for steps of one shape."""

    def __init__(self, stage: OnnxStage):
        self._stage, self._binding = stage, Binding(stage)
        self._past = {tensor.name: tensor for tensor in stage.spec.inputs if tensor.name.startswith(PAST)}
        self._crossed = {tensor.name for tensor in stage.spec.inputs if tensor.name.startswith(CROSS)}
        self._cross: dict[str, Array] = {}
        self._cache: dict[str, Array] = {}
        self._fed: dict[str, Array] = {}
        self._given: dict[str, Array] = {}
        self._bound: tuple[int, ...] = ()

    @property
    def sequences(self) -> int:
        """How many are held."""
        return len(next(iter(self._cache.values()))) if self._cache else 0

    def begin(self, cross: Mapping[str, Array]) -> None:
        """Take another prompt's keys and values."""
        self._cross = {name: np.asarray(array) for name, array in cross.items() if name in self._crossed}
        if self.sequences > 1:  # beams of the answer before
            self._cache = {}
        self._bound = ()

    def step(self, embeds: Floats, length: int, most: int) -> tuple[Floats, Floats]:
        """Read embeddings [B,T,D]. Raises MllmEdgeError when ONNX Runtime fails."""
        sequences, tokens, _ = embeds.shape
        self._grow(sequences, length + tokens, most)
        # An empty cache is as short as can be, so that nothing is multiplied with what does not count.
        shape = (sequences, tokens, self._capacity if length else 1)
        if self._bound != shape:
            self._bind(*shape)
        self._fed["embeds"][...], self._fed["length"][0] = embeds, length
        self._binding.run()
        for name, array in self._cache.items():
            array[:, :, length : length + tokens] = self._given[name.replace(PAST, NEW, 1)]
        return self._given["logits"], self._given["hidden"]

    def branch(self, parents: Sequence[int], length: int) -> None:
        """Reorder the sequences."""
        order = np.asarray(parents, np.int64)
        for name, array in self._cache.items():
            if len(array) != len(order):
                self._cache[name], self._bound = array[order], ()
            elif (order != np.arange(len(order))).any():
                array[:, :, :length] = array[order, :, :length]

    def about(self) -> str:
        """ONNX Runtime's version and provider."""
        package = next((name for name in ("onnxruntime", "onnxruntime-gpu") if version(name)), "onnxruntime")
        return f"{package} {version(package)}, {self._stage.provider}"

    def close(self) -> None:
        """Free the graph and the caches."""
        self._binding.close()
        self._stage.close()
        self._cache, self._cross = {}, {}

    @property
    def _capacity(self) -> int:
        """Positions that the caches have."""
        return next(iter(self._cache.values())).shape[2] if self._cache else 0

    def _grow(self, sequences: int, positions: int, most: int) -> None:
        """Caches for so many positions of each sequence."""
        held, before = self._capacity, self._cache
        size = grown(held, positions, most)
        if size == held:
            return
        self._cache = {name: np.zeros(sized(spec, sequences, size), spec.dtype) for name, spec in self._past.items()}
        for name, array in before.items():
            self._cache[name][:, :, :held] = array
        self._bound = ()

    def _bind(self, sequences: int, tokens: int, positions: int) -> None:
        """Memory for what a step of this shape reads and gives."""
        spec = self._stage.spec
        fed = [tensor for tensor in spec.inputs if tensor.name in ("embeds", "length")]
        self._fed = {one.name: np.zeros(sized(one, sequences, tokens), one.dtype) for one in fed}
        past = self._cache
        if positions < self._capacity:
            past = {name: np.zeros(sized(one, sequences, positions), one.dtype) for name, one in self._past.items()}
        self._given = {tensor.name: np.empty(sized(tensor, sequences, tokens), tensor.dtype) for tensor in spec.outputs}
        self._binding.bind(self._fed | self._cross | past, self._given)
        self._bound = (sequences, tokens, positions)
