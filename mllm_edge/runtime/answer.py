"""What a model answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mllm_edge.runtime.answers import rle

ORDERED = ("origin", "file", "score", "decided")  # what the parts of an answer's document say of a picture


def image_name(number: int) -> str:
    """The file of an answer's picture."""
    return f"image_{number}.png"


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
        label: what was asked for: the phrase, or the question where there is none.
        score: mean probability of the mask's pixels.
        box: x1,y1,x2,y2 of the mask's extent in pixels, None of an empty mask.
        pixels: bool [H,W], the picture's own size.
    """

    phrase: str
    span: tuple[int, int]
    label: str
    score: float
    box: list[int] | None
    pixels: NDArray[np.bool_]

    @cached_property
    def rle(self) -> dict[str, object]:
        """COCO's compressed run lengths."""
        return rle.encode(self.pixels)

    def to_json(self) -> dict[str, Any]:
        """The entry in the answer's document."""
        place = {"phrase": self.phrase, "span": list(self.span), "label": self.label}
        return {**place, "score": round(self.score, 4), "box": self.box, "rle": self.rle}


@dataclass(frozen=True)
class TextBox:
    """A box that the answer spells in its text at `span`: x1,y1,x2,y2 in pixels; `label` is what was asked for."""

    span: tuple[int, int]
    label: str
    box: list[float]


@dataclass(frozen=True)
class Picture:
    """A picture of the answer, at `span` of its text.

    Attributes:
        label: what was asked for.
        origin: "generated" or "retrieved".
        image: RGB.
        file: where a retrieved one is.
        score: how near a retrieved one is, or one of several that were drawn: the cosine, which the bundle scales for
            those that it retrieves.
        decided: how likely it was to be retrieved ("retrieve") and to be drawn ("generate"), where the bundle decides;
            without an index it is drawn all the same.
    """

    span: tuple[int, int]
    label: str
    origin: str
    image: Image.Image
    file: str = ""
    score: float | None = None
    decided: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The entry in the answer's document; the pixels are not in it."""
        found: dict[str, Any] = {"file": self.file} if self.origin == "retrieved" else {}
        if self.score is not None:
            found["score"] = self.score
        if self.decided:
            found["decided"] = {name: round(chance, 4) for name, chance in self.decided.items()}
        size = {"width": self.image.width, "height": self.image.height}
        return {"span": list(self.span), "label": self.label, "origin": self.origin, **size, **found}


Part = Mask | TextBox | Picture


@dataclass(frozen=True)
class Answer:
    """An answer and what it cost.

    `parts` are what it holds beside text. `timings` are milliseconds: `load` is the bundle's loading, `total` runs from
    the call to the last token or part and so does not contain it. Stages may run while tokens are written, so times may
    sum to more than `total`. A stage that did not run, because its result was known, took 0. `memory` is in MB (10^6).
    `picture` is the one that was looked at, `task` the one that was done, where the bundle has several, and `tags` are
    the words for the picture that the prompt held, if it holds such.
    """

    text: str
    tokens: Tokens
    timings: dict[str, float]
    memory: dict[str, float | None]
    parts: Sequence[Part] = field(default_factory=list)
    picture: Image.Image | None = None
    task: str = ""
    tags: list[str] | None = None

    @property
    def masks(self) -> list[Mask]:
        """Masks, in the order of the answer."""
        return [part for part in self.parts if isinstance(part, Mask)]

    @property
    def images(self) -> list[Picture]:
        """Generated and retrieved pictures."""
        return [part for part in self.parts if isinstance(part, Picture)]

    @property
    def in_order(self) -> list[str | Picture]:
        """The text with pictures where they belong, in the place of their tokens."""
        found, at = list[str | Picture](), 0
        for picture in self.images:
            start, end = picture.span
            found += [self.text[at:start], picture]
            at = max(at, end)
        return [part for part in (*found, self.text[at:]) if not isinstance(part, str) or part.strip()]

    @property
    def boxes(self) -> list[dict[str, Any]]:
        """Boxes of masks that are not empty, and of the text: `phrase`, `span`, `label`, `box`."""
        found: list[dict[str, Any]] = []
        for part in self.parts:
            box = None if isinstance(part, Picture) else part.box
            if box:
                phrase = part.phrase if isinstance(part, Mask) else self.text[slice(*part.span)]
                found.append({"phrase": phrase, "span": list(part.span), "label": part.label, "box": box})
        return found

    def to_json(self) -> dict[str, Any]:
        """The document that `mllm-edge run --json` prints."""
        return {
            "text": self.text,
            **({"task": self.task} if self.task else {}),
            **({} if self.tags is None else {"tags": self.tags}),
            "tokens": vars(self.tokens),
            "masks": [mask.to_json() for mask in self.masks],
            "boxes": self.boxes,
            "images": [picture.to_json() for picture in self.images],
            **({"parts": self._parts()} if self.images else {}),
            "timings_ms": {name: round(value, 3) for name, value in self.timings.items()},
            "memory_mb": self.memory,
        }

    def _parts(self) -> list[dict[str, Any]]:
        """The answer in its order: texts, and pictures by the names of their files."""
        found, number = list[dict[str, Any]](), 0
        for part in self.in_order:
            if isinstance(part, str):
                found.append({"text": part})
                continue
            about = {name: value for name, value in part.to_json().items() if name in ORDERED}
            found.append({"image": image_name(number), **about})
            number += 1
        return found
