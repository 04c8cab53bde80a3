"""Masks: each marked token of an answer becomes a mask of the picture, tied to the phrase before it."""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np

from mllm_edge.bundle.answers import MasksAnswer
from mllm_edge.runtime.answer import Mask
from mllm_edge.runtime.answers.phrases import phrases
from mllm_edge.runtime.answers.resize import at_full_size, box_of
from mllm_edge.runtime.turn import Need, Turn


def masks(turn: Turn, entry: MasksAnswer, need: Need) -> Iterator[Mask]:
    """One mask for each state, all decoded in one call, in the picture's own size."""
    assert turn.picture is not None  # the model has seen to it
    spans = phrases(turn.ids, turn.tokenizer, turn.marks[entry.states], entry.phrase, turn.added, turn.strip)
    found = np.asarray(need(entry.logits))  # [n,4G,4G]
    start = time.perf_counter()
    for logits, span in zip(found, spans, strict=True):
        pixels, sure = at_full_size(logits, entry.frame, turn.picture.image.size)  # [H,W]
        words = turn.text[span.start : span.end]
        yield Mask(words, (span.start, span.end), words or turn.question, sure, box_of(pixels), pixels)
    turn.add_time("masks", 1000 * (time.perf_counter() - start))
