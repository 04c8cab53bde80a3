from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest
from conftest import PROMPT

from mllm_edge.bundle.manifest import Slot
from mllm_edge.errors import BadInput
from mllm_edge.runtime.prompt import Part, Span, answer_parts, ids_of, render, render_raw, tokenized

NONE: Mapping[str, int] = {}
(PICTURE,) = PROMPT.slots


class Letters:
    """Every character is its code point; `</s>` is control token -2. Remembers what it was asked to tokenize."""

    control_tokens: Mapping[str, int] = {"</s>": -2, "<s>": -1}
    user_defined: Mapping[str, int] = {}

    def __init__(self) -> None:
        self.asked: list[str] = []

    def tokenize(self, text: str) -> list[int]:
        self.asked.append(text)
        return [ord(letter) for letter in text]


def texts(parts: Sequence[Part]) -> list[str | Slot]:
    """The texts between slots, and the slots."""
    found: list[str | Slot] = [""]
    for part in parts:
        if isinstance(part, Slot):
            found += [part, ""]
        else:
            found[-1] = str(found[-1]) + part.text
    return found


def test_pictures_go_to_the_front_when_there_is_no_placeholder() -> None:
    assert texts(render(PROMPT, "what?", {"pixels": 1})) == ["the USER: ", PICTURE, "\nwhat? ASSISTANT:"]
    two = texts(render(PROMPT, "what?", {"pixels": 2}))
    assert two == ["the USER: ", PICTURE, "\n", PICTURE, "\nwhat? ASSISTANT:"]
    assert texts(render(PROMPT, "what?", {"pixels": 0})) == ["the USER: what? ASSISTANT:"]


def test_each_placeholder_takes_one_picture() -> None:
    found = texts(render(PROMPT, "a<image>b<image>", {"pixels": 2}))
    assert found == ["the USER: a", PICTURE, "b", PICTURE, " ASSISTANT:"]


def test_later_turns_have_no_system_text() -> None:
    assert texts(render(PROMPT, "why?", NONE, first=False)) == ["USER: why? ASSISTANT:"]


@pytest.mark.parametrize(("text", "images"), [("<image> a", 0), ("<image>", 2), ("<image><image>", 1)])
def test_placeholders_must_go_with_the_pictures(text: str, images: int) -> None:
    for make in (render, render_raw):
        with pytest.raises(BadInput, match=rf"{text.count('<image>')} <image> placeholder.*{images} picture"):
            make(PROMPT, text, {"pixels": images})


def test_raw_is_the_whole_text() -> None:
    assert texts(render_raw(PROMPT, "x<image>y", {"pixels": 1})) == ["x", PICTURE, "y"]


def test_a_dialogue_opens_with_what_the_tokenizer_wants_there() -> None:
    assert texts(render(PROMPT, "hi", NONE, lead=" ")) == [" the USER: hi ASSISTANT:"]
    assert texts(render(PROMPT, "hi", NONE, lead=" ", first=False)) == ["USER: hi ASSISTANT:"]
    assert texts(render_raw(PROMPT, "hi", NONE, " ")) == texts(render_raw(PROMPT, " hi", NONE, " ")) == [" hi"]


def test_fields_of_the_template() -> None:
    tagged = replace(PROMPT, first="tags: {tags}. {text}")
    assert texts(render(tagged, "why?", NONE, fields={"tags": "cat, dog"})) == ["tags: cat, dog. why?"]
    assert texts(render(tagged, "why?", NONE)) == ["tags: . why?"]
    spelled = render(tagged, "why?", NONE, fields={"tags": "</s>"})  # a label is not the template's own text
    assert tokenized(spelled, Letters()) == [[*map(ord, "tags: </s>. why?")]]


def test_braces_in_the_users_words_are_not_fields() -> None:
    assert texts(render(PROMPT, "{system} {0}", NONE)) == ["the USER: {system} {0} ASSISTANT:"]


def test_control_strings_count_only_where_the_template_has_them() -> None:
    vocabulary = Letters()
    (ids,) = tokenized([Span("a</s>", True), Span("b</s>c", False), Span("<s>", True)], vocabulary)
    assert ids == [ord("a"), -2, *map(ord, "b</s>c"), -1]
    assert vocabulary.asked == ["a", "b</s>c"]


def test_spans_are_joined_before_they_are_tokenized() -> None:
    vocabulary = Letters()
    tokenized(render(PROMPT, "hi", NONE), vocabulary)
    assert vocabulary.asked == ["the USER: hi ASSISTANT:"]


def test_raw_text_may_spell_control_tokens() -> None:
    assert tokenized(render_raw(PROMPT, "a</s>", NONE), Letters()) == [[ord("a"), -2]]


def test_ids_of_a_text() -> None:
    assert ids_of("a</s>", Letters()) == [ord("a"), -2]
    assert ids_of("a</s>", Letters(), trusted=False) == [*map(ord, "a</s>")]
    assert ids_of("", Letters()) == []


def test_answer_parts() -> None:
    assert answer_parts(PROMPT) == (" ", "</s>")


MARKED_PICTURE = replace(PICTURE, open="<i>", close="</i>")
REGION = Slot("<bbox>", "boxes", ["region_embeds"])
MARKED = replace(PROMPT, slots=[MARKED_PICTURE, REGION])
ADDED = ["<i>", "</i>", "<bbox>"]


class Marked(Letters):
    control_tokens: Mapping[str, int] = {"</s>": -2, "<i>": -3, "</i>": -4, "[SEG]": -5}


def test_a_picture_stands_between_its_marks_and_white_space_beside_added_tokens_goes() -> None:
    before, slot, after = tokenized(render(MARKED, "see <image> here", {"pixels": 1}), Marked(), ADDED)
    assert before == [*map(ord, "the USER: see"), -3]
    assert slot is MARKED_PICTURE
    assert after == [-4, *map(ord, "here ASSISTANT:")]


def test_a_region_is_a_slot_even_in_the_users_words() -> None:
    parts = render(MARKED, "What is <bbox>, [SEG]?", {"boxes": 1})
    assert tokenized(parts, Marked(), ADDED) == [
        [*map(ord, "the USER: What is")], REGION, [*map(ord, ", [SEG]? ASSISTANT:")],
    ]  # fmt: skip


class WithWords(Letters):
    user_defined: Mapping[str, int] = {"[A]": -7, "[B]": -8}


def test_user_defined_tokens_of_the_manifest_are_cut_out_of_any_words() -> None:
    parts = render(replace(PROMPT, first="{text}"), " see [A]\n [B] [C]</s>", NONE)
    assert tokenized(parts, WithWords(), ["[A]"]) == [[*map(ord, " see"), -7, *map(ord, "[B] [C]</s>")]]
    assert tokenized(parts, WithWords()) == [[*map(ord, " see [A]\n [B] [C]</s>")]]
    assert ids_of("a [B] </s>", WithWords(), ["[B]"]) == [ord("a"), -8, -2]


@pytest.mark.parametrize(("text", "boxes"), [("What is <bbox>?", 0), ("<bbox> or <bbox>?", 1), ("What?", 1)])
def test_every_region_needs_its_box(text: str, boxes: int) -> None:
    with pytest.raises(BadInput, match=rf"{text.count('<bbox>')} <bbox> placeholder.*{boxes} box"):
        render(MARKED, text, {"boxes": boxes})


def test_a_bundle_without_regions_refuses_boxes() -> None:
    with pytest.raises(BadInput, match="takes no boxes"):
        render(PROMPT, "What?", {"boxes": 1})


def test_a_constant_of_the_template_stands_beside_a_picture_and_needs_nothing_of_the_user() -> None:
    learned = Slot("<learned>", "constant", ["soft_prompt"], open="[", close="]")
    prompt = replace(PROMPT, first="{system} <learned>USER: {text}", next="<learned>{text}", slots=[PICTURE, learned])
    assert tokenized(render(prompt, "a", {"pixels": 1}), Letters()) == [
        [*map(ord, "the [")], learned, [*map(ord, "]USER: ")], PICTURE, [*map(ord, "\na")],
    ]  # fmt: skip
    assert tokenized(render(prompt, "<learned>?", NONE, first=False), Letters()) == [
        [ord("[")], learned, [*map(ord, "]<learned>?")],
    ]  # fmt: skip
    assert texts(render_raw(prompt, "a<learned>b", NONE)) == ["a[", learned, "]b"]


def test_slots_side_by_side_have_an_empty_run_between_them() -> None:
    parts = render_raw(MARKED, "<image><bbox><bbox>", {"pixels": 1, "boxes": 2})
    plain = [replace(MARKED_PICTURE, open="", close=""), REGION]
    assert tokenized(parts, Marked(), ADDED) == [[-3], MARKED_PICTURE, [-4], REGION, [], REGION, []]
    bare = render_raw(replace(PROMPT, slots=plain), "<image><bbox>", {"pixels": 1, "boxes": 1})
    assert tokenized(bare, Letters()) == [[], plain[0], [], REGION, []]


def test_of_two_placeholders_the_longer_one_is_read() -> None:
    long = Slot("<image-high>", "boxes", ["x"])
    short = Slot("<image", "pixels", ["y"])
    prompt = replace(PROMPT, slots=[short, long])
    parts = render_raw(prompt, "a<image-high>b<image c", {"pixels": 1, "boxes": 1})
    assert texts(parts) == ["a", long, "b", short, " c"]
