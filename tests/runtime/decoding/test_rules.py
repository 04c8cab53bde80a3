"""Rules by hand-computed logits."""

import numpy as np
import pytest

from mllm_edge.runtime.decoding.rules import at_least, group_members, never

BARRED = -np.inf


def logits() -> np.ndarray:
    return np.array([0.5, -1.0, 2.0, 3.0], np.float32)


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
