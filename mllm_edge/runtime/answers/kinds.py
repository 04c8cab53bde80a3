"""Kinds of answers beside text: a function each, `(turn, entry, need) -> parts`, and where their parts are written."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from mllm_edge.runtime.answer import Part
from mllm_edge.runtime.answers.boxes import boxes
from mllm_edge.runtime.answers.masks import masks
from mllm_edge.runtime.answers.pictures import pictures
from mllm_edge.runtime.answers.retrieved import retrieved
from mllm_edge.runtime.turn import Need, Turn

KINDS: dict[str, Callable[[Turn, Any, Need], Iterator[Part]]] = {
    "masks": masks,
    "boxes": boxes,
    "pictures": pictures,
    "retrieved": retrieved,
}
