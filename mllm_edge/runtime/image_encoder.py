"""Pictures to embeddings: preprocessing and stages in manifest order, with a cache so that none is encoded twice."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass

from PIL import Image

from mllm_edge.bundle import Manifest
from mllm_edge.errors import BadInput
from mllm_edge.runtime.images import pixel_hash
from mllm_edge.runtime.preprocess import preprocess
from mllm_edge.runtime.stage import Array, Floats, Stage

EMBEDS = "image_embeds"  # the tensor that is spliced into the language model's input
CACHE_BYTES = 64 << 20  # about seven pictures of a 7B LLaVA


@dataclass(frozen=True)
class Picture:
    """A picture as the language model sees it: float32 [N,D], named by the hash of its pixels."""

    key: str
    embeds: Floats


class ImageEncoder:
    """Runs the stages that lead to `image_embeds`. Stages are wired by tensor names."""

    def __init__(self, manifest: Manifest, stages: Mapping[str, Stage]):
        self._manifest, self._stages = manifest, stages
        self._cache: OrderedDict[str, Picture] = OrderedDict()
        outputs = [spec for stage in manifest.stages for spec in stage.outputs if spec.name == EMBEDS]
        shape = outputs[-1].shape if outputs else []
        self.positions = shape[1] if len(shape) == 3 and isinstance(shape[1], int) else 0

    def encode(self, image: Image.Image, timings: dict[str, float]) -> Picture:
        """Embeddings of one RGB picture, from the cache when its pixels are known.

        Args:
            image: as `images.load_image` gives it.
            timings: milliseconds by stage name (and `preprocess`) are added here.
        """
        key = pixel_hash(image)
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key]
        picture = Picture(key, self._run(image, timings))
        self._cache[key] = picture
        while len(self._cache) > 1 and sum(kept.embeds.nbytes for kept in self._cache.values()) > CACHE_BYTES:
            self._cache.popitem(last=False)
        return picture

    def _run(self, image: Image.Image, timings: dict[str, float]) -> Floats:
        arrays: dict[str, Array] = {}
        for step in self._manifest.preprocessing:
            start = time.perf_counter()
            arrays[step.input] = preprocess(image, step)
            _add(timings, "preprocess", start)
        for entry in self._manifest.stages:
            inputs = {spec.name: arrays[spec.name] for spec in entry.inputs if spec.name in arrays}
            if EMBEDS in arrays or len(inputs) < len(entry.inputs):
                continue  # a stage of another kind of answer
            start = time.perf_counter()
            arrays |= self._stages[entry.name](**inputs)
            _add(timings, entry.name, start)
        if EMBEDS not in arrays:
            raise BadInput(f"the bundle's stages give no {EMBEDS}; this system takes no pictures")
        embeds: Floats = arrays[EMBEDS][0]
        return embeds


def _add(timings: dict[str, float], name: str, start: float) -> None:
    timings[name] = timings.get(name, 0.0) + 1000 * (time.perf_counter() - start)
