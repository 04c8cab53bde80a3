"""Parts that are loaded when they are used and released after it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from mllm_edge.bundle.manifest import StageEntry
from mllm_edge.errors import MllmEdgeError
from mllm_edge.runtime.engines.interface import Beams, Floats, Step
from mllm_edge.runtime.engines.lazy import LazyLanguageModel, LazyStage, lazy_language_model

ENTRY = StageEntry("file", 0, "", "double", "onnx", "fp32", [], [])


class Double:
    spec = ENTRY

    def __init__(self, log: list[str]):
        self._log = log
        log.append("made")

    def __call__(self, **arrays: Any) -> dict[str, Any]:
        return {"y": 2 * arrays["x"]}

    def close(self) -> None:
        self._log.append("closed")


@pytest.mark.parametrize(("keep", "log"), [(True, ["made"]), (False, ["made", "closed"] * 2)])
def test_a_stage_is_made_by_its_first_call(keep: bool, log: list[str]) -> None:
    told: list[str] = []
    stage = LazyStage(ENTRY, lambda: Double(told), keep)
    assert told == [] and not stage.loaded and stage.load_ms == 0
    for x in (1, 2):
        assert stage(x=x) == {"y": 2 * x}
        assert stage.loaded is keep
    assert told == log and stage.load_ms > 0
    stage.close()
    with pytest.raises(MllmEdgeError, match="stage double is closed"):
        stage(x=1)
    assert told.count("made") == told.count("closed")


class Counter:
    """A language model whose logits say how many positions it holds."""

    context, vocabulary, width, keeps = 9, 3, 2, True

    def __init__(self) -> None:
        self.held = 0

    def embed(self, ids: Sequence[int]) -> Floats:
        return np.zeros((len(ids), self.width), np.float32)

    def prefill(self, embeds: Floats, keep: int = 0, state: bool = False) -> Step:
        self.held = keep + len(embeds)
        return self._step(int(state))

    def extend(self, ids: Sequence[int], states: int = 0) -> Step:
        self.held += len(ids)
        return self._step(states)

    def _step(self, states: int) -> Step:
        return Step(np.full(self.vocabulary, self.held, np.float32), np.zeros((states, self.width), np.float32))

    def about(self) -> str:
        return "counts"

    def close(self) -> None:
        self.held = -1


class Branching(Counter):
    def branch(self, tokens: Sequence[int], parents: Sequence[int]) -> Floats:
        return np.array([[token, parent, 0] for token, parent in zip(tokens, parents, strict=True)], np.float32)


def test_a_language_model_passes_on_what_it_is_asked() -> None:
    model = lazy_language_model(Counter)
    assert (model.context, model.vocabulary, model.width, model.keeps) == (9, 3, 2, True)
    assert model.prefill(model.embed([1, 2, 3]), 2, True).logits[0] == 5
    step = model.extend([1, 2], 2)
    assert step.logits[0] == 7 and step.hidden.shape == (2, 2)
    assert model.about() == "counts"
    assert not isinstance(model, Beams)


def test_a_released_language_model_is_loaded_again_and_holds_nothing() -> None:
    made: list[Counter] = []

    def make() -> Counter:
        made.append(Counter())
        return made[-1]

    model = lazy_language_model(make)
    model.prefill(model.embed([1, 2, 3]))
    for _ in range(2):
        model.release()
    assert [one.held for one in made] == [-1]
    assert model.extend([1]).logits[0] == 1
    assert len(made) == 2
    model.close()
    with pytest.raises(MllmEdgeError, match="language model is closed"):
        model.embed([1])


def test_beams_stay_beams() -> None:
    model = lazy_language_model(Branching)
    assert isinstance(model, LazyLanguageModel) and isinstance(model, Beams)
    model.release()
    assert model.branch([5, 6], [1, 0]).tolist() == [[5, 1, 0], [6, 0, 0]]
