"""Scenes and questions in the fewest words, on which a decoder learns look-ups first.

With whole sentences the loss only falls once the decoder reads the question's noun, finds it in the scene and copies
its attribute to the answer, all at once; for many hundred steps it guesses among the objects present. In brief texts,
where one word follows another of the same object, each of these abilities lowers the loss by itself.
"""

from collections.abc import Sequence

import numpy as np

from mllm_edge.scenes.model import SceneObject, pick, shuffled
from mllm_edge.scenes.phrases import location
from mllm_edge.scenes.questions import Question

_FILLERS = frozenset(("is", "the", "are", "there", "you", "can", "see", "which", "of", "in", "at", "on", "a", "an"))


def attributes(item: SceneObject) -> list[str]:
    """Returns an object's attributes in words: size, color, shape and, where it is clear, the place."""
    place = location(item)
    return [item.size, item.color, item.shape, *([place] if place else [])]


def telegram(things: Sequence[Sequence[str]], rng: np.random.Generator) -> tuple[str, str]:
    """Names one of several things by its attributes in any order.

    Args:
        things: The attributes of each, see `attributes`.
        rng: Draws the thing and the order.

    Returns:
        The first attribute and the others: "circle", "top left red small".
    """
    first, *others = shuffled(rng, pick(rng, things))
    return first, " ".join(others)


def terse(question: Question) -> tuple[str, str]:
    """Returns question and answer without filler words: "How many red rings?" and "2", "What color ring?" and
    "red"."""
    words = [word for word in question.question.removesuffix("?").split() if word.lower() not in _FILLERS]
    return " ".join(words) + "?", question.answer
