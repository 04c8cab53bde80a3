"""GLaMM's turns from a user's own files: RefCOCO's references and GranD-f's grounded captions."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mllm_edge.errors import BadInput
from mllm_edge.models.glamm.model import GlammDims
from mllm_edge.models.glamm.prompts import CAPTION_QUESTIONS, REGION_QUESTIONS, SEGMENT_TURNS
from mllm_edge.recipes.data.grounded import GroundedTurn, tagged
from mllm_edge.recipes.data.readers import GroundedEntry, Reference, read_grandf, read_refcoco
from mllm_edge.recipes.data.segmentation import decode_segmentation
from mllm_edge.runtime.images import load_image
from mllm_edge.runtime.preprocess import longest_side
from mllm_edge.scenes import pick
from mllm_edge.scenes.phrases import capitalized

Mask = np.ndarray[Any, np.dtype[np.bool_]]
MOST = 3  # expressions per picture in a conversation, as in the original


@dataclass(frozen=True)
class GroundedFiles:
    """The files in a recipe's `data`: `refs` with `instances` and `split` (RefCOCO), `grandf` (GranD-f), or both, and
    `images`, the folder of the pictures."""

    references: list[list[Reference]]  # by picture
    captions: list[GroundedEntry]
    images: Path

    @classmethod
    def from_recipe(cls, data: dict[str, Any]) -> GroundedFiles | None:
        """The files that `data` names, or None if it names none. Raises BadInput when one is malformed."""
        if "refs" not in data and "grandf" not in data:
            return None
        if "refs" in data and "instances" not in data:
            raise BadInput("data.refs goes with data.instances, the COCO annotations that came with them; add it")
        by_picture: dict[int, list[Reference]] = defaultdict(list)
        if "refs" in data:
            for reference in read_refcoco(data["refs"], data["instances"], data.get("split", "train")):
                by_picture[reference.image.id].append(reference)
        captions = read_grandf(data["grandf"]) if "grandf" in data else []
        return cls(list(by_picture.values()), captions, Path(data.get("images", ".")))

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of questions that the files can answer."""
        return ("region", "segment") if self.references else ("segment",)

    def draw(self, kind: str, rng: np.random.Generator, dims: GlammDims) -> tuple[Image.Image, list[GroundedTurn]]:
        """A picture and turns of `kind` about it; masks are in the mask encoder's frame."""
        total = len(self.references) + (len(self.captions) if kind == "segment" else 0)
        number = int(rng.integers(total))
        if number >= len(self.references):
            entry = self.captions[number - len(self.references)]
            picture = load_image(self.images / entry.file_name)
            return picture, [caption_turn(entry, picture, pick(rng, CAPTION_QUESTIONS), dims)]
        references = [pick(rng, self.references[number]) for _ in range(MOST)]
        references = list({reference.id: reference for reference in references}.values())
        picture = load_image(self.images / references[0].image.file_name)
        turn = self._region if kind == "region" else self._segment
        return picture, [turn(reference, picture, rng, dims) for reference in references]

    def _region(
        self, reference: Reference, picture: Image.Image, rng: np.random.Generator, dims: GlammDims
    ) -> GroundedTurn:
        box = tuple(value / side for value, side in zip(reference.object.box, picture.size * 2))
        sentence = capitalized(pick(rng, reference.sentences))
        return GroundedTurn(pick(rng, REGION_QUESTIONS), sentence, boxes=[box])

    def _segment(
        self, reference: Reference, picture: Image.Image, rng: np.random.Generator, dims: GlammDims
    ) -> GroundedTurn:
        question, answer = pick(rng, SEGMENT_TURNS)
        mask = in_frame(reference_mask(reference, picture), dims.mask_encoder.image_size)
        return GroundedTurn(question.format(pick(rng, reference.sentences)), answer, [mask])


def caption_turn(entry: GroundedEntry, picture: Image.Image, question: str, dims: GlammDims) -> GroundedTurn:
    """The grounded caption of a picture as an answer to `question`."""
    size = dims.mask_encoder.image_size
    found = [in_frame(union(entry.segmentations[number], picture), size) for _, _, number in entry.spans]
    return GroundedTurn(question, tagged(entry.caption, entry.spans), found)


def reference_mask(reference: Reference, picture: Image.Image) -> Mask:
    """The mask of a reference, bool [H,W]. Raises BadInput when it has none."""
    if reference.object.segmentation is None:
        raise BadInput(f"reference {reference.id} has no segmentation; use instances with masks")
    return decode_segmentation(reference.object.segmentation, picture.height, picture.width)


def union(segmentations: Sequence[Any], picture: Image.Image) -> Mask:
    """The union of the segmentations, bool [H,W]."""
    whole: Mask = np.zeros((picture.height, picture.width), np.bool_)
    for segmentation in segmentations:
        whole |= decode_segmentation(segmentation, picture.height, picture.width)
    return whole


def in_frame(mask: Mask, size: int) -> Mask:
    """A mask [H,W] in the mask encoder's frame [size,size]: longest side `size`, zeros at the right and below.

    The original compares masks one by one at each picture's own size; in one frame they go through the loss as a batch.
    """
    width, height = longest_side(mask.shape[1], mask.shape[0], size)
    frame: Mask = np.zeros((size, size), np.bool_)
    frame[:height, :width] = np.asarray(Image.fromarray(mask).resize((width, height), Image.Resampling.NEAREST))
    return frame
