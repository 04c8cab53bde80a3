"""Beam search over a language model that holds several sequences (transformers, generation/utils.py `_beam_search`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from mllm_edge.bundle.manifest import Generation
from mllm_edge.runtime.decoding.rules import Rule
from mllm_edge.runtime.decoding.sampling import penalized_by
from mllm_edge.runtime.engines.interface import Beams, Floats


class _Beam(NamedTuple):
    ids: list[int]
    score: float  # sum of log-probabilities


def beam_search(
    model: Beams, logits: Floats, settings: Generation, is_end: Callable[[int], bool], rules: Sequence[Rule] = ()
) -> list[int]:
    """The best answer of `settings.beams` sequences that are continued side by side.

    A finished sequence counts its score / length**length_penalty; the search ends when no running one can beat the
    worst of as many finished ones (transformers' `early_stopping=False`).

    Args:
        model: has read the prompt.
        logits: of the prompt's last position, float32 [V].
        settings: `beams`, `length_penalty`, `repeat_penalty`, `max_tokens`.
        is_end: whether a token ends an answer.
        rules: what edits a sequence's logits.
    """
    width, power, most = settings.beams, settings.length_penalty, settings.max_tokens
    running, rows = [_Beam([], 0.0)], logits[None]  # [B,V]
    finished: list[_Beam] = []  # score divided by length, best first
    while running:
        # 1. Every continuation of every beam; twice as many as beams, should half of them end.
        continued = []
        for number, (beam, row) in enumerate(zip(running, rows, strict=True)):
            shares = _log_softmax(row)
            shares = penalized_by(shares, np.unique(beam.ids).astype(np.int64), settings.repeat_penalty)
            for rule in rules:
                rule(beam.ids, shares)
            for token in np.argsort(-shares, kind="stable")[: 2 * width]:
                continued.append((beam.score + float(shares[token]), number, int(token)))
        continued.sort(key=lambda one: -one[0])
        # 2. Those that end are finished, the others run on.
        kept: list[tuple[float, int, int]] = []
        for rank, (score, number, token) in enumerate(continued[: 2 * width]):
            length = len(running[number].ids) + 1
            if is_end(token) or length == most:
                if rank < width:
                    finished.append(_Beam([*running[number].ids, token], score / length**power))
            elif len(kept) < width:
                kept.append((score, number, token))
        finished = sorted(finished, key=lambda beam: -beam.score)[:width]
        length = len(running[0].ids) + 1
        if not kept or (len(finished) == width and kept[0][0] / length**power <= finished[-1].score):
            break
        # 3. The engine follows.
        rows = model.branch([token for _, _, token in kept], [number for _, number, _ in kept])
        running = [_Beam([*running[number].ids, token], score) for score, number, token in kept]
    return finished[0].ids


def _log_softmax(row: Floats) -> Floats:
    shifted = row - row.max()
    result: Floats = shifted - np.log(np.exp(shifted).sum())
    return result
