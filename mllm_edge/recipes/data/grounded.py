"""Turns of a dialogue about a scene for GLaMM's training, with the masks and boxes that they refer to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mllm_edge.models.glamm.prompts import (
    CAPTION_QUESTIONS,
    PHRASE,
    PHRASE_END,
    REGION_QUESTIONS,
    SEG,
    SEGMENT_TURNS,
)
from mllm_edge.recipes.data.scene_pixels import square_masks
from mllm_edge.scenes import Scene, SceneObject, boxes, grounded_caption, pick, referring_expressions
from mllm_edge.scenes.phrases import capitalized, full_description, with_article

KINDS = ("chat", "region", "segment", "caption")
JITTER = 0.08  # random shift of a box's sides in training, relative to its size


@dataclass(frozen=True)
class GroundedTurn:
    """A question with its answer; `masks`, bool [H,W] each, belong to the answer's mask tokens in order, `boxes`
    (x1,y1,x2,y2 in 0..1 of the picture) to the question's placeholders."""

    question: str
    answer: str
    masks: list[np.ndarray[Any, np.dtype[np.bool_]]] = field(default_factory=list)
    boxes: list[tuple[float, ...]] = field(default_factory=list)


def tagged(text: str, spans: Sequence[tuple[int, int, int]]) -> str:
    """`text` with its phrases tagged, a mask token after each: (start, end, number) of `spans`, in text order."""
    parts, end = [], 0
    for start, stop, _ in spans:
        parts += [text[end:start], f"{PHRASE} {text[start:stop]} {PHRASE_END} {SEG}"]
        end = stop
    return "".join([*parts, text[end:]])


def region_caption(item: SceneObject) -> str:
    """The caption of a region that holds one object: "A large red circle."."""
    return capitalized(with_article(str(full_description(item)))) + "."


def segment_turns(scene: Scene, rng: np.random.Generator, number: int, captions: int, size: int) -> list[GroundedTurn]:
    """Up to `number` questions about a scene, the first `captions` for grounded captions, the others with referring
    expressions; masks are in the mask encoder's frame of `size` pixels a side."""
    visible = square_masks(scene, size, centered=False)
    turns = [grounded_turn(scene, rng, int(form), size) for form in rng.permutation(len(CAPTION_QUESTIONS))[:captions]]
    for expression, index in referring_expressions(scene, rng)[: number - len(turns)]:
        question, answer = pick(rng, SEGMENT_TURNS)
        turns.append(GroundedTurn(question.format(expression), answer, [visible[index]]))
    return turns


def grounded_turn(scene: Scene, rng: np.random.Generator, form: int, size: int) -> GroundedTurn:
    """The grounded caption in form number `form`, with the masks of its phrases."""
    caption = grounded_caption(scene, rng, form)
    visible = square_masks(scene, size, centered=False)
    answer = tagged(caption.text, caption.spans)
    return GroundedTurn(CAPTION_QUESTIONS[form], answer, [visible[index] for _, _, index in caption.spans])


def caption_turns(scene: Scene, rng: np.random.Generator, number: int) -> list[GroundedTurn]:
    """Up to `number` grounded captions as text alone (no mask encoder needed): the most detailed, then others."""
    full = len(CAPTION_QUESTIONS) - 1
    forms = [full, *map(int, rng.permutation(full))][:number]
    captions = [grounded_caption(scene, rng, form) for form in forms]
    return [
        GroundedTurn(CAPTION_QUESTIONS[form], tagged(found.text, found.spans))
        for form, found in zip(forms, captions, strict=True)
    ]


def region_turns(scene: Scene, rng: np.random.Generator, size: int) -> list[GroundedTurn]:
    """A question about the region of each object of a scene, with a jittered box."""
    turns = []
    for item, box in zip(scene.objects, boxes(scene, size) / np.tile(scene.extent(size), 2)):
        off = rng.normal(0, JITTER / 2, 4) * np.tile(box[2:] - box[:2], 2)
        corners = tuple(float(value) for value in np.clip(box + off, 0, 1))
        turns.append(GroundedTurn(pick(rng, REGION_QUESTIONS), region_caption(item), boxes=[corners]))
    return turns
