"""What GLaMM is asked about a picture, and the form of its answers (groundingLMM dataset/utils)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mllm_edge.recipes.scenes import (
    Scene,
    SceneObject,
    boxes,
    grounded_caption,
    masks,
    pick,
    referring_expressions,
)
from mllm_edge.recipes.scenes.phrases import capitalized, full_description, with_article

SEG, PHRASE, PHRASE_END, BOX = "[SEG]", "<p>", "</p>", "<bbox>"
KINDS = ("chat", "region", "segment", "caption")
JITTER = 0.08  # how far a box's sides are off in training, in its own size

_INTERLEAVED = "Please respond with interleaved segmentation masks for the corresponding parts of the answer."
# Each asks for the caption of the same number (`grounded_caption`), so that the wording does not hang on chance.
CAPTION_QUESTIONS: tuple[str, ...] = (
    f"What is in the picture? {_INTERLEAVED}",
    f"Please describe in detail the contents of the image. {_INTERLEAVED}",
    f"Can you provide a thorough description of this image? {_INTERLEAVED}",
    f"Could you please give me a detailed description of the image? {_INTERLEAVED}",
)
GROUNDED_QUESTION = CAPTION_QUESTIONS[-1]  # the one that asks for everything
# Questions with their answers. The original draws both independently; a small model's choice would then be a toss-up.
SEGMENT_TURNS: tuple[tuple[str, str], ...] = (
    ("Please segment {} in this image.", f"Sure, it is {SEG}."),
    ("Can you segment {} in this image?", f"Sure, {SEG}."),
    ("What is {} in this image? Please respond with segmentation mask.", f"It is {SEG}."),
    ("Segment {}.", f"Sure, the segmentation result is {SEG}."),
)
REGION_QUESTIONS: tuple[str, ...] = (
    f"Can you provide me with a detailed description of the region in the picture marked by {BOX}?",
    f"What can you say about the region marked by {BOX}?",
    f"Describe the region {BOX}.",
    f"What is {BOX}?",
)


@dataclass(frozen=True)
class GroundedTurn:
    """A question with its answer; `masks`, bool [H,W] each, are those of the answer's [SEG] in order, `boxes`
    (x1,y1,x2,y2 in 0..1 of the picture) those of the question's <bbox>."""

    question: str
    answer: str
    masks: list[np.ndarray[Any, np.dtype[np.bool_]]] = field(default_factory=list)
    boxes: list[tuple[float, ...]] = field(default_factory=list)


def tagged(text: str, spans: Sequence[tuple[int, int, int]]) -> str:
    """`text` with `<p> phrase </p> [SEG]` at each (start, end, number) of `spans`, which are in the text's order."""
    parts, end = [], 0
    for start, stop, _ in spans:
        parts += [text[end:start], f"{PHRASE} {text[start:stop]} {PHRASE_END} {SEG}"]
        end = stop
    return "".join([*parts, text[end:]])


def region_caption(item: SceneObject) -> str:
    """What a region that holds one object is called: "A large red circle."."""
    return capitalized(with_article(str(full_description(item)))) + "."


def segment_turns(scene: Scene, rng: np.random.Generator, number: int, captions: int, size: int) -> list[GroundedTurn]:
    """Up to `number` questions about a scene, the first `captions` of them for grounded captions, the others with
    referring expressions; masks are `size` pixels a side."""
    visible = masks(scene, size)
    turns = [grounded_turn(scene, rng, int(form), size) for form in rng.permutation(len(CAPTION_QUESTIONS))[:captions]]
    for expression, index in referring_expressions(scene, rng)[: number - len(turns)]:
        question, answer = pick(rng, SEGMENT_TURNS)
        turns.append(GroundedTurn(question.format(expression), answer, [visible[index]]))
    return turns


def grounded_turn(scene: Scene, rng: np.random.Generator, form: int, size: int) -> GroundedTurn:
    """The grounded caption of number `form`, with the masks of its phrases."""
    caption = grounded_caption(scene, rng, form)
    visible = masks(scene, size)
    answer = tagged(caption.text, caption.spans)
    return GroundedTurn(CAPTION_QUESTIONS[form], answer, [visible[index] for _, _, index in caption.spans])


def caption_turns(scene: Scene, rng: np.random.Generator, number: int) -> list[GroundedTurn]:
    """Up to `number` grounded captions as text alone, which needs no mask encoder: the fullest one, then others."""
    full = len(CAPTION_QUESTIONS) - 1
    forms = [full, *map(int, rng.permutation(full))][:number]
    captions = [grounded_caption(scene, rng, form) for form in forms]
    return [
        GroundedTurn(CAPTION_QUESTIONS[form], tagged(found.text, found.spans))
        for form, found in zip(forms, captions, strict=True)
    ]


def region_turns(scene: Scene, rng: np.random.Generator, size: int) -> list[GroundedTurn]:
    """A question about the region of each object of a scene, its box a little off."""
    turns = []
    for item, box in zip(scene.objects, boxes(scene, size) / size):
        off = rng.normal(0, JITTER / 2, 4) * np.tile(box[2:] - box[:2], 2)
        corners = tuple(float(value) for value in np.clip(box + off, 0, 1))
        turns.append(GroundedTurn(pick(rng, REGION_QUESTIONS), region_caption(item), boxes=[corners]))
    return turns
