"""Recall and decisions, by hand."""

import numpy as np
import pytest

from mllm_edge.errors import BadInput
from mllm_edge.evaluate.lookups import agreement, decisions, recalls, retrieval
from mllm_edge.runtime.answers.decision import GENERATE, RETRIEVE


def test_recall_counts_how_many_are_as_near_as_the_own_one() -> None:
    """Six pictures on a quarter circle. Text 0 lies at its own picture, texts 1 to 4 each at the picture before their
    own, text 5 at the first: of the five others all but none are nearer than its own."""
    turns = np.arange(6) * np.pi / 12
    images = np.stack([np.cos(turns), np.sin(turns)], 1).astype(np.float32)
    texts = images[[0, 0, 1, 2, 3, 0]] * 7  # lengths do not count
    found = recalls(texts, images)
    assert found["text_to_image_1"] == pytest.approx(1 / 6)
    assert found["text_to_image_5"] == pytest.approx(5 / 6)
    assert found["text_to_image_10"] == 1
    # Picture 0 is as near to text 1 and text 5 as to its own, so its own is third; each other one has a text of
    # another at its own place, but for pictures 4 and 5, to which text 4 is nearest.
    assert found["image_to_text_1"] == pytest.approx(1 / 6)
    assert found["image_to_text_5"] == pytest.approx(5 / 6)


def test_vectors_that_are_all_alike_or_have_no_direction_find_nothing() -> None:
    same = np.ones((12, 3), np.float32)
    assert set(recalls(same, same).values()) == {0.0}
    none = np.full((12, 3), np.nan, np.float32)
    assert set(recalls(np.zeros((12, 3), np.float32), none).values()) == {0.0}


def test_agreement_of_decisions() -> None:
    wanted = [GENERATE, RETRIEVE, GENERATE, RETRIEVE]
    found = [GENERATE, RETRIEVE, RETRIEVE, RETRIEVE]
    # To generate: 1 right, named 1 + 2; to retrieve: 2 right, named 3 + 2.
    assert agreement(found, wanted) == {"decided": 0.75, "decided_f1": pytest.approx((2 / 3 + 4 / 5) / 2)}
    assert agreement([GENERATE] * 2, [GENERATE] * 2) == {"decided": 1.0, "decided_f1": 0.5}


class Counts:
    """Looks for what has many words: of captions of the test split, what it does with each kind is known from these."""

    def __init__(self) -> None:
        self.read = list[str]()

    def decided(self, text: str) -> dict[str, float]:
        self.read.append(text)
        retrieve = float(len(text.split(",")) + text.count(" and ") > 3)
        return {RETRIEVE: retrieve, GENERATE: 1 - retrieve}


def test_captions_of_few_and_many_things_come_by_turns() -> None:
    model = Counts()
    result = decisions(model, 6, "test", lambda *_: None)  # type: ignore[arg-type]
    assert result["cases"] == 6 and result["kind"] == "decisions" and len({*model.read}) == 6
    assert result["dataset"] == "scenes-decisions (test)"
    assert result["scores"].keys() == {"decided", "decided_f1"}


@pytest.mark.parametrize(
    ("number", "split", "line"), [(0, "test", "1 to 500"), (501, "test", "1 to 500"), (9, "train", "no split")]
)
def test_scenes_that_cannot_be_told_apart_are_refused(number: int, split: str, line: str) -> None:
    with pytest.raises(BadInput, match=line):
        retrieval(lambda: pytest.fail("opened"), lambda: pytest.fail("loaded"), number, split, lambda *_: None)
    with pytest.raises(BadInput, match=r"2 or more|no split"):
        decisions(Counts(), min(number, 1), split, lambda *_: None)  # type: ignore[arg-type]
