"""Scenes as text alone, for a language model that is trained before any pictures."""

from dataclasses import dataclass, replace

import numpy as np

from mllm_edge.scenes.brief import attributes
from mllm_edge.scenes.captions import caption, full_caption
from mllm_edge.scenes.edits import edit
from mllm_edge.scenes.legible import is_legible
from mllm_edge.scenes.model import Scene, pick, shuffled
from mllm_edge.scenes.phrases import cell_center
from mllm_edge.scenes.questions import Question, draw_questions, questions
from mllm_edge.scenes.renaming import rename
from mllm_edge.scenes.wide import mixed_scene

_STREAM = 77  # separates the random stream of the words from that of the scene, which has the same index
_MOST_QUESTIONS = 4


def scene_text(index: int, seed: int = 0, wide: float = 0.0) -> str:
    """Describes one scene of the train split: a caption, a dialogue about a description, or an edit.

    Every answer follows from the description before it. A dialogue reads "A small red circle at the
    top left. Question: What color is the circle? Answer: red.", an edit "Before: ... Instruction:
    ... After: ...".

    Args:
        index: Number of the text, from 0.
        seed: Another seed gives another series of texts.
        wide: Share of wide scenes.

    Returns:
        One line of text.

    Raises:
        ValueError: The index or seed is negative.
    """
    scene = _snapped(mixed_scene("train", index, seed, wide))
    rng = np.random.default_rng(np.random.SeedSequence([seed, _STREAM, index]))
    form = rng.random()
    if form < 0.25:
        return caption(scene, rng)
    # Objects in one cell now overlap, and some cannot be told apart, so there may be nothing to edit.
    if form < 0.9 or not is_legible(scene):
        return f"{full_caption(scene, rng)} {_dialogue(scene, rng)}"
    change = edit(scene, rng)
    before, after = full_caption(scene, rng), full_caption(change.after, rng)
    return f"Before: {before} Instruction: {change.instruction} After: {after}"


@dataclass(frozen=True)
class ToldScene:
    """A scene in words.

    Attributes:
        text: A complete caption.
        things: The same as bare words: the attributes of each object (see `attributes`).
        questions: Questions answered by either, all kinds equally likely.
    """

    text: str
    things: list[list[str]]
    questions: list[Question]


def told_scene(index: int, seed: int = 0, other_names: bool = False, wide: float = 0.0) -> ToldScene:
    """Describes one scene of the train split in full.

    Args:
        index: Number of the scene, from 0.
        seed: Another seed gives another series.
        other_names: Rename its colors and shapes (see `rename`).
        wide: Share of wide scenes.

    Raises:
        ValueError: The index or seed is negative.
    """
    scene = _snapped(mixed_scene("train", index, seed, wide))
    rng = np.random.default_rng(np.random.SeedSequence([seed, _STREAM + 1, index]))
    asked = questions(scene, rng)
    texts = [full_caption(scene, rng), *(", ".join(attributes(item)) for item in scene.objects)]
    drawn = draw_questions(asked, rng, len(asked))
    if other_names:
        texts, drawn = rename(scene, texts, drawn, rng)
    return ToldScene(texts[0], [text.split(", ") for text in texts[1:]], drawn)


def _dialogue(scene: Scene, rng: np.random.Generator) -> str:
    asked = questions(scene, rng)
    # By kind first: a scene allows many more questions of some kinds than of others.
    kinds = sorted({question.kind for question in asked})
    turns: list[str] = []
    for kind in shuffled(rng, kinds)[: int(rng.integers(1, _MOST_QUESTIONS + 1))]:
        question = pick(rng, [question for question in asked if question.kind == kind])
        answer = question.sentence if rng.random() < 0.5 else f"{question.answer}."
        turns.append(f"Question: {question.question} Answer: {answer}")
    return " ".join(turns)


def _snapped(scene: Scene) -> Scene:
    """Moves every object to the middle of its grid cell, so that the words describe the scene completely."""
    moved = []
    for item in scene.objects:
        x, y = cell_center(item)
        moved.append(replace(item, x=x, y=y))
    return replace(scene, objects=tuple(moved))
