"""The picture of an answer."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mllm_edge.runtime.answer import Answer, Mask, Tokens
from mllm_edge.runtime.answers.write import COLORS, INK, overlay, write


def mask(phrase: str, span: tuple[int, int], left: int) -> Mask:
    pixels = np.zeros((48, 64), np.bool_)
    pixels[8:40, left : left + 24] = True
    return Mask(phrase, span, phrase, 0.9, [left, 8, left + 24, 40], pixels)


TEXT = "A star and a ring."
MASKS = [mask("A star", (0, 6), 2), mask("a ring", (11, 17), 36)]


def test_masks_tint_the_enlarged_picture_in_the_colors_of_their_words() -> None:
    drawn = np.asarray(overlay(Image.new("RGB", (64, 48), (0, 0, 0)), MASKS, TEXT))
    assert drawn.shape[1] == 640
    assert drawn.shape[0] > 480  # the text stands below
    for number, column in enumerate((14, 48)):
        assert drawn[240, column * 10].tolist() == [value // 2 for value in COLORS[number]]
    assert drawn[20, 20].tolist() == [0, 0, 0]
    below = {tuple(pixel) for pixel in drawn[480:].reshape(-1, 3).tolist()}
    assert {COLORS[0], COLORS[1], INK} <= below


def test_a_mask_without_words_is_named_by_its_number() -> None:
    bare = overlay(Image.new("RGB", (64, 48)), [], "It is.")
    named = overlay(Image.new("RGB", (64, 48)), [mask("", (6, 6), 2)], "It is.")
    assert COLORS[0] in {tuple(pixel) for pixel in np.asarray(named)[480:].reshape(-1, 3).tolist()}
    assert named.size == bare.size


def test_files_of_an_answer(tmp_path: Path) -> None:
    answer = Answer(TEXT, Tokens(1, 0, 1, [1]), {}, {}, MASKS, Image.new("RGB", (64, 48)))
    files = write(answer, tmp_path / "new" / "answer")
    assert [file.name for file in files] == ["overlay.png", "mask_0.png", "mask_1.png"]
    with Image.open(files[2]) as image:
        np.testing.assert_array_equal(np.asarray(image), MASKS[1].pixels)


@pytest.mark.parametrize("size", [(1, 1), (3, 200), (2000, 10)])
def test_odd_pictures(size: tuple[int, int]) -> None:
    pixels = np.ones(size[::-1], np.bool_)
    whole = Mask("x", (0, 1), "x", 1.0, [0, 0, *size], pixels)
    assert overlay(Image.new("RGB", size), [whole], "x " * 40).height > size[1]
