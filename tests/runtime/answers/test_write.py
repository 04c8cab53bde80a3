"""The picture of an answer."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mllm_edge.errors import BadInput
from mllm_edge.runtime.answer import Answer, Mask, TextBox, Tokens
from mllm_edge.runtime.answers.write import COLORS, INK, LIST, clear, overlay, preview, write


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


def test_boxes_are_outlined_in_the_colors_of_their_words(tmp_path: Path) -> None:
    box = TextBox((3, 7), "where?", [8.0, 12.0, 40.0, 36.0])
    drawn = np.asarray(overlay(Image.new("RGB", (64, 48), (0, 0, 0)), [box], "At [..] it is."))  # enlarged 10 times
    for at in ((120, 240), (360, 240), (200, 80), (200, 400)):  # y, x on each side
        assert tuple(drawn[at]) == COLORS[0]
    assert tuple(drawn[240, 240]) == (0, 0, 0) == tuple(drawn[60, 40])
    assert (drawn[480:] == COLORS[0]).all(axis=-1).any() and (drawn[480:] == INK).all(axis=-1).any()
    spoken = replace(answer([]), parts=[box])
    assert [file.name for file in write(spoken, tmp_path / "out")] == ["overlay.png"]


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
    drawn = overlay(Image.new("RGB", size), [whole], "x " * 40)
    assert drawn.height > size[1] and drawn.width >= 640  # the text is readable


def test_a_word_longer_than_a_line_is_broken() -> None:
    drawn = np.asarray(overlay(Image.new("RGB", (64, 48)), [], "W" * 100))
    assert drawn.shape[0] > 480 + 4 * 20
    assert (drawn[480:, -4:] == 255).all()  # nothing runs out of the paper


def test_an_overlay_is_bounded() -> None:
    pixels = np.zeros((2000, 9000), np.bool_)
    pixels[:, :4500] = True
    drawn = np.asarray(
        overlay(Image.new("RGB", (9000, 2000)), [Mask("x", (0, 1), "x", 1.0, [0, 0, 9, 9], pixels)], "x")
    )
    assert drawn.shape[1] == 4096
    assert drawn[400, 1000].tolist() == [value // 2 for value in COLORS[0]]
    assert drawn[400, 3000].tolist() == [0, 0, 0]


def answer(masks: list[Mask], text: str = TEXT) -> Answer:
    return Answer(text, Tokens(1, 0, 1, [1]), {}, {}, masks, Image.new("RGB", (64, 48)))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_files_of_the_answer_before_are_taken_away_and_no_others(tmp_path: Path) -> None:
    (tmp_path / "mask_7.png").write_text("mine")
    write(answer(MASKS), tmp_path)
    (tmp_path / "thesis.tex").write_text("years of work")
    write(answer(MASKS[:1]), tmp_path)
    assert names(tmp_path) == [LIST, "mask_0.png", "mask_7.png", "overlay.png", "thesis.tex"]
    assert write(answer([]), tmp_path) == []
    assert names(tmp_path) == ["mask_7.png", "thesis.tex"]


def test_previews_replace_each_other_and_go_when_the_answer_comes(tmp_path: Path) -> None:
    write(answer(MASKS[:1]), tmp_path)
    for gray in (10, 20):
        preview(Image.new("RGB", (8, 8), (gray,) * 3), tmp_path)
        assert names(tmp_path) == [LIST, "preview.png"]
    assert Image.open(tmp_path / "preview.png").getpixel((0, 0)) == (20, 20, 20)
    write(answer(MASKS[:1]), tmp_path)
    assert names(tmp_path) == [LIST, "mask_0.png", "overlay.png"]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "preview.png").write_text("mine")
    with pytest.raises(BadInput, match=r"preview\.png is not from an answer of ours"):
        preview(Image.new("RGB", (8, 8)), tmp_path / "other")


def test_files_of_others_are_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "mask_1.png").write_text("mine")
    with pytest.raises(BadInput, match=r"mask_1\.png is not from an answer of ours"):
        write(answer(MASKS), tmp_path)
    assert (tmp_path / "mask_1.png").read_text() == "mine"
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(BadInput, match="is a link"):
        write(answer(MASKS), tmp_path / "link")


def test_a_list_reaches_nothing_outside(tmp_path: Path) -> None:
    thesis = tmp_path / "thesis.tex"
    thesis.write_text("years of work")
    folder = tmp_path / "answer"
    folder.mkdir()
    (folder / LIST).write_text("../thesis.tex\nmask_0.png\n")
    clear(folder)
    assert thesis.exists() and not names(folder)


@pytest.mark.parametrize("text", ["一只猫", "قطة", "a cat 🐈"])
def test_text_that_the_fonts_lack_is_written_beside(text: str, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"overlay\.txt has them"):
        files = write(answer([mask(text, (0, len(text)), 2)], text), tmp_path)
    assert [file.name for file in files] == ["overlay.png", "overlay.txt", "mask_0.png"]
    assert files[1].read_text(encoding="utf-8") == f"{text}\n"


def test_text_that_the_font_has_is_drawn_alone(tmp_path: Path) -> None:
    files = write(answer(MASKS[:1], "A star, “big”."), tmp_path)
    assert [file.name for file in files] == ["overlay.png", "mask_0.png"]
