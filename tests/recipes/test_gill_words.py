"""What each mode of GILL's training reads and predicts, by hand; and its tokenizer."""

from pathlib import Path

import numpy as np
import pytest

from mllm_edge.checkpoints.tokenizer import checkpoint_tokenizer, read_tokenizer
from mllm_edge.errors import BadInput
from mllm_edge.models.gill.model import CLASS_TOKEN, TOKENS
from mllm_edge.recipes.data.gill_scenes import (
    few_things,
    fuller_scene,
    named,
    pairs_shown,
    request,
    row_words,
    said_slots,
    slots,
    told_apart,
)
from mllm_edge.recipes.data.gill_words import (
    Words,
    captioning,
    neighbors,
    shortened,
    stacked,
    telling,
    train_tokenizer,
)
from mllm_edge.scenes import Background, Scene, SceneObject

NO = -100
START = 50  # of the picture tokens
GROUP = [50, 51, 52, 53, 54, 55, 56, 57]
SCENE = Scene(
    (
        SceneObject("blue", "ring", "large", 0.8, 0.5, 0.16, 0.0, (35, 75, 235)),
        SceneObject("red", "circle", "small", 0.15, 0.15, 0.08, 0.0, (215, 30, 35)),
    ),
    Background("plain", (60, 60, 60), (60, 60, 60), 0.0, 0),
)


def test_captioning_predicts_bos_and_the_caption_from_two_rows() -> None:
    ids, labels = captioning([[10, 11]], rows=2)
    assert ids == [-1, -1, 2, 10, 11]
    assert labels == [NO, NO, 2, 10, 11]


def test_captioning_of_a_pair_has_one_bos_and_predicts_both_captions() -> None:
    ids, labels = captioning([[10, 11], [20]], rows=2)
    assert ids == [-1, -1, 2, 10, 11, -1, -1, 20]
    assert labels == [NO, NO, 2, 10, 11, NO, NO, 20]


def test_the_first_picture_token_is_predicted_and_no_other() -> None:
    ids, labels = telling([[10, 11]], START)
    assert ids == [2, 10, 11, *GROUP]
    assert labels == [2, 10, 11, 50, *[NO] * 7]


def test_of_a_pair_the_second_caption_is_not_predicted() -> None:
    ids, labels = telling([[10, 11], [20]], START)
    assert ids == [2, 10, 11, *GROUP, 20, *GROUP]
    assert labels == [2, 10, 11, 50, *[NO] * 7, NO, *[NO] * 8]


@pytest.mark.parametrize("words", [1, 3, 4, 5, 9])
def test_long_captions_lose_their_end_as_in_the_original(words: int) -> None:
    """There the sequence is cut, and its last eight ids become the picture tokens."""
    caption, length = list(range(10, 10 + words)), 12
    whole = [2, *caption, *GROUP][:length]
    if whole[-1] != GROUP[-1]:
        whole[-8:] = GROUP
    assert telling([shortened(caption, length)], START)[0] == whole


def test_neighbors_are_2i_and_the_next() -> None:
    assert neighbors([[1], [2], [3], [4]], joined=True) == [([1], [2]), ([3], [4])]
    assert neighbors([[1], [2]], joined=False) == [([1],), ([2],)]
    with pytest.raises(BadInput, match="no pairs"):
        neighbors([[1]], joined=True)


def test_padding_stands_behind_and_is_not_predicted() -> None:
    ids, labels = stacked([([2, 9], [2, 9]), ([2], [2])])
    assert ids.tolist() == [[2, 9], [2, 1]]
    assert labels.tolist() == [[2, 9], [2, NO]]


def test_the_tokenizer_is_opts_with_the_picture_tokens_last(tmp_path: Path) -> None:
    train_tokenizer(tmp_path, 4 + 256 + 6 + 9, ["a red circle", "a red ring", "a blue ring"] * 3)
    tokens = read_tokenizer(tmp_path).tokens
    assert tokens[:4] == ["<s>", "<pad>", "</s>", "<unk>"]
    assert tokens[-9:] == [CLASS_TOKEN, *TOKENS] and len(tokens) == 275
    words = Words(tmp_path)
    ids = words.ids("a red ring, caf\u00e9")
    assert words.start == 267 and words.text(ids) == "a red ring, caf\u00e9"
    assert checkpoint_tokenizer(tmp_path)("a red ring, caf\u00e9") == ids
    assert words.text([*words.ids(" red\nring")]) == "red"
    assert words.text([*words.ids("red"), words.start, *words.ids("ring")]) == "red"
    again = tmp_path / "again"
    train_tokenizer(again, 275, ["a red circle", "a red ring", "a blue ring"] * 3)
    assert (again / "tokenizer.json").read_text() == (tmp_path / "tokenizer.json").read_text()


def test_tokenizers_that_do_not_fit_are_named(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="yield 26"):
        train_tokenizer(tmp_path, 1000, ["a red ring"])
    with pytest.raises(BadInput, match="train gill-language first"):
        Words(tmp_path)


def test_things_are_told_from_left_to_right() -> None:
    assert row_words(SCENE) == [" small red circle top left", " large blue ring right"]
    found = slots(SCENE)
    assert found["color"].tolist() == [0, 2, 8, 8] and found["shape"].tolist() == [0, 5, 6, 6]
    assert found["size"].tolist() == [0, 1, 2, 2] and found["place"].tolist() == [0, 5, 9, 9]
    shown = pairs_shown(SCENE)
    assert np.flatnonzero(shown).tolist() == [0 * 6 + 0, 2 * 6 + 5]


def test_what_a_caption_does_not_say_is_not_asked_for() -> None:
    plain = said_slots(SCENE, "A red circle and a blue ring.")
    assert plain["color"].tolist() == [0, 2, 8, 8] and plain["shape"].tolist() == [0, 5, 6, 6]
    assert plain["size"].tolist() == plain["place"].tolist() == [NO] * 4
    said = said_slots(SCENE, "A small red circle at the top left and a large blue ring on the right.")
    assert said["size"].tolist() == [0, 1, 2, 2] and said["place"].tolist() == [0, 5, 9, 9]


def test_names_and_requests() -> None:
    assert named("There is a red circle and a large blue ring.") == [("red", "circle"), ("blue", "ring")]
    assert request("There is an orange star.") == "Draw an orange star."
    assert request("A red circle at the top.") == "Draw a red circle at the top."


def test_numbers_of_things_decide_what_is_drawn() -> None:
    assert {len(few_things("test", index, 0).objects) for index in range(20)} == {1, 2, 3}
    assert [len(fuller_scene("test", index, 0).objects) for index in range(7)] == [5, 4, 4, 6, 4, 4, 5]
    texts = [text for _, text in told_apart("test", 60, 0)]
    assert len(texts) == 60
