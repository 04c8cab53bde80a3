"""Which words a mask belongs to, in answers as they should be and in malformed ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest

from mllm_edge.runtime.answers.phrases import phrases
from mllm_edge.runtime.decoding.text_stream import TextStream

MARKS, TAGS, ADDED = ["[SEG]"], ["<p>", "</p>"], ["<p>", "</p>", "[SEG]"]


class Words:
    """A vocabulary of whole words; tags are control tokens, which have no text."""

    def __init__(self) -> None:
        self.control_tokens: Mapping[str, int] = {"</s>": 1, "<p>": 2, "</p>": 3, "[SEG]": 4}
        self.user_defined: Mapping[str, int] = {}
        self.known: list[str] = []

    def ids(self, text: str) -> list[int]:
        ids = []
        for word in text.split():
            if word not in self.control_tokens and word not in self.known:
                self.known.append(word)
            ids.append(self.control_tokens.get(word) or 5 + self.known.index(word))
        return ids

    def piece(self, token: int) -> bytes:
        return b"" if token < 5 else f" {self.known[token - 5]}".encode()


def found(text: str) -> list[str]:
    """The phrase of each [SEG], out of the text that the stream shows."""
    lm = Words()
    ids = lm.ids(text)
    shown = TextStream((), strip=True)
    for before, token in zip([0, *ids], ids):
        shown.feed(lm.piece(token), joined=0 < before < 5)
    shown.finish()
    spans = phrases(ids, lm, MARKS, TAGS, ADDED)  # type: ignore[arg-type]
    return [shown.text[span.start : span.end] for span in spans]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<p> A star </p> [SEG] and <p> a ring </p> [SEG] .", ["A star", "a ring"]),
        ("It is [SEG] .", [""]),  # nothing to tie it to
        ("<p> A star </p> and <p> a ring </p> [SEG]", ["a ring"]),  # the last phrase without a mask
        ("<p> A star </p> [SEG] [SEG]", ["A star", ""]),  # more masks than phrases
        ("<p> A star [SEG] here", ["A star"]),  # never closed: it ends where its mask stands
        ("A star </p> [SEG]", [""]),  # never opened
        ("<p> A <p> small star </p> [SEG]", ["small star"]),  # opened twice
        ("<p> </p> [SEG]", [""]),
        ("<p> A star </p>", []),  # a phrase without a mask
        ("<p> A star", []),
        ("", []),
    ],
)
def test_phrase_of_each_mask(text: str, expected: Sequence[str]) -> None:
    assert found(text) == list(expected)


def test_text_of_an_answer_has_no_space_before_punctuation_after_a_tag() -> None:
    stream = TextStream((), strip=True)
    for data, joined in (
        (b"", False),
        (b" A star", True),
        (b"", False),
        (b" ,", True),
        (b" a ring", False),
        (b" .", True),
    ):
        stream.feed(data, joined)
    stream.finish()
    assert stream.text == "A star, a ring."
    assert stream.size == len(" A star , a ring .")


def test_a_space_before_a_word_after_a_tag_stays() -> None:
    stream = TextStream((), strip=True)
    pieces = [stream.feed(b"A star"), stream.feed(b" ", joined=True), stream.feed(b"here"), stream.finish()]
    assert pieces == ["A star", "", " here", ""]
