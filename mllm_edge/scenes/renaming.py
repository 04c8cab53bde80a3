"""Texts about scenes with other names for colors and shapes: a language knows more words than pictures show."""

import re
from dataclasses import replace

import numpy as np

from mllm_edge.scenes.model import COLORS, HELD_OUT_PAIRS, SHAPES, Scene
from mllm_edge.scenes.questions import Question

# With regular plurals, and none is a prefix of another.
MORE_COLORS = ("pink", "brown", "gray", "black", "golden", "silver", "beige", "teal", "violet", "lime", "navy", "tan")
MORE_SHAPES = ("heart", "diamond", "arrow", "moon", "cloud", "flower", "key", "bell", "drop", "spiral", "oval", "kite")

_PLURALS = {"crosses": "cross"}
_WORD = re.compile(r"[a-z]+", re.IGNORECASE)
_ARTICLE = re.compile(r"\b([Aa])n? (?=([a-z]))")


def rename(
    scene: Scene, texts: list[str], asked: list[Question], rng: np.random.Generator
) -> tuple[list[str], list[Question]]:
    """Gives every color and shape a name drawn from all names, the same one wherever it occurs.

    A model trained on such texts must look names up, since no name predicts another. Held-out pairs are never named.

    Args:
        scene: What `texts` and `asked` are about.
        texts: Texts about the scene.
        asked: Questions about it.
        rng: Draws the names.
    """
    while True:
        names = _draw(COLORS, MORE_COLORS, rng) | _draw(SHAPES, MORE_SHAPES, rng)
        shown = {(names[item.color], names[item.shape]) for item in scene.objects}
        renamed = [
            replace(
                q, question=_said(q.question, names), answer=_said(q.answer, names), sentence=_said(q.sentence, names)
            )
            for q in asked
        ]
        told = [_said(text, names) for text in texts]
        said = " ".join([*told, *(f"{q.question} {q.sentence}" for q in renamed)])
        if shown.isdisjoint(HELD_OUT_PAIRS) and not any(" ".join(pair) in said for pair in HELD_OUT_PAIRS):
            return told, renamed


def _draw(known: tuple[str, ...], more: tuple[str, ...], rng: np.random.Generator) -> dict[str, str]:
    drawn = rng.permutation(len(known) + len(more))[: len(known)]
    return {name: (*known, *more)[i] for name, i in zip(known, drawn, strict=True)}


def _said(text: str, names: dict[str, str]) -> str:
    def other(found: re.Match[str]) -> str:
        word = found[0]
        single = _PLURALS.get(word, word.removesuffix("s") if word.removesuffix("s") in names else word)
        if single not in names:
            return word
        name = names[single]
        return name if single == word else name + ("es" if name.endswith("s") else "s")

    changed = _WORD.sub(other, text)
    return _ARTICLE.sub(lambda found: f"{found[1]}{'n' if found[2] in 'aeiou' else ''} ", changed)
