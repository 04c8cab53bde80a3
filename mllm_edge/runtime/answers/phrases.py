"""Where in an answer its parts belong: the phrases that masks are tied to, the places of groups of tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from mllm_edge.runtime.decoding.text_stream import TextStream
from mllm_edge.runtime.decoding.tokenizers import Tokenizer, named
from mllm_edge.runtime.turn import Turn


@dataclass(frozen=True)
class Phrase:
    """Where in an answer's text the words stand that a mask is tied to; an empty span where there are none."""

    start: int
    end: int


def groups(turn: Turn, states: str) -> Iterator[Phrase]:
    """The place of each whole group of tokens whose states a source reads, with what is shown of them; meanwhile those
    of this group stand for the source's tensor, [n,D]. Without a source there is one group, at the end."""
    if not states:
        yield Phrase(len(turn.text), len(turn.text))
        return
    marks, rows = turn.marks[states], turn.states[states]
    for number, place in enumerate(_shown(turn, marks)[: len(rows) // len(marks)]):
        turn.values[states] = np.stack(rows[number * len(marks) : (number + 1) * len(marks)])
        yield place
    turn.values.pop(states, None)


def _shown(turn: Turn, marks: Sequence[str]) -> list[Phrase]:
    """Where each group that opens with the first mark is shown in the text; nothing is shown of control tokens."""
    tokens = {token: text for text, token in named(turn.tokenizer).items()}
    stream, found, inside = TextStream((), turn.strip), list[Phrase](), False
    for before, token in zip([None, *turn.ids], turn.ids):
        name, end = tokens.get(token, ""), len(stream.text.rstrip())
        inside = name == marks[0] or (inside and name in marks)
        if name == marks[0]:
            found.append(Phrase(end, end))
        shown = stream.feed(turn.tokenizer.piece(token), joined=tokens.get(before or -1, "") in turn.added)
        if inside and shown:
            found[-1] = Phrase(found[-1].start, len(stream.text))
    return found


def phrases(
    ids: Sequence[int],
    tokenizer: Tokenizer,
    marks: Sequence[str],
    tags: Sequence[str],
    added: Sequence[str] = (),
    strip: bool = True,
) -> list[Phrase]:
    """The phrase of each mark of an answer's ids, in order.

    A mask belongs to the last phrase that closed before it and has none yet. An open phrase ends where its mark stands;
    a phrase that opens again begins there; a closing tag alone means nothing. A mark without a phrase has an empty one.

    Args:
        ids: of the answer's text.
        tokenizer: the language model's.
        marks: control strings that stand for a mask.
        tags: the two that a phrase stands between, or none.
        added: control strings after which a space before punctuation is dropped.
        strip: whether white space before the first word was dropped.
    """
    tokens = {token: text for text, token in named(tokenizer).items()}
    opening, closing = tags or ("", "")
    stream = TextStream((), strip)
    found: list[Phrase] = []
    opened: int | None = None
    last: Phrase | None = None
    for before, token in zip([None, *ids], ids):
        name = tokens.get(token, "")
        end = len(stream.text.rstrip())
        if name and name == opening:
            opened = len(stream.text)
        elif name and name == closing and opened is not None:
            last, opened = _trimmed(stream.text, opened, end), None
        elif name and name in marks:
            if opened is not None:
                last, opened = _trimmed(stream.text, opened, end), None
            found.append(last or Phrase(end, end))
            last = None
        stream.feed(tokenizer.piece(token), joined=tokens.get(before or -1, "") in added)
    return found


def _trimmed(text: str, start: int, end: int) -> Phrase | None:
    """The span without white space around it; None where nothing is left."""
    start += len(text[start:]) - len(text[start:].lstrip())
    return Phrase(start, end) if start < end else None
