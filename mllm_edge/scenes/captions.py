"""Captions of whole scenes, with the spans of their phrases."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mllm_edge.scenes.model import Scene, pick
from mllm_edge.scenes.phrases import (
    at_location,
    capitalized,
    full_description,
    joined,
    line_order,
    location,
    reading_order,
    with_article,
)

_FRAMES = ("{}.", "There is {}.", "The picture shows {}.", "A picture of {}.")
_DETAILS = ("look", "size and look", "look and place", "everything")


@dataclass(frozen=True)
class GroundedCaption:
    """A caption and its phrases.

    Attributes:
        text: The caption.
        spans: (start, end, object index): `text[start:end]` names that object, article included.
            In text order, one span per object.
    """

    text: str
    spans: tuple[tuple[int, int, int], ...]


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """Returns a sentence such as "A large red circle and a small blue square.".

    Args:
        scene: A scene with at least one object.
        rng: Chooses the frame and how much is said.

    Returns:
        One sentence that names every object once, from left to right.

    Raises:
        ValueError: The scene has no object.
    """
    return _write(scene, reading_order(scene.objects), pick(rng, _FRAMES), pick(rng, _DETAILS)).text


def full_caption(scene: Scene, rng: np.random.Generator) -> str:
    """Returns a caption with the size, color, shape and (where clear) the place of every object."""
    return _write(scene, reading_order(scene.objects), pick(rng, _FRAMES), "everything").text


def grounded_caption(scene: Scene, rng: np.random.Generator, form: int | None = None) -> GroundedCaption:
    """Returns a caption with the character span and object of each of its phrases.

    Objects are in line order, as the decoder reads the picture's patches: with objects from left to right, as in
    `caption`, a small decoder loses count sooner.

    Args:
        scene: A scene with at least one object.
        rng: Chooses the frame and how much is said, unless `form` (0..3) does.
        form: Selects the frame and the level of detail.

    Returns:
        The caption with one span per object.

    Raises:
        ValueError: The scene has no object.
    """
    order = line_order(scene.objects)
    if form is not None:
        return _write(scene, order, _FRAMES[form], _DETAILS[form])
    return _write(scene, order, pick(rng, _FRAMES), pick(rng, _DETAILS))


def _write(scene: Scene, order: Sequence[int], frame: str, detail: str) -> GroundedCaption:
    if not scene.objects:
        raise ValueError("a scene without objects has no caption; give one with at least one object")
    phrases: list[str] = []
    places: list[str] = []
    for index in order:
        item = scene.objects[index]
        look = str(full_description(item)) if detail in ("size and look", "everything") else " ".join(item.pair)
        phrase = with_article(look)
        phrases.append(f"another {look}" if phrase in phrases else phrase)
        name = location(item) if detail in ("look and place", "everything") else None
        places.append(f" {at_location(name)}" if name else "")
    text = capitalized(frame.format(joined([phrase + place for phrase, place in zip(phrases, places, strict=True)])))

    spans: list[tuple[int, int, int]] = []
    # Search each phrase after the previous one, and past a frame that itself begins with an article.
    end = frame.index("{}")
    for index, phrase in zip(order, phrases, strict=True):
        start = text.lower().index(phrase, end)
        end = start + len(phrase)
        spans.append((start, end, index))
    return GroundedCaption(text, tuple(spans))
