"""Rules by hand-computed logits."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mllm_edge.runtime.decoding.rules import at_least, begins_box, favored, group_members, never, one_box

BARRED = -np.inf


def logits() -> np.ndarray:
    return np.array([0.5, -1.0, 2.0, 3.0], np.float32)


def test_favored_tokens_are_likelier_whatever_their_sign() -> None:
    edited = logits()
    favored([0, 1], 4.0)([], edited)
    assert edited.tolist() == [2.0, 4.0, 2.0, 3.0]


def test_some_tokens_are_never_chosen() -> None:
    edited = logits()
    rule = never([3, 1])
    for ids in ([], [3], [0, 2]):
        rule(ids, edited)
        np.testing.assert_array_equal(edited, [0.5, BARRED, 2.0, BARRED])
    assert edited.argmax() == 2


def test_no_token_may_be_barred() -> None:
    edited = logits()
    never([])([], edited)
    at_least(5, [])([], edited)
    np.testing.assert_array_equal(edited, logits())


@pytest.mark.parametrize(
    ("count", "ids", "barred"),
    [(2, [], True), (2, [2], True), (2, [2, 0], False), (2, [2, 0, 0], False), (0, [], False)],
)
def test_no_end_comes_too_early(count: int, ids: list[int], barred: bool) -> None:
    edited = logits()
    at_least(count, [3, 0])(ids, edited)
    wanted = [BARRED, -1.0, 2.0, BARRED] if barred else logits()
    np.testing.assert_array_equal(edited, wanted)


def test_the_earliest_end_is_that_of_transformers() -> None:
    processors = pytest.importorskip("transformers.generation.logits_process")
    import torch

    theirs = processors.MinNewTokensLengthLogitsProcessor(7, min_new_tokens=2, eos_token_id=[3, 0])
    for ids in ([], [2], [2, 0]):
        prompt = torch.zeros((1, 7 + len(ids)), dtype=torch.long)
        edited = logits()
        at_least(2, [3, 0])(ids, edited)
        np.testing.assert_array_equal(edited, theirs(prompt, torch.from_numpy(logits()[None]))[0].numpy())


def test_members_of_a_group_but_not_its_first_are_forced() -> None:
    assert group_members({10: [11, 12], 20: [21]}) == [11, 12, 21]
    assert group_members({10: [10, 11]}) == [11]  # the first token again within its own group can still be chosen
    assert group_members({}) == []


PIECES = ["</s>", " [", "[", "]", ",", ".", " ", "0.", "0", "1", "12", "5,", "9", "],", "a", "", "0.9", "99"]


@given(st.lists(st.integers(0, 10_000), min_size=60, max_size=60), st.integers(1, 4))
def test_whatever_is_chosen_is_a_box_with_an_area(choices: list[int], decimals: int) -> None:
    rule, ids = one_box(PIECES, [0], decimals), list[int]()
    for choice in choices:
        edited = np.zeros(len(PIECES), np.float32)
        rule(ids, edited)
        possible = np.flatnonzero(edited == 0)
        ids.append(int(possible[choice % len(possible)]))
        if ids[-1] == 0:
            break
    assert ids[-1] == 0 and len(ids) < 60
    said = "".join(PIECES[token] for token in ids[:-1])
    number = rf"([01]\.\d{{{decimals}}})"
    found = re.fullmatch(rf" ?\[{number},{number},{number},{number}\]", said)
    assert found, said
    x1, y1, x2, y2 = map(float, found.groups())
    assert 0 <= x1 < x2 <= 1 and 0 <= y1 < y2 <= 1


@given(st.lists(st.integers(0, 1000), min_size=2, max_size=2, unique=True), st.integers(0, 999))
def test_every_box_may_be_written(across: list[int], top: int) -> None:
    (left, right), bottom = sorted(across), top + 1
    text = "[" + ",".join(f"{value / 1000:.3f}" for value in (left, top, right, bottom)) + "]"
    assert all(begins_box(text[:length], 3) for length in range(len(text) + 1))
    assert not begins_box(text + ",", 3)


@pytest.mark.parametrize(
    "text",
    ["x", "[2", "[1", "[0.1234", "[0,", "[0.5]", "[0.500,0.500,0.4", "[0.500,0.500,0.500,", "[0.500,0.100,1.1", "  [",
     "[0.100,0.999,0.200,0.", "[.5"],
)  # fmt: skip
def test_what_cannot_become_a_box(text: str) -> None:
    assert not begins_box(text, 3)


def test_scores_of_what_remains_are_kept() -> None:
    edited = np.arange(len(PIECES), dtype=np.float32)
    one_box(PIECES, [0], 3)([2, 7], edited)  # "[0."
    assert set(np.flatnonzero(np.isfinite(edited))) == {8, 9, 10, 12, 17}
    assert edited[12] == 12
