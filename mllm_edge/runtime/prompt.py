"""From a user's words to token ids: the manifest's template, image placeholders, and pieces tokenized one by one.

LLaVA's rule (llava/mm_utils.py `tokenizer_image_token`): the text is split at `<image>`, every piece is tokenized as a
fresh string, BOS stands once at the very start, and a picture's embeddings go between the pieces.

Control strings count as control tokens only where the template has them. In a user's words `</s>` is four letters, so
that a question cannot end the turn or open another role; with `raw` the whole text is the caller's own template.
"""

from __future__ import annotations

import re
import string
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from mllm_edge.bundle import Prompt
from mllm_edge.errors import BadInput


class Vocabulary(Protocol):
    """The part of `stage.LanguageModel` that turns text to ids."""

    @property
    def control_tokens(self) -> Mapping[str, int]: ...

    def tokenize(self, text: str, special: bool = False) -> list[int]: ...


@dataclass(frozen=True)
class Span:
    """A stretch of text; only in a trusted one do control strings mean control tokens."""

    text: str
    trusted: bool


Piece = list[Span]


def render(prompt: Prompt, text: str, images: int, first: bool = True) -> list[Piece]:
    """A user's turn as the pieces between its pictures: always `images` + 1 of them.

    Args:
        prompt: the template.
        text: the user's words. Each placeholder takes one picture; without any, all pictures go to the front.
        images: how many pictures come with this turn.
        first: whether this turn opens the dialogue.

    Raises:
        BadInput: as many placeholders as pictures are needed.
    """
    if images and prompt.image not in text:
        text = prompt.image_joint * images + text
    template = prompt.first if first else prompt.next
    spans = []
    for literal, name, _, _ in string.Formatter().parse(template):
        spans.append(Span(literal, True))
        if name is not None:
            spans.append(Span(text, False) if name == "text" else Span(prompt.system, True))
    if first:
        spans.insert(0, Span(prompt.lead, True))
    return _split(spans, prompt.image, images)


def render_raw(prompt: Prompt, text: str, images: int) -> list[Piece]:
    """The whole prompt as given, control strings and placeholders included.

    Raises:
        BadInput: as many placeholders as pictures are needed.
    """
    lead = "" if text.startswith(" ") else prompt.lead
    return _split([Span(lead, True), Span(text, True)], prompt.image, images)


def answer_parts(prompt: Prompt) -> tuple[str, str]:
    """What the template puts before and after the assistant's words."""
    before, _, after = prompt.answer.partition("{text}")
    return before, after


def _split(spans: list[Span], placeholder: str, images: int) -> list[Piece]:
    pieces: list[Piece] = [[]]
    for span in spans:
        head, *rest = span.text.split(placeholder)
        pieces[-1].append(Span(head, span.trusted))
        pieces += [[Span(part, span.trusted)] for part in rest]
    if len(pieces) - 1 != images:
        raise BadInput(
            f"the prompt has {len(pieces) - 1} {placeholder} placeholder(s) for {images} picture(s); "
            "give one picture per placeholder, or no placeholder at all"
        )
    return pieces


def piece_ids(piece: Piece, vocabulary: Vocabulary) -> list[int]:
    """Ids of one piece, without BOS. Text around a control token is tokenized as a fresh string on both sides."""
    ids: list[int] = []
    for part in _fragments(piece, vocabulary.control_tokens):
        ids += [part] if isinstance(part, int) else vocabulary.tokenize(part)
    return ids


def _fragments(piece: Piece, control: Mapping[str, int]) -> Iterator[str | int]:
    """Runs of plain text, joined across spans as the tokenizer must see them, and control ids."""
    longest_first = sorted(filter(None, control), key=len, reverse=True)
    pattern = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")") if longest_first else None
    plain = ""
    for span in piece:
        parts = pattern.split(span.text) if pattern and span.trusted else [span.text]
        for index, part in enumerate(parts):
            if index % 2 == 0:  # re.split puts the separators at odd places
                plain += part
                continue
            if plain:
                yield plain
            plain = ""
            yield control[part]
    if plain:
        yield plain
