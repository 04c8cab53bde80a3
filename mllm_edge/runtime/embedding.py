"""Pictures as vectors, by the stages of a bundle that lead there; neither tokenizer nor language model is loaded."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from mllm_edge.bundle.manifest import StageEntry
from mllm_edge.bundle.read import read_manifest
from mllm_edge.bundle.sources import Constant, Pixels
from mllm_edge.errors import BadInput, MllmEdgeError
from mllm_edge.runtime.answers.index import fingerprint, retrieving
from mllm_edge.runtime.engines.interface import Array, Floats
from mllm_edge.runtime.loading import lazy_stages, on_device, options_for
from mllm_edge.runtime.preprocess import preprocess
from mllm_edge.runtime.sources import Held, constant
from mllm_edge.runtime.wiring import dependencies, needed_for

if TYPE_CHECKING:
    from typing_extensions import Self

BATCH = 16  # most pictures at once; more are hardly faster, and a kill loses a batch

Prepared = dict[str, Array]  # a picture as the sources read it: float32 [1,3,S,S] each


class Embedder:
    """Makes vectors of pictures. A context manager.

    Attributes:
        manifest: the bundle's.
        made_by: what names these vectors (`answers.index.fingerprint`).
        width: d, of a vector.
        batch: pictures that the stages take at once; 1 where they take one.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        target: str | None = None,
        threads: int | None = None,
        verify_hash: bool = True,
    ):
        """See `loading.load`.

        Raises:
            BadInput: the bundle makes no vectors of pictures, or they hang on more than pixels; an unusable argument.
            MllmEdgeError: an engine or the target is not available on this machine.
        """
        folder = Path(folder)
        whole = read_manifest(folder, verify_hash, engines=target in (None, "trt"))
        self._name = retrieving(whole).picture
        if not self._name:
            raise BadInput(f"{folder} makes no vectors of pictures; export it again with an mllm-edge that does")
        depends = dependencies(whole.stages, whole.sources)[self._name]
        if not depends <= {"pixels", "constant"}:
            kinds = ", ".join(sorted(depends))
            raise BadInput(f"{folder} makes {self._name} of {kinds}, not of pixels alone; export it again")
        needed = needed_for([self._name], whole.stages)
        stages = [stage for stage in whole.stages if stage.name in needed]
        self.manifest, self.made_by = whole, fingerprint(whole)
        self._pixels = [s for s in whole.sources if isinstance(s, Pixels) and _reads(stages, s.name)]
        self.width, self.batch = _sizes(stages, self._name, whole.build.axes, [s.name for s in self._pixels])
        alone = dataclasses.replace(whole.language_model, parts=[])
        manifest = dataclasses.replace(whole, stages=stages, language_model=alone)
        with contextlib.ExitStack() as opened:
            options = on_device(manifest, folder, options_for(whole, target, threads), opened)
            self._stages = lazy_stages(manifest, folder, options, opened)
            self._constants: dict[str, Array] = {
                source.name: constant(source, Held(folder, {}))
                for source in whole.sources
                if isinstance(source, Constant) and _reads(stages, source.name)
            }
            self._opened = opened.pop_all()

    def prepare(self, image: Image.Image) -> Prepared:
        """An RGB picture as the stages read it; may be called from several threads."""
        return {source.name: preprocess(image, source) for source in self._pixels}

    def vectors(self, pictures: Sequence[Prepared]) -> Floats:
        """float32 [n,d] of length 1 for n pictures, at most `batch`; a row that has no direction is not-a-number.

        Raises:
            MllmEdgeError: a stage fails, or gives something else than a row for each picture.
        """
        if not pictures:
            return np.empty((0, self.width), np.float32)
        names = [source.name for source in self._pixels]
        values = {name: np.concatenate([each[name] for each in pictures]) for name in names} | self._constants
        for stage in self._stages.values():  # as the manifest has them: each after what it reads
            values |= stage(**{spec.name: values[spec.name] for spec in stage.spec.inputs})
        found = np.asarray(values[self._name]).astype(np.float32)
        if found.shape != (len(pictures), self.width):
            raise MllmEdgeError(f"{self._name} is {list(found.shape)} for {len(pictures)} pictures; export it again")
        lengths = np.linalg.norm(found.astype(np.float64), axis=1, keepdims=True)
        lengths[~(np.isfinite(lengths) & (lengths > 0))] = np.nan
        return (found / lengths).astype(np.float32)

    def close(self) -> None:
        """Free every engine."""
        self._opened.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _reads(stages: Sequence[StageEntry], name: str) -> bool:
    return any(spec.name == name for stage in stages for spec in stage.inputs)


def _sizes(
    stages: Sequence[StageEntry], name: str, axes: dict[str, list[int]], sources: Sequence[str]
) -> tuple[int, int]:
    """Width of the vectors, and how many pictures fit a batch: more than one where all that hangs on them, from the
    pixels on, has a first axis that varies."""
    varying, batches, shape = set(sources), [BATCH], list[int | str]()
    for stage in stages:
        specs = [spec for spec in stage.inputs if spec.name in varying]
        if specs:
            specs += stage.outputs
            varying |= {spec.name for spec in stage.outputs}
        for spec in specs:
            axis = spec.shape[0] if spec.shape else 1
            batches.append(axes.get(axis, [BATCH])[-1] if isinstance(axis, str) else 1)
        shape = next((spec.shape for spec in stage.outputs if spec.name == name), shape)
    if len(shape) != 2 or not isinstance(shape[1], int) or (shape[0] != 1 and not isinstance(shape[0], str)):
        raise BadInput(f"the bundle gives {name} as {shape}, not a row [1,d] for a picture; export it again")
    return shape[1], max(1, min(batches))
