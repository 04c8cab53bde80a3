"""Mask scores by hand-computed values."""

import numpy as np
import pytest

from mllm_edge.evaluate.cases import Truth
from mllm_edge.evaluate.scores import Ap50, Prediction, matches, miou, score, word_overlap


def mask(*columns: int) -> np.ndarray:
    """Some columns of a picture of 4 x 8."""
    made = np.zeros((4, 8), np.bool_)
    made[:, list(columns)] = True
    return made


def test_ciou_weighs_pixels_and_giou_pictures() -> None:
    truths = [Truth(masks=[mask(0, 1)]), Truth(masks=[mask(0)])]
    found = [Prediction("", [mask(0)], [""]), Prediction("", [], [])]
    # Intersections 4 + 0, unions 8 + 4; IoUs 1/2 and 0.
    scores = score("referring", list(zip(truths, found, strict=True)))
    assert scores == {"ciou": 33.33, "giou": 25.0, "answered": 50.0}


def test_miou_pairs_the_best_first() -> None:
    # Of 0-1 against 0-1 (1) and 1-2 (1/3), and 2 against 1-2 (1/2): pairs 1 and 1/2.
    assert miou([mask(2), mask(0, 1)], [mask(0, 1), mask(1, 2)]) == pytest.approx(0.75)
    assert miou([], [mask(0)]) == 0


def test_recall_needs_the_words_and_stops_at_the_first_best_pair_without() -> None:
    truth = Truth(masks=[mask(0, 1), mask(4)], phrases=["a red circle", "a blue star"])
    assert matches(truth, Prediction("", [mask(4), mask(0, 1)], ["a blue star", "the red circle"])) == 2
    assert matches(truth, Prediction("", [mask(0, 1), mask(4)], ["a green cross", "a blue star"])) == 0
    assert matches(truth, Prediction("", [mask(0), mask(4, 5, 6)], ["a red circle", "a blue star"])) == 1


def test_word_overlap_leaves_articles_out() -> None:
    assert word_overlap("a red circle", "the red circle") == 1
    assert word_overlap("a red circle", "a blue circle") == 0.5
    assert word_overlap("a", "the") == 0


def ap50(*answers: tuple[Truth, Prediction]) -> float:
    judge = Ap50()
    for answer in answers:
        judge.add(*answer)
    return judge.value()


def test_ap50_of_one_found_one_missed_and_one_too_many() -> None:
    truth = Truth(masks=[mask(0, 1), mask(4, 5)], phrases=["", ""])
    half = ap50((truth, Prediction("", [mask(0, 1)], [""])))
    # Precision 1 up to recall 1/2: 51 of COCO's 101 recall points.
    assert half == pytest.approx(51 / 101)
    assert ap50((truth, Prediction("", [mask(0, 1), mask(4, 5)], ["", ""]))) == pytest.approx(1)
    assert ap50((truth, Prediction("", [], []))) == 0


def test_all_objects_must_be_named_each_by_a_phrase_of_its_own() -> None:
    truth = Truth(["t"], [mask(0), mask(1)], ["red star", "red star"])
    one = Prediction("a red star", [mask(0)], ["a red star"])
    both = Prediction("a red star and another red star", [mask(0), mask(1)], ["a small red star", "another red star"])
    scores = score("grounded", [(truth, one), (truth, both)])
    assert (scores["named"], scores["all_named"]) == (75, 50)
