from collections.abc import Mapping
from dataclasses import replace

import pytest
from conftest import PROMPT

from mllm_edge.errors import BadInput
from mllm_edge.runtime.prompt import BOX_SLOT, Span, answer_parts, piece_ids, render, render_raw


class Letters:
    """Every character is its code point; `</s>` is control token -2. Remembers what it was asked to tokenize."""

    control_tokens: Mapping[str, int] = {"</s>": -2, "<s>": -1}

    def __init__(self) -> None:
        self.asked: list[str] = []

    def tokenize(self, text: str, special: bool = False) -> list[int]:
        assert not special
        self.asked.append(text)
        return [ord(letter) for letter in text]


def texts(pieces: list[list[Span]]) -> list[str]:
    return ["".join(span.text for span in piece) for piece in pieces]


def test_pictures_go_to_the_front_when_there_is_no_placeholder() -> None:
    assert texts(render(PROMPT, "what?", 1)) == ["the USER: ", "\nwhat? ASSISTANT:"]
    assert texts(render(PROMPT, "what?", 2)) == ["the USER: ", "\n", "\nwhat? ASSISTANT:"]
    assert texts(render(PROMPT, "what?", 0)) == ["the USER: what? ASSISTANT:"]


def test_each_placeholder_takes_one_picture() -> None:
    assert texts(render(PROMPT, "a<image>b<image>", 2)) == ["the USER: a", "b", " ASSISTANT:"]


def test_later_turns_have_no_system_text() -> None:
    assert texts(render(PROMPT, "why?", 0, first=False)) == ["USER: why? ASSISTANT:"]


@pytest.mark.parametrize(("text", "images"), [("<image> a", 0), ("<image>", 2), ("<image><image>", 1)])
def test_placeholders_must_go_with_the_pictures(text: str, images: int) -> None:
    with pytest.raises(BadInput, match=rf"{text.count('<image>')} <image> placeholder.*{images} picture"):
        render(PROMPT, text, images)


def test_raw_is_the_whole_text() -> None:
    assert texts(render_raw(PROMPT, "x<image>y", 1)) == ["x", "y"]


def test_braces_in_the_users_words_are_not_fields() -> None:
    assert texts(render(PROMPT, "{system} {0}", 0)) == ["the USER: {system} {0} ASSISTANT:"]


def test_control_strings_count_only_where_the_template_has_them() -> None:
    vocabulary = Letters()
    ids = piece_ids([Span("a</s>", True), Span("b</s>c", False), Span("<s>", True)], vocabulary, PROMPT)
    assert ids == [ord("a"), -2, *map(ord, "b</s>c"), -1]
    assert vocabulary.asked == ["a", "b</s>c"]


def test_spans_are_joined_before_they_are_tokenized() -> None:
    vocabulary = Letters()
    piece_ids(render(PROMPT, "hi", 0)[0], vocabulary, PROMPT)
    assert vocabulary.asked == ["the USER: hi ASSISTANT:"]


def test_raw_text_may_spell_control_tokens() -> None:
    assert piece_ids(render_raw(PROMPT, "a</s>", 0)[0], Letters(), PROMPT) == [ord("a"), -2]


def test_answer_parts() -> None:
    assert answer_parts(PROMPT) == (" ", "</s>")


MARKED = replace(PROMPT, image_open="<i>", image_close="</i>", box="<bbox>", added=["<i>", "</i>", "<bbox>"])


class Marked(Letters):
    control_tokens: Mapping[str, int] = {"</s>": -2, "<i>": -3, "</i>": -4, "[SEG]": -5}


def test_a_picture_stands_between_its_marks_and_white_space_beside_added_tokens_goes() -> None:
    before, after = render(MARKED, "see <image> here", 1)
    assert piece_ids(before, Marked(), MARKED) == [*map(ord, "the USER: see"), -3]
    assert piece_ids(after, Marked(), MARKED) == [-4, *map(ord, "here ASSISTANT:")]


def test_a_region_is_a_slot_even_in_the_users_words() -> None:
    (piece,) = render(MARKED, "What is <bbox>, [SEG]?", 0, boxes=1)
    assert piece_ids(piece, Marked(), MARKED) == [
        *map(ord, "the USER: What is"), BOX_SLOT, *map(ord, ", [SEG]? ASSISTANT:"),
    ]  # fmt: skip


@pytest.mark.parametrize(("text", "boxes"), [("What is <bbox>?", 0), ("<bbox> or <bbox>?", 1), ("What?", 1)])
def test_every_region_needs_its_box(text: str, boxes: int) -> None:
    with pytest.raises(BadInput, match=rf"{text.count('<bbox>')} <bbox> placeholder.*{boxes} box"):
        render(MARKED, text, 0, boxes=boxes)


def test_a_bundle_without_regions_refuses_boxes() -> None:
    with pytest.raises(BadInput, match="takes no boxes"):
        render(PROMPT, "What?", 0, boxes=1)
