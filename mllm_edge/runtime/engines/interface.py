"""The two interfaces of the runtime. A backend is one file or folder here that implements one of them, and one line in
`table.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

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


class Step(NamedTuple):
    """What the language model says after a position: logits float32 [V], and, where asked for, the state after the
    final norm, float32 [D]."""

    logits: Floats
    hidden: Floats | None


class LanguageModel(Protocol):
    """The stage that steps. It holds one sequence of positions; `keep` rewinds it to a prefix.

    Attributes:
        context: positions it can hold.
        vocabulary: V.
        width: D.
        bos: the id that opens every sequence, or None.
        control_tokens: control strings, such as `</s>`, and their ids.
        want_hidden: whether `Step.hidden` is filled from now on.
    """

    context: int
    vocabulary: int
    width: int
    bos: int | None
    want_hidden: bool

    @property
    def control_tokens(self) -> Mapping[str, int]: ...

    def tokenize(self, text: str, special: bool = False) -> list[int]:
        """Ids of a piece of text, without BOS. Control strings are plain text unless `special`."""
        ...

    def piece(self, token: int) -> bytes:
        """The UTF-8 bytes of a token, perhaps a part of a character; nothing for a control token."""
        ...

    def is_end(self, token: int) -> bool:
        """Whether the token ends an answer."""
        ...

    def embed(self, ids: Sequence[int]) -> Floats:
        """Rows of the embedding table, float32 [T,D]."""
        ...

    def prefill(self, embeds: Floats, keep: int = 0) -> Step:
        """Keep the first `keep` positions, append `embeds` [T,D], T > 0, and return the last position's step."""
        ...

    def step(self, token: int) -> Step:
        """Append one token."""
        ...

    def close(self) -> None:
        """Free the model and its KV cache."""
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
