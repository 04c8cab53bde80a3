"""Questions of words and pictures in any order."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mllm_edge.bundle.manifest import Prompt, Slot
from mllm_edge.errors import BadInput
from mllm_edge.runtime import interleaved
from mllm_edge.runtime.interleaved import apart, read_parts, words_and_pictures
from mllm_edge.runtime.prompt import Span, render

PICTURES = [Image.fromarray(np.full((2, 3, 3), level, np.uint8)) for level in (0, 90, 180, 255)]


def template(*slots: Slot, first: str = "{text}") -> Prompt:
    return Prompt("toy", "", first, first, "{text}", [], list(slots))


JOINED = template(Slot("<image>", "pixels", ["rows"], joint="<image>\n"), first="USER: {text} ASSISTANT:")
FIXED = template(Slot("<image>", "pixels", ["rows"]), first="<image>{text}")
WORDS_ALONE = template()


def test_words_are_as_they_were() -> None:
    assert words_and_pictures("see <image>", PICTURES[:1], JOINED) == ("see <image>", PICTURES[:1])


def test_pictures_in_front_stand_as_the_template_has_them_and_others_where_they_are() -> None:
    one, two, three, _ = PICTURES
    words, pictures = words_and_pictures([one, two, "a", three, "b", " c"], None, JOINED)
    assert (words, pictures) == ("<image>\n<image>\na<image>b c", [one, two, three])
    assert words_and_pictures(["a", one], [], JOINED)[0] == "a<image>"
    assert words_and_pictures([one, "a"], None, JOINED, raw=True)[0] == "<image>a"
    assert words_and_pictures([one, "a"], None, FIXED) == ("a", [one])
    # as the same picture in front of the same words
    given, plain = (
        render(JOINED, text, {"pixels": 1}) for text in (words_and_pictures([one, "a"], None, JOINED)[0], "a")
    )
    assert "".join(part.text for part in given if isinstance(part, Span)) == "".join(
        part.text for part in plain if isinstance(part, Span)
    )


@pytest.mark.parametrize(
    ("parts", "images", "prompt", "message"),
    [
        (["a", PICTURES[0]], PICTURES[:1], JOINED, "the parts of the prompt hold its pictures; leave out those beside"),
        (["a", PICTURES[0]], np.zeros((2, 2, 3), np.uint8), JOINED, "leave out those beside"),
        (["a", "x <image>"], None, JOINED, "part 2 of the prompt has <image> in its words"),
        (["a", PICTURES[0]], None, WORDS_ALONE, "takes no pictures, and part 2 of the prompt is one"),
        (["a", PICTURES[0]], None, FIXED, "part 2 of the prompt is a picture behind words, .* put them first"),
    ],
)
def test_what_cannot_be_joined_is_named(parts: list[Any], images: Any, prompt: Prompt, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        words_and_pictures(parts, images, prompt)


@given(st.lists(st.one_of(st.sampled_from(PICTURES), st.text("abc \n", min_size=1))))
def test_a_question_is_taken_apart_as_it_was_put_together(parts: list[Any]) -> None:
    place = template(Slot("<image>", "pixels", ["rows"], joint="<image>"))
    words, pictures = words_and_pictures(parts, None, place)
    found = apart(words, pictures, place)  # type: ignore[arg-type]
    assert "".join("#" if isinstance(part, Image.Image) else part for part in found) == "".join(
        "#" if isinstance(part, Image.Image) else part for part in parts
    )
    assert [part for part in found if isinstance(part, Image.Image)] == pictures


def test_pictures_without_places_are_shown_in_front() -> None:
    assert apart("a", PICTURES[:2], JOINED) == [*PICTURES[:2], "a"]
    assert apart("a", [], WORDS_ALONE) == ["a"]


# Files.


def written(folder: Path, document: Any) -> Path:
    file = folder / "parts.json"
    file.write_text(document if isinstance(document, str) else json.dumps(document))
    return file


def test_a_file_has_texts_and_pictures_beside_it(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    PICTURES[1].save(tmp_path / "in" / "a.png")
    first, second, third = read_parts(written(tmp_path, ["é", {"image": "in/a.png"}, {"text": "b"}]))
    assert (first, third) == ("é", "b")
    assert isinstance(second, Image.Image) and second.getpixel((0, 0)) == (90, 90, 90)


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ("{", "is not valid JSON .*; write a list of texts and pictures"),
        ("[" * 100_000, "is not valid JSON"),
        ({"text": "a"}, "is no list of 1 to 1000 texts and pictures"),
        ([], "is no list of 1 to 1000"),
        (["a"] * 1001, "is no list of 1 to 1000"),
        (["a", 3], "item 2 is no text and no picture; write a text, "),
        ([{"image": "a.png", "text": "b"}], "item 1 is no text and no picture"),
        ([{"picture": "a.png"}], "item 1 is no text and no picture"),
        ([{"image": 3}], "item 1 is no text and no picture"),
        ([{"image": None}], "item 1 is no text and no picture"),
        ([["a"]], "item 1 is no text and no picture"),
        (["a", {"image": "none.png"}], "item 2: .*none.png does not exist"),
        (["a", {"image": "parts.json"}], "item 2: .* is not a picture"),
        ([{"image": ""}], "item 1 names '', which is not in the file's folder; copy it there"),
        ([{"image": "."}], "item 1 names '.', which is not"),
        ([{"image": "../secret.png"}], "item 1 names '../secret.png', which is not"),
        ([{"image": "/etc/passwd"}], "item 1 names '/etc/passwd', which is not"),
        ([{"image": "link.png"}], "item 1 names 'link.png', which is not"),
        ([{"image": "a\0"}], "item 1 names 'a.x00', which is not"),
        ([{"image": "a" * 5000}], "item 1 names 'aaa"),
        ([{"image": "a/" + "b" * 400}], "item 1: "),
        (["a", {"image": "pipe"}], "item 2: .*pipe is no plain file"),
        (json.dumps(["a" * (1 << 20)]), "is larger than 1 MB"),
    ],
)
def test_files_of_others_are_refused_in_a_line_that_names_the_item(document: Any, message: str, tmp_path: Path) -> None:
    import os

    home = tmp_path / "home"
    home.mkdir()
    PICTURES[0].save(tmp_path / "secret.png")
    (home / "link.png").symlink_to(tmp_path / "secret.png")
    os.mkfifo(home / "pipe")
    with pytest.raises(BadInput, match=message) as refused:
        read_parts(written(home, document))
    assert "\n" not in str(refused.value)


def test_pictures_of_a_file_are_bounded_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interleaved, "MOST_PIXELS", 13)
    PICTURES[0].save(tmp_path / "a.png")
    assert len(read_parts(written(tmp_path, [{"image": "a.png"}] * 2))) == 2
    with pytest.raises(BadInput, match=r"pictures have over .* up to item 3"):
        read_parts(written(tmp_path, [{"image": "a.png"}] * 3))


@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(),
        lambda x: st.lists(x) | st.dictionaries(st.sampled_from(["text", "image", "x"]), x),
    )
)
def test_any_json_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, document: Any) -> None:
    file = written(tmp_path_factory.getbasetemp(), document)
    try:
        parts = read_parts(file)
    except BadInput:
        return
    assert len(parts) == len(document)
