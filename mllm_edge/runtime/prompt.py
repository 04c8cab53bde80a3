"""From a user's words to token ids: the manifest's template, placeholders, and pieces tokenized one by one.

The rule of Liu et al. 2023 (mm_utils.py `tokenizer_image_token`): the text is split at the placeholders, every piece is
tokenized as a fresh string, BOS stands once at the very start, and embeddings go between the pieces. The end of an
answer and a later turn are the rest of such a piece, not a new one, so that they get no space of their own.

Control strings count as control tokens only where the template has them. In a user's words `</s>` is four letters, so
that a question cannot end the turn or open another role; with `raw` the whole text is the caller's own template.
"""

from __future__ import annotations

import re
import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from mllm_edge.bundle.manifest import Prompt, Slot
from mllm_edge.errors import BadInput

WHAT = {"pixels": "picture", "boxes": "box"}  # what a user gives for each placeholder of such a slot
WORDS = "\n"  # stands for the words of an answer
PLURAL = {"pixels": "pictures; leave them out (--image)", "boxes": "boxes; leave them out (--box)"}


class Vocabulary(Protocol):
    """The part of `decoding.tokenizers.Tokenizer` that turns text to ids."""

    @property
    def control_tokens(self) -> Mapping[str, int]: ...

    @property
    def user_defined(self) -> Mapping[str, int]: ...

    def tokenize(self, text: str) -> list[int]: ...


@dataclass(frozen=True)
class Span:
    """A stretch of text; only in a trusted one do control strings mean control tokens. `continues` is the text of the
    template that stands before the first one of a later turn."""

    text: str
    trusted: bool
    continues: str = ""


Part = Span | Slot


def render(
    prompt: Prompt,
    text: str,
    counts: Mapping[str, int],
    *,
    first: bool = True,
    lead: str = "",
    fields: Mapping[str, str] | None = None,
) -> list[Part]:
    """A user's turn as text and slots.

    Args:
        prompt: the template.
        text: the user's words. Each placeholder takes one picture; without any, all pictures go to the front. Each
            placeholder of a box takes one box.
        counts: how many "pixels" and "boxes" come with this turn.
        first: whether this turn opens the dialogue.
        lead: what the tokenizer wants in front of a dialogue.
        fields: words for the template's other fields.

    Raises:
        BadInput: as many placeholders as pictures and boxes are needed.
    """
    for slot in prompt.slots:
        if slot.of == "pixels" and slot.placeholder not in text:
            text = slot.joint * counts.get("pixels", 0) + text
    words = {"system": prompt.system, **(fields or {})}
    spans = [Span(lead, True) if first else Span("", True, answer_parts(prompt)[1])]
    for literal, name, _, _ in string.Formatter().parse(prompt.first if first else prompt.next):
        spans.append(Span(literal, True))
        if name is not None:
            spans.append(Span(text, False) if name == "text" else Span(words.get(name, ""), name == "system"))
    return _split(spans, prompt, counts)


def render_raw(prompt: Prompt, text: str, counts: Mapping[str, int], lead: str = "") -> list[Part]:
    """The whole prompt as given, control strings and placeholders included.

    Raises:
        BadInput: as many placeholders as pictures and boxes are needed.
    """
    return _split([Span("" if text.startswith(" ") else lead, True), Span(text, True)], prompt, counts)


def answer_parts(prompt: Prompt) -> tuple[str, str]:
    """What the template puts before and after the assistant's words."""
    before, _, after = prompt.answer.partition("{text}")
    return before, after


def _split(spans: Sequence[Span], prompt: Prompt, counts: Mapping[str, int]) -> list[Part]:
    """Slots in the place of their placeholders, between the texts that open and close them; in a user's words only
    those of what the user gives."""
    slots = {slot.placeholder: slot for slot in prompt.slots}
    given_by_users = {placeholder: slot for placeholder, slot in slots.items() if slot.of in WHAT}
    parts: list[Part] = []
    for span in spans:
        for text, placeholder in _cut(span.text, slots if span.trusted else given_by_users):
            parts.append(Span(text, span.trusted, span.continues))
            if placeholder:
                slot = slots[placeholder]
                parts += [Span(slot.open, True), slot, Span(slot.close, True)]
    found = [part for part in parts if isinstance(part, Slot)]
    for of, what in WHAT.items():
        placeholders = [slot.placeholder for slot in prompt.slots if slot.of == of]
        given = counts.get(of, 0)
        if not placeholders and given:
            raise BadInput(f"this bundle takes no {PLURAL[of]}")
        if (number := sum(slot.of == of for slot in found)) != given:
            none = ", or no placeholder at all" if of == "pixels" else ""
            mismatch = f"the prompt has {number} {placeholders[0]} placeholder(s) for {given} {what}(s)"
            if not number and of == "boxes":
                raise BadInput(f"{mismatch}; write {placeholders[0]} in the question where the box is meant")
            raise BadInput(f"{mismatch}; give one {what} for each{none}")
    return parts


def _cut(text: str, separators: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    """Stretches of text, each with the separator that follows it, "" at the end; of two that fit the longer one."""
    longest_first = sorted(filter(None, separators), key=len, reverse=True)
    if not longest_first:
        yield text, ""
        return
    pieces = re.split("(" + "|".join(map(re.escape, longest_first)) + ")", text)
    yield from zip(pieces[::2], [*pieces[1::2], ""], strict=True)  # re.split puts the separators at odd places


def tokenized(parts: Sequence[Part], vocabulary: Vocabulary, added: Sequence[str] = ()) -> list[list[int] | Slot]:
    """Runs of ids and slots, without BOS; the first and the last are runs, and slots have one between them.

    Text around a control token or a slot is tokenized as a fresh string on both sides, and loses the white space beside
    a token of `added`. Of these the user-defined ones mean a token in a user's words, too.
    """
    anywhere = {text: vocabulary.user_defined[text] for text in added if text in vocabulary.user_defined}
    result: list[list[int] | Slot] = [[]]
    continued = bool(parts) and isinstance(parts[0], Span) and _is_open(parts[0].continues, vocabulary)
    fragments: list[tuple[str, int | Slot | None]] = [
        ("", None),
        *_fragments(parts, {**anywhere, **vocabulary.control_tokens}, anywhere),
        ("", None),
    ]
    for (before, _), (text, meaning), (after, _) in zip(fragments, fragments[1:], fragments[2:]):
        if isinstance(meaning, Slot):
            result += [meaning, []]
            continued = False
            continue
        run = result[-1]
        assert isinstance(run, list)
        if meaning is not None:
            run.append(meaning)
            continued = False
            continue
        text = text.lstrip() if before in added else text
        text = text.rstrip() if after in added else text
        run += _continued(text, vocabulary) if continued else vocabulary.tokenize(text) if text else []
        continued = False
    return result


def ids_of(text: str, vocabulary: Vocabulary, added: Sequence[str] = (), trusted: bool = True) -> list[int]:
    """Ids of a text without placeholders that stands after an answer's words."""
    (run,) = tokenized([Span(text, trusted, continues=WORDS)], vocabulary, added)
    assert isinstance(run, list)
    return run


def _is_open(text: str, vocabulary: Vocabulary) -> bool:
    """Whether the tokenizer sees what follows a text as the rest of the same string."""
    return bool(text) and not text.endswith((*vocabulary.control_tokens, *vocabulary.user_defined))


def _continued(text: str, vocabulary: Vocabulary) -> list[int]:
    """Ids of a text after other words: without the space that a tokenizer may put before a fresh string. Nothing
    merges with a line's end where there is such a space."""
    before, ids = vocabulary.tokenize(WORDS), vocabulary.tokenize(WORDS + text)
    return ids[len(before) :] if ids[: len(before)] == before else vocabulary.tokenize(text)


def _fragments(
    parts: Sequence[Part], trusted: Mapping[str, int], anywhere: Mapping[str, int]
) -> Iterator[tuple[str, int | Slot | None]]:
    """Runs of plain text, joined across spans as the tokenizer must see them; strings that mean a token, in a trusted
    span or anywhere, with their ids; slots."""
    plain = ""
    for part in parts:
        if isinstance(part, Slot):
            if plain:
                yield plain, None
            plain = ""
            yield part.placeholder, part
            continue
        known = trusted if part.trusted else anywhere
        for text, found in _cut(part.text, known):
            plain += text
            if found:
                if plain:
                    yield plain, None
                plain = ""
                yield found, known[found]
    if plain:
        yield plain, None
