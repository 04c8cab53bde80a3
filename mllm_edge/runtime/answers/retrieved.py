"""Pictures out of a user's index, found by an answer's states."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from mllm_edge.bundle.answers import RetrievedAnswer
from mllm_edge.errors import BadInput
from mllm_edge.runtime.answer import Picture
from mllm_edge.runtime.answers.decision import chances, is_retrieved
from mllm_edge.runtime.answers.phrases import groups
from mllm_edge.runtime.images import load_image
from mllm_edge.runtime.turn import Need, Turn


def retrieved(turn: Turn, entry: RetrievedAnswer, need: Need) -> Iterator[Picture]:
    """The nearest picture for each group of states; with a `decision`, only where retrieving is the likelier.

    Raises:
        BadInput: there is no index and one is `needed`, or it cannot be searched for this (`Index.nearest`).
    """
    index = turn.drawing.index
    if index is None and not entry.needed:
        return
    if index is None:
        raise BadInput("this answer looks for a picture, and there is no index; give one (--index)")
    for place in groups(turn, entry.states):
        (query,) = np.asarray(need(entry.query))  # [1,d]
        decided = chances(need, entry.decision)
        if decided and not is_retrieved(decided):
            continue
        (found,) = index.nearest(query)
        image, score = load_image(found.path), entry.scale * found.score
        yield Picture((place.start, place.end), turn.question, "retrieved", image, str(found.path), score, decided)
