"""A run over a data set: what is finished is scored, whatever ends it."""

from types import SimpleNamespace
from typing import Any

import pytest

from mllm_edge.errors import BadInput, MllmEdgeError
from mllm_edge.evaluate.cases import scenes
from mllm_edge.evaluate.run import evaluate


def model(fails_at: int, error: BaseException) -> Any:
    """Answers every question of the first cases rightly, then raises."""
    answers = iter(
        [case.truth(case.open()).texts[0] for case in scenes("scenes-questions", 5, "test").cases][:fails_at]
    )

    def generate(*_: object, **__: object) -> Any:
        text = next(answers, None)
        if text is None:
            raise error
        return SimpleNamespace(text=text, masks=[], boxes=[])

    manifest = SimpleNamespace(language_model=SimpleNamespace(sha256=""), stages=[])
    return SimpleNamespace(manifest=manifest, language_model=SimpleNamespace(context=256), generate=generate)


@pytest.mark.parametrize("error", [MllmEdgeError("the decoder failed"), OSError("no picture"), KeyboardInterrupt()])
def test_a_failing_case_costs_no_score(error: BaseException) -> None:
    kept: list[dict[str, Any]] = []
    data = scenes("scenes-questions", 5, "test")
    with pytest.raises(type(error)) as raised:
        evaluate(model(3, error), data, None, False, False, lambda *_: None, kept.append)
    assert raised.value is error
    (result,) = kept
    assert result["cases"] == 3 and result["scores"] == {"exact": 100.0}


def test_where_nothing_is_finished_there_is_nothing_to_score() -> None:
    kept: list[dict[str, Any]] = []
    data = scenes("scenes-questions", 5, "test")
    with pytest.raises(BadInput, match="at once"):
        evaluate(model(0, BadInput("at once")), data, None, False, False, lambda *_: None, kept.append)
    assert kept == []
