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

from mllm_edge.bundle.manifest import Prompt
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
BOX_SLOT = -1  # stands in the ids where a region's embedding goes


def render(prompt: Prompt, text: str, images: int, first: bool = True, boxes: int = 0) -> list[Piece]:
    """A user's turn as the pieces between its pictures: always `images` + 1 of them.

    Args:
        prompt: the template.
        text: the user's words. Each placeholder takes one picture; without any, all pictures go to the front.
        images: how many pictures come with this turn.
        first: whether this turn opens the dialogue.
        boxes: how many regions come with this turn.

    Raises:
        BadInput: as many placeholders as pictures and regions are needed.
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
    return _split(spans, prompt, images, boxes)


def render_raw(prompt: Prompt, text: str, images: int, boxes: int = 0) -> list[Piece]:
    """The whole prompt as given, control strings and placeholders included.

    Raises:
        BadInput: as many placeholders as pictures and regions are needed.
    """
    lead = "" if text.startswith(" ") else prompt.lead
    return _split([Span(lead, True), Span(text, True)], prompt, images, boxes)


def answer_parts(prompt: Prompt) -> tuple[str, str]:
    """What the template puts before and after the assistant's words."""
    before, _, after = prompt.answer.partition("{text}")
    return before, after


def _split(spans: list[Span], prompt: Prompt, images: int, boxes: int) -> list[Piece]:
    pieces: list[Piece] = [[]]
    for span in spans:
        head, *rest = span.text.split(prompt.image)
        pieces[-1].append(Span(head, span.trusted))
        for part in rest:
            pieces[-1].append(Span(prompt.image_open, True))
            pieces.append([Span(prompt.image_close, True), Span(part, span.trusted)])
    _check_count(len(pieces) - 1, prompt.image, images, "picture")
    if prompt.box:
        _check_count(sum(span.text.count(prompt.box) for span in spans), prompt.box, boxes, "box")
    elif boxes:
        raise BadInput("this bundle takes no boxes; leave them out (--box)")
    return pieces


def _check_count(found: int, placeholder: str, given: int, what: str) -> None:
    if found != given:
        raise BadInput(
            f"the prompt has {found} {placeholder} placeholder(s) for {given} {what}(s); give one {what} for each"
            + (", or no placeholder at all" if what == "picture" else "")
        )


def piece_ids(piece: Piece, vocabulary: Vocabulary, prompt: Prompt) -> list[int]:
    """Ids of one piece, without BOS. Text around a control token is tokenized as a fresh string on both sides.

    Where the prompt has a region's placeholder, the ids have `BOX_SLOT`.
    """
    ids: list[int] = []
    fragments = [("", None), *_fragments(piece, vocabulary.control_tokens, prompt.box), ("", None)]
    for (before, _), (text, control), (behind, _) in zip(fragments, fragments[1:], fragments[2:]):
        if control is not None:
            ids.append(control)
            continue
        text = text.lstrip() if before in prompt.added else text
        text = text.rstrip() if behind in prompt.added else text
        ids += vocabulary.tokenize(text) if text else []
    return ids


def _fragments(piece: Piece, control: Mapping[str, int], box: str) -> Iterator[tuple[str, int | None]]:
    """Runs of plain text, joined across spans as the tokenizer must see them, and control strings with their ids."""
    plain = ""
    for span in piece:
        known = {**(control if span.trusted else {}), **({box: BOX_SLOT} if box else {})}
        longest_first = sorted(filter(None, known), key=len, reverse=True)
        pattern = "(" + "|".join(map(re.escape, longest_first)) + ")"
        for index, part in enumerate(re.split(pattern, span.text) if longest_first else [span.text]):
            if index % 2 == 0:  # re.split puts the separators at odd places
                plain += part
                continue
            if plain:
                yield plain, None
            plain = ""
            yield part, known[part]
    if plain:
        yield plain, None
