"""What a model answers."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mllm_edge.runtime.answers import rle


@dataclass(frozen=True)
class Tokens:
    """Positions of the prompt (pictures included), those that pictures took, and generated tokens with their ids.

    `ids` includes the token that ended the answer, if one did.
    """

    prompt: int
    image: int
    generated: int
    ids: list[int]


@dataclass(frozen=True)
class Mask:
    """A mask and the words that it is tied to.

    Attributes:
        phrase: words of the answer, "" where the mask stands alone.
        span: where they stand in the answer's text.
        score: mean probability of the mask's pixels.
        box: x1,y1,x2,y2 of the mask's extent in pixels, None of an empty mask.
        pixels: bool [H,W], the picture's own size.
    """

    phrase: str
    span: tuple[int, int]
    score: float
    box: list[int] | None
    pixels: NDArray[np.bool_]

    @cached_property
    def rle(self) -> dict[str, object]:
        """COCO's compressed run lengths."""
        return rle.encode(self.pixels)

    def to_json(self) -> dict[str, Any]:
        """The entry in the answer's document."""
        return {"phrase": self.phrase, "score": round(self.score, 4), "box": self.box, "rle": self.rle}


@dataclass(frozen=True)
class Answer:
    """An answer and what it cost.

    `timings` are milliseconds: `load` is the bundle's loading, `total` runs from the call to the last token or mask and
    so does not contain it. The mask encoder runs while tokens are written, so parts may sum to more than `total`.
    A stage that did not run, because the picture was known, took 0. `memory` is in MB (10^6).
    """

    text: str
    tokens: Tokens
    timings: dict[str, float]
    memory: dict[str, float | None]
    masks: list[Mask] = field(default_factory=list)
    images: list[dict[str, Any]] = field(default_factory=list)

    @property
    def boxes(self) -> list[dict[str, Any]]:
        """The boxes of the masks that are not empty: `phrase` and `box`."""
        return [{"phrase": mask.phrase, "box": mask.box} for mask in self.masks if mask.box]

    def to_json(self) -> dict[str, Any]:
        """The document that `mllm-edge run --json` prints."""
        return {
            "text": self.text,
            "tokens": vars(self.tokens),
            "masks": [mask.to_json() for mask in self.masks],
            "boxes": self.boxes,
            "images": self.images,
            "timings_ms": {name: round(value, 3) for name, value in self.timings.items()},
            "memory_mb": self.memory,
        }
