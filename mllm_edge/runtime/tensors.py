"""Pictures to tensors: preprocessing and stages, run when a tensor is asked for and never twice for one picture."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from mllm_edge.bundle.manifest import Manifest
from mllm_edge.errors import BadInput
from mllm_edge.runtime.boxes import Box, normalized
from mllm_edge.runtime.engines.interface import Array, Floats
from mllm_edge.runtime.engines.lazy import LazyStage
from mllm_edge.runtime.images import pixel_hash
from mllm_edge.runtime.preprocess import preprocess
from mllm_edge.runtime.wiring import BOXES, EMBEDS, REGION_EMBEDS

CACHE_BYTES = 64 << 20  # about three pictures of a 7B GLaMM, seven of a 7B LLaVA


@dataclass(frozen=True)
class Picture:
    """A picture as the language model sees it: float32 [N,D], named by the hash of its pixels, with the pixels."""

    key: str
    embeds: Floats
    image: Image.Image


class Region(Picture):
    """A region of a picture as the language model sees it: float32 [1,D], named by picture and box."""


class ImageEncoder:
    """Runs the stages that lead to a tensor. Stages are wired by tensor names.

    Safe to be called from two threads; one waits for the other.
    """

    def __init__(self, manifest: Manifest, stages: Mapping[str, LazyStage]):
        self._stages = stages
        self._makers = {spec.name: entry for entry in manifest.stages for spec in entry.outputs}
        self._pixels = {step.input: step for step in manifest.preprocessing}
        self._kept = {EMBEDS} | {
            spec.name
            for entry in manifest.stages
            if not all(self._from_picture(spec.name) for spec in entry.inputs)
            for spec in entry.inputs
        }
        self._cache: OrderedDict[str, dict[str, Array]] = OrderedDict()
        self._lock = threading.RLock()
        shape = next((spec.shape for stage in manifest.stages for spec in stage.outputs if spec.name == EMBEDS), [])
        self.positions = shape[1] if len(shape) == 3 and isinstance(shape[1], int) else 0

    def encode(self, image: Image.Image, timings: dict[str, float]) -> Picture:
        """Embeddings of one RGB picture, from the cache when its pixels are known.

        Args:
            image: as `images.load_image` gives it.
            timings: milliseconds by stage name (and `preprocess`) are added here.
        """
        key = pixel_hash(image)
        embeds: Floats = self._tensor(key, image, EMBEDS, timings)[0]
        return Picture(key, embeds, image)

    def regions(self, picture: Picture, boxes: Sequence[Box], timings: dict[str, float]) -> list[Region]:
        """Embeddings of regions of a picture; boxes are x1,y1,x2,y2 in its pixels, checked already."""
        entry = self._makers[REGION_EMBEDS]
        places = normalized(boxes, picture.image.size)
        names = [spec.name for spec in entry.inputs if spec.name != BOXES]
        inputs = {BOXES: places, **{name: self.tensor(picture, name, timings) for name in names}}
        stage = self._stages[entry.name]
        stage.load()
        start = time.perf_counter()
        embeds = np.asarray(stage(**inputs)[REGION_EMBEDS])
        _add(timings, entry.name, start)
        return [
            Region(f"{picture.key}:{tuple(place)}", row[None], picture.image)
            for place, row in zip(places.tolist(), embeds)
        ]

    def tensor(self, picture: Picture, name: str, timings: dict[str, float]) -> Array:
        """What stages make of a picture under a tensor's name. Raises BadInput where no stage gives it."""
        return self._tensor(picture.key, picture.image, name, timings)

    def _tensor(self, key: str, image: Image.Image, name: str, timings: dict[str, float]) -> Array:
        if not self._from_picture(name):
            raise BadInput(f"the bundle's stages give no {name}; this system takes no pictures")
        with self._lock:
            arrays = self._cache.setdefault(key, {})
            self._cache.move_to_end(key)
            if name not in arrays:
                made = dict(arrays)
                self._run(image, name, made, timings)
                arrays |= {
                    kept: _lasting(kept, array) for kept, array in made.items() if kept in self._kept - set(arrays)
                }
                self._forget()
                return arrays.get(name, made[name])
            return arrays[name]

    def _from_picture(self, name: str) -> bool:
        if name in self._pixels:
            return True
        return name in self._makers and all(self._from_picture(spec.name) for spec in self._makers[name].inputs)

    def _run(self, image: Image.Image, name: str, arrays: dict[str, Array], timings: dict[str, float]) -> None:
        """Put the tensor into `arrays`, and on the way all that it is made from."""
        if name in self._pixels:
            start = time.perf_counter()
            arrays[name] = preprocess(image, self._pixels[name])
            _add(timings, "preprocess", start)
            return
        entry = self._makers[name]
        for spec in entry.inputs:
            if spec.name not in arrays:
                self._run(image, spec.name, arrays, timings)
        stage = self._stages[entry.name]
        stage.load()
        start = time.perf_counter()
        given = stage(**{spec.name: arrays[spec.name] for spec in entry.inputs})
        for array in given.values():
            if not isinstance(array, np.ndarray):
                array.wait()  # or the next stage would be charged for it
        arrays |= given
        _add(timings, entry.name, start)

    def _forget(self) -> None:
        def held() -> int:
            return sum(array.nbytes for arrays in self._cache.values() for array in arrays.values())

        while len(self._cache) > 1 and held() > CACHE_BYTES:
            self._cache.popitem(last=False)


def _lasting(name: str, array: Array) -> Array:
    """What no later picture overwrites: embeddings for the language model, which reads them from the host, and tensors
    where they are."""
    if isinstance(array, np.ndarray):
        return array
    return np.asarray(array) if name == EMBEDS else array.kept()


def _add(timings: dict[str, float], name: str, start: float) -> None:
    timings[name] = timings.get(name, 0.0) + 1000 * (time.perf_counter() - start)
