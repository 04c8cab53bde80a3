"""Boxes that an answer spells in its text."""

from __future__ import annotations

import re
from collections.abc import Iterator

from mllm_edge.bundle.answers import BoxesAnswer
from mllm_edge.runtime.answer import TextBox
from mllm_edge.runtime.turn import Need, Turn


def boxes(turn: Turn, entry: BoxesAnswer, need: Need) -> Iterator[TextBox]:
    """Every box of the text that has an area, in pixels of the picture, cut to it."""
    if turn.picture is None:
        return
    width, height = turn.picture.image.size
    for found in re.finditer(entry.pattern, turn.text):
        x1, y1, x2, y2 = (min(max(float(number) / entry.unit, 0.0), 1.0) for number in found.groups())
        if x1 < x2 and y1 < y2:
            yield TextBox(found.span(), turn.question, [x1 * width, y1 * height, x2 * width, y2 * height])
