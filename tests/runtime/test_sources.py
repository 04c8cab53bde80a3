"""Each kind of source as an array, by hand-computed values."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mllm_edge.bundle.read import file_entry
from mllm_edge.bundle.sources import Boxes, Constant, FileEntry, Pixels, Source, States, Task, Text
from mllm_edge.errors import BadInput
from mllm_edge.runtime.engines.interface import Array
from mllm_edge.runtime.sources import READERS, Held
from mllm_edge.runtime.turn import InputPicture, Turn


class Letters:
    """`a` is 1, `b` is 2, and so on."""

    vocabulary, control_tokens = 100, {}

    def __init__(self, bos: int | None = None, eos: int | None = None):
        self.bos, self.eos = bos, eos

    def tokenize(self, text: str) -> list[int]:
        return [ord(letter) - 96 for letter in text]


def turn(question: str = "abcd", picture: Image.Image | None = None, **known: Any) -> Turn:
    seen = picture and InputPicture("key", picture)
    return Turn(question, seen, Letters(), **known)  # type: ignore[arg-type]


def read(source: Source, asked: Turn, folder: Path = Path(), tokenizers: Mapping[str, Any] | None = None) -> Array:
    return READERS[source.kind](source, asked, Held(folder, tokenizers or {}))


@pytest.mark.parametrize(
    ("length", "cut", "bos", "eos", "ids"),
    [
        (4, "right", None, None, [1, 2, 3, 4]),
        (6, "right", None, None, [1, 2, 3, 4, 9, 9]),
        (6, "left", None, None, [1, 2, 3, 4, 9, 9]),  # padding is on the right whatever is cut
        (3, "right", None, None, [1, 2, 3]),
        (3, "left", None, None, [2, 3, 4]),
        (5, "right", 50, 51, [50, 1, 2, 3, 51]),  # the ends stay, the words are cut
        (5, "left", 50, 51, [50, 2, 3, 4, 51]),
        (8, "left", 50, 51, [50, 1, 2, 3, 4, 51, 9, 9]),
        (2, "right", 50, 51, [50, 51]),
        (2, "left", 50, 51, [50, 51]),
        (1, "left", 50, 51, [50]),
    ],
)
def test_text_is_cut_and_padded(length: int, cut: str, bos: int | None, eos: int | None, ids: list[int]) -> None:
    found = read(Text("question", "words", length, cut, pad=9), turn(), tokenizers={"words": Letters(bos, eos)})
    assert found.dtype == np.int64
    np.testing.assert_array_equal(found, [ids])


def test_a_text_is_read_by_its_own_tokenizer() -> None:
    both = {"words": Letters(), "language_model": Letters(bos=77)}
    np.testing.assert_array_equal(read(Text("q", "language_model", 3), turn("a"), tokenizers=both), [[77, 1, 0]])
    np.testing.assert_array_equal(read(Text("q", "words", 3), turn(""), tokenizers=both), [[0, 0, 0]])


TASK = Task("task", {"chat": 5, "rec": 0})


def test_a_task_is_its_value_and_the_first_by_default() -> None:
    for name, value in (("", 5), ("chat", 5), ("rec", 0)):
        found = read(TASK, turn(task=name))
        assert found.dtype == np.int64
        np.testing.assert_array_equal(found, [value])


def test_an_unknown_task_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(BadInput, match="no task 'vqa'; this bundle has chat, rec"):
        read(TASK, turn(task="vqa"))


def test_a_constant_is_mapped_and_not_read(tmp_path: Path) -> None:
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    np.save(tmp_path / "table.npy", values)
    found = read(Constant("table", file_entry(tmp_path, "table.npy")), turn(), tmp_path)
    assert isinstance(found, np.memmap) and not found.flags.writeable
    np.testing.assert_array_equal(found, values)


def test_a_constant_that_is_no_array_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.npy").write_text("not an array")
    np.save(tmp_path / "pickled.npy", np.array([{"code": "runs"}], object), allow_pickle=True)
    (tmp_path / "empty.npy").write_bytes(b"")
    for name in ("text.npy", "pickled.npy", "empty.npy", "missing.npy"):
        with pytest.raises(BadInput, match=rf"{name} is no array"):
            read(Constant("table", FileEntry(name, 0, "")), turn(), tmp_path)
    with pytest.raises(BadInput):
        read(Constant("table", FileEntry("../table.npy", 0, "")), turn(), tmp_path)


def test_boxes_are_shares_of_the_pictures_sides() -> None:
    picture = Image.new("RGB", (40, 20))
    found = read(Boxes("boxes"), turn(picture=picture, boxes=[(10, 5, 40, 20), (0, 0, 20, 10)]))
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, [[0.25, 0.25, 1, 1], [0, 0, 0.5, 0.5]])
    assert read(Boxes("boxes"), turn(picture=picture)).shape == (0, 4)
    with pytest.raises(BadInput, match="no picture"):
        read(Boxes("boxes"), turn(boxes=[(10, 5, 40, 20)]))


def test_states_are_stacked_in_the_order_of_the_answer() -> None:
    first, second = np.array([1, 2, 3], np.float32), np.array([4, 5, 6], np.float32)
    known = {"seg": [first, second], "image": [second]}
    found = read(States("seg", ["[SEG]"]), turn(states=known))
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, [[1, 2, 3], [4, 5, 6]])
    np.testing.assert_array_equal(read(States("image", ["[IMG]"], "token"), turn(states=known)), [[4, 5, 6]])


@pytest.mark.parametrize("known", [{}, {"seg": []}])
def test_states_that_the_answer_has_not(known: dict[str, list[Any]]) -> None:
    with pytest.raises(BadInput, match=r"the answer has no \[A\], \[B\], which seg is read at"):
        read(States("seg", ["[A]", "[B]"]), turn(states=known))


def test_pixels_are_squashed_to_the_square() -> None:
    wide = Image.new("RGB", (8, 2), (255, 0, 51))
    wide.paste((0, 0, 0), (4, 0, 8, 2))  # the right half is black
    source = Pixels("pixels", 2, "squash", "bilinear", [9, 9, 9], [0.5, 0.0, 0.2], [0.5, 1.0, 2.0])
    found = read(source, turn(picture=wide))
    assert (found.dtype, found.shape) == (np.float32, (1, 3, 2, 2))
    # The left pixel weighs columns 0..5 by 5, 7, 7, 5, 3, 1 of 28: 6/7 of it is (1, 0, 0.2) and 1/7 black.
    left, right = 6 / 7, 1 / 7
    rows = [[(left - 0.5) / 0.5, (right - 0.5) / 0.5], [0, 0], [(0.2 * left - 0.2) / 2, (0.2 * right - 0.2) / 2]]
    for y in (0, 1):
        np.testing.assert_allclose(found[0, :, y], rows, atol=2 / 255)  # a gray level, over the deviation 0.5


def test_pixels_need_a_picture() -> None:
    source = Pixels("pixels", 2, "squash", "bilinear", [9, 9, 9], [0.5] * 3, [0.5] * 3)
    with pytest.raises(BadInput, match="needs a picture"):
        read(source, turn())
