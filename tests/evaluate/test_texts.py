"""Text scores by hand-computed values."""

import math

import pytest

from mllm_edge.evaluate.texts import cider, exact, meteor, words


def test_words_are_lower_case_without_punctuation() -> None:
    assert words("A red circle, and it's BIG.") == ["a", "red", "circle", "and", "it's", "big"]


def test_exact_overlooks_case_and_punctuation_only() -> None:
    assert exact("a large red circle", ["A large red circle."])
    assert not exact("a large circle", ["A large red circle."])


def test_meteor_of_the_same_text_and_of_other_stems() -> None:
    # All of m words match in one chunk: 1 - 0.5 * (1 / m) ** 3.
    assert meteor("a red circle", ["A red circle."]) == pytest.approx(1 - 0.5 / 27)
    assert meteor("two red circles", ["two red circle"]) == pytest.approx(1 - 0.5 / 27)
    assert meteor("nothing here", ["a red circle"]) == 0


def test_cider_of_two_pictures() -> None:
    # Two pictures, so an n-gram of one picture weighs log 2 and one of both weighs nothing. "b" of "a b": unigrams
    # (0, log 2) against (0, log 2), bigrams equal, no longer ones: (1 + 1 + 0 + 0) / 4 * 10.
    assert cider(["a b", "a c"], [["a b"], ["a c"]]) == pytest.approx(5.0)
    # "b b" against "b": counts 2 and 1, clipped to 1 * 1 over the lengths 2 and 1 (in units of log 2), a bigram more.
    expected = 10 * (1 / 2) / 4 * math.exp(-1 / 72)
    assert cider(["b b", "x"], [["b"], ["c"]]) == pytest.approx(expected / 2)


def test_cider_takes_the_mean_over_references() -> None:
    assert cider(["a b", "q"], [["a b", "z"], ["c"]]) == pytest.approx(2.5 / 2)
