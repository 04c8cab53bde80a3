"""The two interfaces of the runtime. A backend is one file or folder here that implements one of them, and one line in
`table.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from mllm_edge.bundle.manifest import StageEntry, TensorSpec
from mllm_edge.errors import MllmEdgeError

Array = NDArray[Any]
Floats = NDArray[np.float32]


class Device(Protocol):
    """A GPU that engines share."""

    def open(self, folder: Path, stage: StageEntry) -> Stage:
        """The stage's engine. Raises MllmEdgeError where none fits this GPU, or it fails."""
        ...

    def decoder(self, folder: Path, stage: StageEntry) -> Any:
        """A language model's decoder with its caches (`parts_language_model.Decoder`), as `open`."""
        ...


@dataclass(frozen=True)
class Options:
    """How engines are to run.

    Attributes:
        target: "cpu", "cuda", "trt", or "ort-rtx" (ONNX Runtime's TensorRT-RTX provider).
        strict: the user asked for this target, so that an engine without it is an error rather than a warning.
        threads: CPU threads of one stage.
        kv_type: element type of the KV cache: "f32", "f16" or "q8_0".
        context: positions that the language model can hold.
        lean: memory counts more than time: nothing is kept for later, weights stay as they are in their file.
        gpu_layers: layers of the language model on the GPU; None for as many as fit its free memory.
        gpu_reserve: bytes of the GPU's memory that stages will take which are not loaded yet.
        device: the GPU that engines of target trt share.
    """

    target: str
    strict: bool
    threads: int
    kv_type: str
    context: int
    lean: bool = False
    gpu_layers: int | None = None
    gpu_reserve: int = 0
    device: Device | None = None


class Stage(Protocol):
    """One sub-network: arrays in by name, arrays out by name."""

    spec: StageEntry

    def __call__(self, **arrays: Array) -> dict[str, Array]:
        """Run it. What it gives is read by `np.asarray`, as it may still be on a GPU; other stages take it as it is.

        Raises:
            MllmEdgeError: an array's name, dtype or shape is not the spec's, or the engine fails.
        """
        ...

    def close(self) -> None:
        """Free the engine."""
        ...


class OnDevice(Protocol):
    """What a stage on a GPU returns: read by `np.asarray`; it stands until the stage's next call."""

    def wait(self) -> None:
        """Until it is computed."""
        ...

    def kept(self) -> Array:
        """A copy that no later call overwrites."""
        ...


def settle(arrays: Mapping[str, Array]) -> None:
    """Wait until a stage's outputs are computed, so that its time is its own."""
    for array in arrays.values():
        if not isinstance(array, np.ndarray):
            cast("OnDevice", array).wait()


def lasting(array: Array, on_host: bool) -> Array:
    """What no later call of the stage overwrites: on the host, or where it is."""
    if isinstance(array, np.ndarray):
        return array
    return np.asarray(array) if on_host else cast("OnDevice", array).kept()


class Step(NamedTuple):
    """What the language model says after its last position: logits float32 [V], and the states after the final norm of
    as many last positions as were asked for, float32 [S,D]."""

    logits: Floats
    hidden: Floats


class LanguageModel(Protocol):
    """The part that steps. It holds one sequence of positions.

    Attributes:
        context: positions it can hold: of prompt and answer together, or of each where `keeps` is False.
        vocabulary: V.
        width: D.
        keeps: whether the beginning of a prompt that was read stays usable. An encoder-decoder keeps nothing: its
            encoder looks both ways.
    """

    context: int
    vocabulary: int
    width: int
    keeps: bool

    def embed(self, ids: Sequence[int]) -> Floats:
        """Rows of the embedding table, float32 [T,D]."""
        ...

    def prefill(self, embeds: Floats, keep: int = 0, state: bool = False) -> Step:
        """Read a prompt: keep the first `keep` positions, append `embeds` [T,D], T > 0.

        Returns:
            The last position's step, with its hidden state [1,D] if `state`.
        """
        ...

    def extend(self, ids: Sequence[int], states: int = 0) -> Step:
        """Append tokens of the answer, one or a group, in one batch.

        Returns:
            The last position's step, with the hidden states of the last `states` positions, at most `len(ids)`.
        """
        ...

    def about(self) -> str:
        """The engine's build and features, for a benchmark's record."""
        ...

    def close(self) -> None:
        """Free the model and its caches."""
        ...


@runtime_checkable
class Beams(LanguageModel, Protocol):
    """A language model that holds several sequences after one prompt."""

    def branch(self, tokens: Sequence[int], parents: Sequence[int]) -> Floats:
        """Sequence b becomes what sequence `parents[b]` was, with `tokens[b]` appended; after a prefill there is one.

        Returns:
            Logits float32 [B,V].
        """
        ...


def check_arrays(name: str, specs: Sequence[TensorSpec], arrays: Mapping[str, Array]) -> None:
    """Compare arrays with what a stage takes.

    Raises:
        MllmEdgeError: an array is missing, unknown, or of another dtype or shape.
    """
    expected = {spec.name: spec for spec in specs}
    if arrays.keys() != expected.keys():
        raise MllmEdgeError(f"stage {name} takes {', '.join(expected)}; it was given {', '.join(arrays) or 'nothing'}")
    for key, spec in expected.items():
        array = arrays[key]
        same = len(array.shape) == len(spec.shape) and all(
            isinstance(want, str) or have == want for have, want in zip(array.shape, spec.shape)
        )
        if array.dtype.name != spec.dtype or not same:
            raise MllmEdgeError(
                f"stage {name}: {key} is {array.dtype.name} {list(array.shape)}; it takes {spec.dtype} {spec.shape}"
            )
